"""Annotation files of any size, like COCO's: with outlines, which are most of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from asag_evaluation.data.coco import COCO_CATEGORIES, TRAIN_SPLIT

_AT_ONCE = 20000
_CORNERS = (6, 46)
"""Of an outline: COCO's file of 118,287 images with 860,001 objects is as large as one of these."""


def write_annotated(root: Path, *, images: int, objects: int, as_text: bool = False, seed: int = 0) -> Path:
    """Write a data set in COCO layout, its pictures empty files; return its annotation file.

    as_text: the first area is written as text, as other tools write it.
    """
    rng = np.random.default_rng(seed)
    file = root / "annotations" / f"instances_{TRAIN_SPLIT}.json"
    folder = root / TRAIN_SPLIT
    for each in (file.parent, folder):
        each.mkdir(parents=True)
    ids = rng.choice(5 * images, images, replace=False) + 1
    sides = rng.integers(300, 640, (images, 2), endpoint=True)
    with file.open("w", encoding="ascii") as out:
        out.write('{"info": {"description": "generated"},"licenses": [{"id": 1,"name": "none"}],"images": [')
        for i, (number, (height, width)) in enumerate(zip(ids.tolist(), sides.tolist(), strict=True)):
            name = f"{number:012d}.jpg"
            (folder / name).touch()
            address = f"http://images.example.org/{TRAIN_SPLIT}/{name}"
            out.write(
                f'{"," * (i > 0)}{{"license": 1,"file_name": "{name}","coco_url": "{address}",'
                f'"height": {height},"width": {width},"date_captured": "2013-11-14 11:18:45",'
                f'"flickr_url": "{address}","id": {number}}}'
            )
        out.write('],"annotations": [')
        for start in range(0, objects, _AT_ONCE):
            count = min(_AT_ONCE, objects - start)
            out.write(("," * (start > 0)) + ",".join(_annotations(rng, ids, sides, start, count)))
        categories = [{"supercategory": "thing", "id": c.id, "name": c.name} for c in COCO_CATEGORIES]
        out.write(f'],"categories": {json.dumps(categories)}}}')
    if as_text:
        text = file.read_text(encoding="ascii")
        begin = text.index('"area": ') + len('"area": ')
        end = text.index(",", begin)
        file.write_text(f'{text[:begin]}"{text[begin:end]}"{text[end:]}', encoding="ascii")
    return file


def _annotations(
    rng: np.random.Generator, ids: NDArray[np.int64], sides: NDArray[np.int64], start: int, count: int
) -> Iterator[str]:
    """Yield annotations of random images, with outlines in their boxes."""
    image = rng.integers(0, len(ids), count)
    room = sides[image][:, ::-1]
    size = np.maximum(room * rng.beta(1, 3, (count, 2)), 2).round(2)
    corner = (rng.random((count, 2)) * (room - size)).round(2)
    classes = rng.integers(0, len(COCO_CATEGORIES), count)
    corners = rng.integers(*_CORNERS, count)
    for i in range(count):
        angle = np.linspace(0, 2 * np.pi, corners[i], endpoint=False)
        around = corner[i] + size[i] / 2 * (1 + 0.95 * np.stack([np.cos(angle), np.sin(angle)], axis=1))
        outline = json.dumps(around.round(2).ravel().tolist(), separators=(",", ":"))
        box = json.dumps([*corner[i].tolist(), *size[i].tolist()], separators=(",", ":"))
        yield (
            f'{{"segmentation": [{outline}],"area": {size[i].prod() * 0.7:.4f},"iscrowd": 0,'
            f'"image_id": {ids[image[i]]},"bbox": {box},'
            f'"category_id": {COCO_CATEGORIES[classes[i]].id},"id": {start + i + 1}}}'
        )
