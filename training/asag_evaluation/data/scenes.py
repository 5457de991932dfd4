"""Generated scenes: a data set in COCO layout of drawn objects that lie over one another.

    asag-data scenes --output-dir DIR --count 1000 --seed 0 --size 320

Kinds of scenes let a network show that it adapts: a few large objects only (`large`), dozens of tiny ones
(`tiny`), objects of all sizes (`mixed`), and, where asked for, tiny ones by the hundred (`crowd`).  Boxes
enclose what is visible of an object; none is hidden by more than 70%.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import cv2
import numpy as np
from numpy.typing import NDArray

from asag_deploy.atomic import atomic_directory, atomic_write_text
from asag_deploy.bundle.manifest import Category
from asag_deploy.errors import ConfigError, OutputError
from asag_deploy.images.reading import RgbImage
from asag_evaluation.data.coco import TRAIN_SPLIT
from asag_evaluation.data.shapes import (
    CLASSES,
    DETAIL,
    Floats,
    Mask,
    ObjectClass,
    Rng,
    background,
    grid,
    lighting,
    outline_mask,
    paint,
)
from asag_evaluation.data.written import check_ours

Kind = Literal["large", "mixed", "tiny", "crowd"]
KINDS: tuple[Kind, ...] = get_args(Kind)
USUAL_KINDS: tuple[Kind, ...] = ("large", "mixed", "tiny")

SCENE_CATEGORIES: tuple[Category, ...] = tuple(
    Category(id=i, name=shape.name) for i, shape in enumerate(CLASSES, start=1)
)

MIN_DIAMETER = 8.0
"""Pixels of the circle around the smallest objects, whose boxes are then about 6 pixels wide or high."""
MIN_VISIBLE = 0.3
"""The part of every object that can be seen, at least."""
SMALLEST_SCENE = 64

_ATTEMPTS = 12
"""Places tried for an object before it is left out."""
_JPEG_QUALITY = 95


@dataclass(frozen=True, kw_only=True, eq=False)
class Scene:
    """A drawn picture and its T objects."""

    image: RgbImage
    """uint8 (H, W, 3) RGB."""
    boxes: NDArray[np.float32]
    """(T, 4) x1, y1, x2, y2 in pixels, of the visible parts."""
    labels: NDArray[np.int64]
    """(T,) indices into `SCENE_CATEGORIES`."""
    areas: NDArray[np.float32]
    """(T,) visible areas in square pixels."""
    kind: Kind


def draw(height: int, width: int, seed: int, number: int = 0, kinds: tuple[Kind, ...] = USUAL_KINDS) -> Scene:
    """Draw scene `number` of `seed`; the same arguments give the same scene.

    Its kind is one of `kinds`, each as likely as the others.  Raises ConfigError for pictures under 64 pixels
    wide or high.
    """
    if min(height, width) < SMALLEST_SCENE:
        raise ConfigError(
            f"a scene of {width} x {height} pixels is too small: make it {SMALLEST_SCENE} or more"
        )
    rng = np.random.default_rng([seed, number, height, width])
    kind = kinds[int(rng.integers(len(kinds)))]
    layout = _Layout(height, width)
    for diameter in _diameters(kind, min(height, width), rng):
        layout.add(diameter, rng)
    boxes, areas = layout.visible()
    return Scene(
        image=layout.render(rng),
        boxes=boxes,
        labels=np.array([CLASSES.index(item.shape) for item in layout.objects], dtype=np.int64),
        areas=areas,
        kind=kind,
    )


_DESCRIPTION = "generated scenes"


def write_scenes(
    output_dir: Path,
    *,
    count: int,
    seed: int,
    size: int,
    split: str = TRAIN_SPLIT,
    kinds: tuple[Kind, ...] = USUAL_KINDS,
    progress: Callable[[int], object] = lambda done: None,
) -> Path:
    """Draw `count` scenes of `size` x `size` pixels into `output_dir` and return the annotation file.

    Each image of the annotation file has its `kind`.  The split must not be there yet; other splits may.
    Raises ConfigError for options that make no sense, OutputError if the files cannot be written.
    """
    if count < 1:
        raise ConfigError(f"count is {count}; expected 1 scene or more")
    if seed < 0:
        raise ConfigError(f"seed is {seed}; expected 0 or more")
    if (output_dir / split).exists():
        raise OutputError(
            f"there is a '{output_dir / split}' already: remove it, or choose another --output-dir or --split"
        )
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    file = output_dir / "annotations" / f"instances_{split}.json"
    check_ours(file, _DESCRIPTION)
    with atomic_directory(output_dir / split, overwrite=False, marker="") as folder:
        for number in range(count):
            scene = draw(size, size, seed, number, kinds)
            name = f"{number + 1:06d}.jpg"
            (folder / name).write_bytes(_jpeg(scene.image))
            shape = {"width": size, "height": size}
            images.append({"id": number + 1, "file_name": name, **shape, "kind": scene.kind})
            annotations += _annotations(scene, number + 1, len(annotations) + 1)
            progress(number + 1)
        content = {
            "info": {"description": f"{count} {_DESCRIPTION}, seed {seed}"},
            "images": images,
            "annotations": annotations,
            "categories": [{"id": category.id, "name": category.name} for category in SCENE_CATEGORIES],
        }
        atomic_write_text(file, json.dumps(content))
    return file


@dataclass(frozen=True, kw_only=True, eq=False)
class _Object:
    shape: ObjectClass
    mask: Mask
    """(n, n) the outline in its window, in detail."""
    left: int
    """Of the window, in details, at a whole pixel; it may lie outside the picture."""
    top: int
    half: float
    turn: float
    squeeze: float


class _Layout:
    """Objects placed one over another, and which of them each detail of the picture shows."""

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = height, width
        self.owner = np.full((height * DETAIL, width * DETAIL), -1, dtype=np.int16)
        self.objects: list[_Object] = []
        self.whole: list[int] = []
        """Details of each object, hidden ones and those outside the picture included."""
        self.seen: list[int] = []

    def add(self, diameter: float, rng: Rng) -> None:
        """Lay an object of `diameter` pixels somewhere on top; leave it out if it would hide too much."""
        shape = CLASSES[int(rng.integers(len(CLASSES)))]
        half = diameter * DETAIL / 2
        turn = float(rng.uniform(-np.pi, np.pi) if diameter > 24 else rng.uniform(-0.4, 0.4))
        squeeze = float(1 - rng.uniform(0, shape.stretch))
        window = DETAIL * (int(np.ceil(diameter)) + 2)
        mask = outline_mask(shape, window, half, turn, squeeze)
        for _ in range(_ATTEMPTS):
            # Centres keep a third of the object inside the picture.
            x, y = (
                rng.uniform(half * 0.5, n * DETAIL - half * 0.5) - window / 2
                for n in (self.width, self.height)
            )
            item = _Object(
                shape=shape,
                mask=mask,
                left=DETAIL * round(x / DETAIL),
                top=DETAIL * round(y / DETAIL),
                half=half,
                turn=turn,
                squeeze=squeeze,
            )
            if self._lay(item):
                return

    def visible(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return boxes (T, 4) in pixels around what is visible of each object, and its area (T,)."""
        boxes = np.zeros((len(self.objects), 4), dtype=np.float32)
        for number, item in enumerate(self.objects):
            here, _ = self._windows(item)
            mine = self.owner[here] == number
            rows, columns = (np.flatnonzero(mine.any(axis=axis)) for axis in (1, 0))
            boxes[number] = (
                here[1].start + columns[0],
                here[0].start + rows[0],
                here[1].start + columns[-1] + 1,
                here[0].start + rows[-1] + 1,
            )
        areas = np.array(self.seen, dtype=np.float32) / np.float32(DETAIL**2)
        return boxes / np.float32(DETAIL), areas

    def render(self, rng: Rng) -> RgbImage:
        """Draw the picture: ground, then each object with its shadow."""
        canvas = background(self.height, self.width, rng)
        for item in self.objects:
            opacity = _average(item.mask.astype(np.float32))
            top, left = item.top // DETAIL, item.left // DETAIL
            _cast_shadow(canvas, opacity, top, left)
            here, there = _overlap(top, left, len(opacity), self.height, self.width)
            cells = grid(len(item.mask), item.half, item.turn, item.squeeze)
            colours = paint(item.shape, cells, rng) * lighting(item.mask)[..., None]
            # Colour is averaged over the object's own details alone, so that none of its window bleeds in.
            inked = _average(colours * item.mask[..., None].astype(np.float32))[there]
            canvas[here] = canvas[here] * (1 - opacity[there][..., None]) + inked
        noise = rng.normal(0, 0.008, canvas.shape).astype(np.float32)
        return cast(RgbImage, ((canvas + noise) * 255).round().clip(0, 255).astype(np.uint8))

    def _lay(self, item: _Object) -> bool:
        here, there = self._windows(item)
        mask = item.mask[there]
        whole, seen = int(item.mask.sum()), int(mask.sum())
        if seen < 2 * MIN_VISIBLE * whole:
            return False
        covered = np.bincount(self.owner[here][mask] + 1, minlength=len(self.objects) + 1)[1:]
        for number, lost in enumerate(covered.tolist()):
            if lost and self.seen[number] - lost < MIN_VISIBLE * self.whole[number]:
                return False
        for number, lost in enumerate(covered.tolist()):
            self.seen[number] -= lost
        self.owner[here][mask] = len(self.objects)
        self.objects.append(item)
        self.whole.append(whole)
        self.seen.append(seen)
        return True

    def _windows(self, item: _Object) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
        """Return where a window lies in the picture, and which part of it that is; both in details."""
        return _overlap(item.top, item.left, len(item.mask), *self.owner.shape)


def _overlap(
    top: int, left: int, side: int, height: int, width: int
) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    rows = slice(max(top, 0), min(top + side, height))
    columns = slice(max(left, 0), min(left + side, width))
    inner = slice(rows.start - top, rows.stop - top), slice(columns.start - left, columns.stop - left)
    return (rows, columns), inner


def _cast_shadow(canvas: Floats, opacity: Floats, top: int, left: int) -> None:
    """Darken the canvas where the shadow of an object falls, which is to the bottom right of it."""
    spread = max(len(opacity) * 0.045, 0.6)
    margin, shift = int(np.ceil(3 * spread)), round(spread)
    shadow = cv2.GaussianBlur(np.pad(opacity, margin), (0, 0), spread)
    corner = shift - margin
    here, there = _overlap(top + corner, left + corner, len(shadow), *canvas.shape[:2])
    canvas[here] *= 1 - 0.45 * shadow[there][..., None]


def _average(detailed: Floats) -> Floats:
    """Average (n, n, ...) details to pixels."""
    size = len(detailed) // DETAIL
    return cast(Floats, cv2.resize(detailed, (size, size), interpolation=cv2.INTER_AREA))


def _diameters(kind: Kind, scene: int, rng: Rng) -> list[float]:
    """Draw the objects' diameters in pixels, the largest first, for a scene with the shorter side `scene`.

    The largest come first so that the smaller ones lie on top.
    """

    def some(low: float, high: float, fewest: int, most: int) -> list[float]:
        count = int(rng.integers(fewest, most + 1))
        return [float(d) for d in np.exp(rng.uniform(np.log(low), np.log(high), count))]

    tiny = MIN_DIAMETER, max(0.055 * scene, 1.5 * MIN_DIAMETER)
    if kind == "large":
        diameters = some(0.3 * scene, 0.5 * scene, 1, 4)
    elif kind == "tiny":
        diameters = some(*tiny, 24, 60) + some(0.08 * scene, 0.16 * scene, 0, 2)
    elif kind == "crowd":
        diameters = some(*tiny, 60, 200)
    else:
        diameters = some(0.25 * scene, 0.5 * scene, 1, 3)
        diameters += some(0.08 * scene, 0.25 * scene, 3, 8) + some(*tiny, 3, 12)
    return sorted(diameters, reverse=True)


def _annotations(scene: Scene, image_id: int, first_id: int) -> list[dict[str, Any]]:
    corners = scene.boxes.astype(float).round(3)
    return [
        {
            "id": first_id + i,
            "image_id": image_id,
            "category_id": SCENE_CATEGORIES[int(scene.labels[i])].id,
            "bbox": [x1, y1, round(x2 - x1, 3), round(y2 - y1, 3)],
            "area": round(float(scene.areas[i]), 3),
            "iscrowd": 0,
        }
        for i, (x1, y1, x2, y2) in enumerate(corners.tolist())
    ]


def _jpeg(image: RgbImage) -> bytes:
    fine, data = cv2.imencode(
        ".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY]
    )
    assert fine, "a generated scene could not be encoded"
    return data.tobytes()
