"""`make demo`: from a trained checkpoint to detections and figures, on any machine.

Exports the small network that comes with the project, lets the parity gate compare it with PyTorch, and runs
the bundle without PyTorch on generated scenes that it was not trained on: exactly, in fast mode and at every
manual stop.  Says how well it detects, and how far each kind of scene made it look.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from asag_deploy import Detector
from asag_deploy.command_line import (
    ALL_FINE,
    OneSentenceParser,
    exit_code,
    progress,
    whole_number,
)
from asag_deploy.detections import Detections
from asag_deploy.images.reading import RgbImage
from asag_deploy.images.writing import is_own_picture, write_picture
from asag_deploy.replacing import check_own_file
from asag_evaluation.data.coco import VAL_SPLIT, CocoDataset, Sample
from asag_evaluation.data.scenes import KINDS, write_scenes

if TYPE_CHECKING:  # what it takes beyond the base install is imported once it runs
    from asag_evaluation.evaluate import Evaluation

CHECKPOINT = Path(__file__).with_name("asag-a-scenes.safetensors")
"""The trained network; README says how it was made."""

SEED = 2
"""Of the scenes; the network was trained on those of seed 0, and its training was watched on those of 1."""
_SIZE = 320
_WAYS: dict[str, dict[str, Any]] = {
    "exact": {},
    "fast": {"mode": "fast"},
    "stop at P4": {"max_level": "P4"},
    "stop at P5": {"max_level": "P5"},
}
_GALLERY = "gallery.jpg"
_THRESHOLD = 0.5
"""Of the detections that are drawn."""
_ENLARGED = 2
"""How many times the pictures are enlarged, which are small for a screen."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns 0, or 2 with the reason in one sentence on stderr."""

    def command() -> int:
        options = _parser().parse_args(argv)
        return _demo(options.output_dir, options.scenes)

    return exit_code("demo", command)


def _parser() -> argparse.ArgumentParser:
    parser = OneSentenceParser(prog="demo", description=__doc__)
    add = parser.add_argument
    add("--output-dir", type=Path, default=Path("demo-output"), metavar="DIR", help="default: %(default)s")
    add("--scenes", type=whole_number(1), default=200, metavar="N", help="how many (default: %(default)s)")
    return parser


def _demo(output_dir: Path, count: int) -> int:
    from asag_evaluation.report import check_report, table, write_report
    from asag_export.bundle_export import export_bundle
    from asag_export.gate.parity import format_report
    from asag_training.checkpoints import load_checkpoint

    check_own_file(output_dir / _GALLERY, is_own_picture, "the demo's pictures")
    check_report(output_dir / "evaluation")
    checkpoint = load_checkpoint(CHECKPOINT)
    print(f"1. Exporting {checkpoint.config.variant} to {output_dir / 'bundle'}", flush=True)
    start = time.perf_counter()
    exported = export_bundle(checkpoint, output_dir / "bundle", overwrite=True)
    print(f"   done in {time.perf_counter() - start:.0f} s")
    print("2. " + format_report(exported.parity).replace("\n", "\n   "))

    print(f"3. Drawing {count} scenes that the network has never seen", flush=True)
    dataset = _scenes(output_dir / "scenes", count)
    print("4. Detecting with ONNX Runtime on the CPU, without PyTorch", flush=True)
    measured: dict[str, Evaluation] = {}
    for way, options in _WAYS.items():
        with Detector.load(exported.bundle, **options) as detector:
            measured[way] = _measure(detector, dataset, way)
            if way == "exact":
                _write_gallery(detector, dataset, output_dir)
    _print_ways(measured)
    print("\n5. In detail, exactly:\n")
    print("   " + table(measured["exact"]).replace("\n", "\n   "))
    write_report(measured["exact"], output_dir / "evaluation", name=f"{checkpoint.config.variant}, exact")
    print(f"\nPictures: {output_dir / _GALLERY}, plots: {output_dir / 'evaluation'}")
    return ALL_FINE


def _scenes(folder: Path, count: int) -> CocoDataset:
    """Draw the scenes, unless an earlier demo left as many."""
    if (folder / VAL_SPLIT).exists():
        drawn = CocoDataset.open(folder, VAL_SPLIT)
        if len(drawn) == count:
            return drawn
        folder = folder.with_name(f"{folder.name}-{count}")
        if (folder / VAL_SPLIT).exists():
            return CocoDataset.open(folder, VAL_SPLIT)
    with progress(total=count, unit="scene") as bar:
        write_scenes(
            folder, count=count, seed=SEED, size=_SIZE, split=VAL_SPLIT, progress=lambda done: bar.update()
        )
    return CocoDataset.open(folder, VAL_SPLIT)


def _measure(detector: Detector, dataset: CocoDataset, way: str) -> Evaluation:
    """Run the detector over all scenes."""
    from asag_evaluation.evaluate import evaluate

    with progress(total=len(dataset), unit="scene", description=way) as bar:
        return evaluate(detector, dataset, on_image=lambda sample, found: bar.update())


def _print_ways(measured: dict[str, Evaluation]) -> None:
    print(
        f"   {'way':<11} {'AP':>6} {'AP50':>6} {'anchors':>8} {'patches':>8} {'ms':>6}   "
        "scenes that stopped at P5, P4, P3"
    )
    for way, found in measured.items():
        anchors = found.anchors
        exits = ", ".join(f"{anchors.exit_levels.get(level, 0)}" for level in ("P5", "P4", "P3"))
        print(
            f"   {way:<11} {_percent(found.coco.ap)} {_percent(found.coco.ap50)} {anchors.anchors:>8.1f} "
            f"{anchors.patches_p4 + anchors.patches_p3:>8.1f} {found.ms_per_image:>6.1f}   {exits}"
        )


def _percent(value: float | None) -> str:
    return f"{'-':>6}" if value is None else f"{100 * value:>6.1f}"


def _write_gallery(detector: Detector, dataset: CocoDataset, output_dir: Path) -> None:
    """Write one picture: the first scene of each kind, its detections above and its probing below."""
    columns = [_column(detector, sample) for sample in _first_of_each_kind(dataset)]
    if columns:
        write_picture(output_dir / _GALLERY, np.hstack(columns))


def _first_of_each_kind(dataset: CocoDataset) -> list[Sample]:
    kinds = [record.kind for record in dataset.records]
    return [dataset[kinds.index(kind)] for kind in KINDS if kind in kinds]


def _column(detector: Detector, sample: Sample) -> RgbImage:
    picture = cv2.resize(
        sample.image, None, fx=_ENLARGED, fy=_ENLARGED, interpolation=cv2.INTER_CUBIC
    ).astype(np.uint8)
    found: Detections = detector(picture, channel_order="rgb").filter(_THRESHOLD)
    probing = found.filter(1.0).plot(picture, trace=True, channel_order="rgb")
    return np.vstack([found.plot(picture, channel_order="rgb"), probing])


if __name__ == "__main__":
    sys.exit(main())
