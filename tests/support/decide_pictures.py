"""The pictures of docs/decide.md: one photograph and one generated scene, and how probing decided in them.

    PYTHONPATH=.:training:export:tests python tests/support/decide_pictures.py docs

draws them anew and prints the sentences that the page has.  The networks are those that come with the
project, in PyTorch, so that no bundle is needed; a bundle decides the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from asag_deploy.call_options import CallOptions
from asag_deploy.detections import Detections
from asag_deploy.detector import Detector
from asag_deploy.examples import PHOTOGRAPHS, PHOTOGRAPHS_SPLIT
from asag_deploy.images.drawing import (
    PATCH_COLOUR,
    LegendEntry,
    Picture,
    draw_boxes,
    muted,
    shown_at,
    with_legend,
)
from asag_deploy.images.level_pictures import (
    ASKED_COLOUR,
    Scale,
    candidates_of,
    decoder_picture,
    level_picture,
    scaled,
)
from asag_deploy.images.reading import RgbImage, load
from asag_deploy.images.writing import write_picture
from asag_deploy.playground.examples import OWN
from asag_deploy.playground.looking import LookingDetector, with_detections
from asag_deploy.playground.words import decoder_caption, level_caption, story
from asag_evaluation.data.scenes import Scene, draw
from asag_evaluation.metrics.overlaps import iou
from asag_export.demo.networks import CHECKPOINT, PHOTOGRAPHS_CHECKPOINT
from asag_training.evaluation.checkpoint_predictor import checkpoint_predictor
from support.playground_examples import SCENES, SEED, SIZE

PHOTOGRAPH = PHOTOGRAPHS / PHOTOGRAPHS_SPLIT / "BloodImage_00389.jpg"
SCENE = OWN / "3-tiny.jpg"
THRESHOLD = 0.5
"""Of the detections that are drawn and counted."""
_LEAST_IOU = 0.5
_SEEN_COLOUR = (160, 255, 90)


@dataclass(frozen=True, kw_only=True)
class Looked:
    """A picture, what was found in it, and how it was looked for."""

    image: RgbImage
    found: Detections

    def sentences(self) -> list[str]:
        """What happened, what became of each level's anchors, and what the decoder got."""
        trace = self.found.trace
        levels = [level_caption(trace, number) for number in range(len(trace.levels))]
        return [story(trace, deepest="P3", deadline_ms=None), *levels, decoder_caption(trace)]


def main(folder: Path) -> None:
    """Draw all pictures into the folder, and print what the page quotes."""
    photograph = look(detector_of(PHOTOGRAPHS_CHECKPOINT), PHOTOGRAPH)
    print(f"{PHOTOGRAPH.name}:", *photograph.sentences(), sep="\n  ")
    for name, picture in photograph_pictures(photograph):
        write_picture(folder / f"decide-{name}.jpg", picture)
    rows, picture = scene_table(detector_of(CHECKPOINT))
    print(f"{SCENE.name}:", *rows, sep="\n  ")
    write_picture(folder / "decide-scene.jpg", picture)


def detector_of(checkpoint: Path) -> Detector:
    """Return the network of a checkpoint, in PyTorch, under the loop that bundles run under."""
    return checkpoint_predictor(checkpoint).detector


def look(detector: Detector, path: Path) -> Looked:
    """Detect in a picture, and keep every anchor."""
    image = load(str(path), "rgb")
    found = detector(image, channel_order="rgb", threshold=THRESHOLD, explain=True)
    return Looked(image=image, found=found)


def photograph_pictures(looked: Looked) -> Iterator[tuple[str, Picture]]:
    """Draw what each level predicted, where the next one looked, what the decoder got, and what was found."""
    shown, scale = shown_at(looked.image)
    trace = looked.found.trace
    for number, level in enumerate(trace.levels):
        yield f"photo-{level.level.lower()}", level_picture(shown, scale, trace, number)
    yield "photo-patches", _patches(shown, scale, looked.found)
    yield "photo-decoder", decoder_picture(shown, scale, trace)
    yield "photo-found", with_detections(shown, scale, looked.found)


def _patches(shown: Picture, scale: Scale, found: Detections) -> Picture:
    """Draw the patch around every anchor of P5 that asked, and those that patch NMS kept."""
    first, below = candidates_of(found.trace, 0), found.trace.levels[1]
    asked = first.boxes[first.asked]
    sides = below.patch_boxes[0, 2:] - below.patch_boxes[0, :2]
    centres = (asked[:, :2] + asked[:, 2:]) / 2
    squares = np.concatenate([centres - sides / 2, centres + sides / 2], axis=1).astype(np.float32)
    drawn = muted(shown)
    draw_boxes(drawn, scaled(squares, scale), ASKED_COLOUR, thin=True, dashed=True)
    draw_boxes(drawn, scaled(asked, scale), ASKED_COLOUR)
    draw_boxes(drawn, scaled(below.patch_boxes, scale), PATCH_COLOUR)
    legend = [
        LegendEntry(f"anchors that asked ({len(asked)})", ASKED_COLOUR),
        LegendEntry("the patch around each", ASKED_COLOUR, thin=True, dashed=True),
        LegendEntry(f"patches kept ({below.patches})", PATCH_COLOUR),
    ]
    return with_legend(drawn, legend)


WAYS: tuple[tuple[str, CallOptions], ...] = (
    ("as exported", {}),
    ('mode="fast"', {"mode": "fast"}),
    ('max_level="P4"', {"max_level": "P4"}),
    ('max_level="P5"', {"max_level": "P5"}),
)


def scene_table(detector: LookingDetector) -> tuple[list[str], Picture]:
    """Detect in the scene in four ways: rows of the page's table, and two rows of pictures."""
    image = load(str(SCENE), "rgb")
    kind, number = SCENES[SCENE.name]
    scene = draw(SIZE, SIZE, SEED, number, (kind,))
    shown, scale = shown_at(image)
    rows, pictures = [], []
    for name, options in WAYS:
        asked: CallOptions = {**options, "threshold": THRESHOLD}
        found = detector(image, channel_order="rgb", **asked)
        seen = _seen(scene, found)
        rows.append(_row(name, found, seen))
        drawn = muted(shown)
        draw_boxes(drawn, scaled(scene.boxes[seen], scale), _SEEN_COLOUR)
        draw_boxes(drawn, scaled(scene.boxes[~seen], scale), PATCH_COLOUR)
        legend = [
            LegendEntry(f"{name}: found ({seen.sum()})", _SEEN_COLOUR),
            LegendEntry(f"missed ({(~seen).sum()})", PATCH_COLOUR),
        ]
        pictures.append(with_legend(drawn, legend))
    high = max(len(picture) for picture in pictures)
    pictures = [np.pad(picture, ((0, high - len(picture)), (0, 0), (0, 0))) for picture in pictures]
    return rows, np.vstack([np.hstack(pictures[:2]), np.hstack(pictures[2:])])


def _row(name: str, found: Detections, seen: NDArray[np.bool_]) -> str:
    """Return a row of the page's table: way, why it stopped, patches, anchors, objects found, detections."""
    trace = found.trace
    probed = {level.level: str(level.patches) for level in trace.levels}
    cells = (
        name if "=" not in name else f"`{name}`",
        f"{trace.exit_level}: {trace.stop.value}",
        f"{probed.get('P4', '-')}, {probed.get('P3', '-')}",
        str(trace.anchor_count),
        f"{seen.sum()} of {len(seen)}",
        str(len(found)),
    )
    return f"| {' | '.join(cells)} |"


def _seen(scene: Scene, found: Detections) -> NDArray[np.bool_]:
    """Return (T,) which of a scene's objects have a detection of their class with IoU 0.5 or more."""
    overlap = iou(scene.boxes, found.xyxy)
    overlap[scene.labels[:, None] != found.class_id[None]] = 0
    seen = np.zeros(len(scene.boxes), dtype=np.bool_)
    for number in range(len(found)):  # best first, an object each
        best = int(np.where(seen, 0, overlap[:, number]).argmax())
        seen[best] |= overlap[best, number] >= _LEAST_IOU
    return seen


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where the pictures are written")
    main(parser.parse_args().folder)
