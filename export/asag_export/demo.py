"""`make demo`: from a network to detections and pictures, on any machine.

Exports a network, lets the parity gate compare it with PyTorch, loads the bundle without PyTorch's help and
detects on a photograph and on generated scenes: exactly, in fast mode and at every manual stop.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asag_deploy import Detections, Detector
from asag_deploy.errors import AsagError, ImageError
from asag_deploy.images import read_image
from asag_deploy.results import write_picture
from asag_export.bundle_export import export_bundle
from asag_export.report import format_report
from asag_export.untrained import untrained_checkpoint
from asag_training.scenes import draw_scene

VARIANT = "asag-a-r50-100"
_SCENES = ((480, 640, 1), (600, 450, 2), (360, 640, 3))
_WAYS: dict[str, dict[str, Any]] = {
    "exact": {},
    "fast": {"mode": "fast"},
    "P4-P6": {"max_level": "P4"},
    "P5-P6": {"max_level": "P5"},
}
_NO_BOXES = 1.0
"""A threshold that no score reaches: what an untrained network calls a bird is not worth drawing."""


@dataclass(frozen=True, kw_only=True)
class _Row:
    picture: str
    way: str
    detections: Detections


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns 0, or 2 with the reason in one sentence on stderr."""
    parser = argparse.ArgumentParser(prog="demo", description=__doc__)
    parser.add_argument("--output-dir", type=Path, default=Path("demo-output"))
    options = parser.parse_args(argv)
    try:
        _demo(options.output_dir)
    except AsagError as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 2
    return 0


def _demo(output_dir: Path) -> None:
    bundle = output_dir / "bundle"
    print(f"1. Exporting {VARIANT} with untrained weights to {bundle} (about a minute)", flush=True)
    start = time.perf_counter()
    exported = export_bundle(
        untrained_checkpoint(VARIANT),
        bundle,
        overwrite=True,
        progress=lambda step: print(f"   {step}", flush=True),
    )
    print(f"   done in {time.perf_counter() - start:.0f} s")
    print("2. " + format_report(exported.parity).replace("\n", "\n   "))

    print("3. Detecting with ONNX Runtime on the CPU, without PyTorch", flush=True)
    pictures = _pictures()
    rows = []
    for way, options in _WAYS.items():
        with Detector.load(exported.bundle, **options) as detector:
            for name, picture in pictures.items():
                rows.append(_Row(picture=name, way=way, detections=detector(picture, channel_order="rgb")))
    for name, picture in pictures.items():
        _draw(output_dir / f"{name}.jpg", picture, [row for row in rows if row.picture == name])
    _print_summary(rows)
    print(f"Pictures: {', '.join(str(output_dir / f'{name}.jpg') for name in pictures)}")
    print(
        "The weights are UNTRAINED: anchors, patches and stops are what a network computes that has learnt "
        "nothing yet, so no boxes are drawn; for true ones, export a trained checkpoint with asag-export."
    )


def _pictures() -> dict[str, NDArray[np.uint8]]:
    """Generated scenes by name, and a photograph if matplotlib, which ships one, is installed."""
    pictures = {f"scene-{seed}": draw_scene(height, width, seed) for height, width, seed in _SCENES}
    try:
        from matplotlib.cbook import get_sample_data

        path = get_sample_data("grace_hopper.jpg", asfileobj=False)
        pictures["photograph"] = read_image(str(path))
    except (ImportError, ImageError):
        print("   (no photograph: matplotlib is not installed)")
    return pictures


def _draw(path: Path, picture: NDArray[np.uint8], rows: list[_Row]) -> None:
    """The ways next to each other, each with its patches in red and its anchors in white."""
    panels = [row.detections.filter(_NO_BOXES).plot(picture, trace=True, channel_order="rgb") for row in rows]
    top, bottom = np.hstack(panels[:2]), np.hstack(panels[2:])
    write_picture(path, np.vstack([top, bottom]))


def _print_summary(rows: list[_Row]) -> None:
    print(
        f"   {'picture':<12} {'way':<7} {'stopped at':<11} {'patches':>7} {'anchors':>8} {'ms':>7}   because"
    )
    for row in rows:
        trace = row.detections.trace
        patches = sum(level.patches for level in trace.levels)
        total = row.detections.times_ms["total"]
        print(
            f"   {row.picture:<12} {row.way:<7} {trace.exit_level:<11} {patches:>7} {trace.anchor_count:>8} "
            f"{total:>7.0f}   {trace.stop.value}"
        )


if __name__ == "__main__":
    sys.exit(main())
