"""`asag-export`: export a checkpoint to a bundle from the command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from asag_deploy.bundle.bundle import check_bundle_place
from asag_deploy.bundle.manifest import Preprocessing
from asag_deploy.command_line import (
    MOST_PIXELS,
    OneSentenceParser,
    exit_code,
    progress,
    whole_number,
)
from asag_deploy.engines.build import BuildOptions, check_canvases, check_targets, summary
from asag_deploy.engines.cli import (
    add_engine_options,
    build_with_progress,
    engine_options,
    given_engine_options,
)
from asag_deploy.engines.inspector import in_words
from asag_deploy.engines.shapes import MOST_DETECTIONS, check_detections
from asag_deploy.errors import ConfigError, ParityError
from asag_deploy.kernels.limits import MOST_ANCHORS
from asag_export.choices import (
    DEFAULT_OPSET,
    FORMATS,
    OPSETS,
    PRECISIONS,
)
from asag_training.network.config import MANUAL_STOPS
from asag_training.settings import WEIGHTS_CHOICES, change_sides

if TYPE_CHECKING:
    from asag_training.checkpoints import Checkpoint

PROGRAM = "asag-export"

EXIT_PARITY = 1

_LEAST_SIDE = 32
"""Pixels: a smaller image has no cell on P5."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `asag-export` and return its exit code: 0, 1 if the parity gate fails, 2 for any other error."""
    return exit_code(PROGRAM, lambda: _run(_parser().parse_args(argv)), {ParityError: EXIT_PARITY})


def _parser() -> argparse.ArgumentParser:
    parser = OneSentenceParser(
        prog=PROGRAM, description="Export an ASAG checkpoint to a bundle of static graphs."
    )
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--checkpoint",
        metavar="FILE",
        type=Path,
        help="a .pth in the public layout, or a .safetensors file, or its address",
    )
    source.add_argument(
        "--untrained",
        action="store_true",
        help="random weights, to try or time a variant without a checkpoint",
    )
    add("--variant", metavar="NAME", help="e.g. asag-a-r50-100; inferred from the file if not given")
    add("--output-dir", metavar="DIR", type=Path, required=True, help="where the bundle is written")
    add("--head", metavar="NAME", help="main (default), aux_0, aux_1 or aux_2")
    add(
        "--weights",
        choices=WEIGHTS_CHOICES,
        default=WEIGHTS_CHOICES[0],
        help="those trained (default), or their average, EMA",
    )
    stops = ", ".join(MANUAL_STOPS)
    add("--levels", metavar="NAME", default="p3-p6", help=f"the manual stop: {stops} (default %(default)s)")
    add("--mode", metavar="NAME", default="exact", help="exact (default), or fast: 15 patches a level")
    precisions = " or ".join(PRECISIONS)
    add("--precision", metavar="NAME", default="fp32", help=f"{precisions} (default %(default)s)")
    formats = "onnx alone (default), or engines beside it: tensorrt-rtx or tensorrt"
    add("--format", metavar="NAME", default="onnx", help=formats)
    add(
        "--opset",
        metavar="N",
        type=whole_number(OPSETS.start, OPSETS.stop - 1),
        default=DEFAULT_OPSET,
        help=f"{OPSETS.start} to {OPSETS.stop - 1} (default %(default)s)",
    )
    said = "(default: what the checkpoint says; if it says nothing"
    add(
        "--shorter-side",
        metavar="PX",
        type=whole_number(32, MOST_PIXELS),
        help=f"images' shorter side {said}, 800)",
    )
    add(
        "--longer-side",
        metavar="PX",
        type=whole_number(32, MOST_PIXELS),
        help=f"the most their longer side may be {said}, 1333, CrowdHuman 1500)",
    )
    said = "(default: as the network was trained; no weight depends on it)"
    add(
        "--anchor-cap",
        metavar="N",
        type=whole_number(1, MOST_ANCHORS),
        help=f"anchors that reach the decoder, {MOST_ANCHORS} at most {said}",
    )
    add("--max-detections", metavar="N", type=whole_number(1), help=f"detections of an image {said}")
    add("--overwrite", action="store_true", help="replace a bundle that is already there")
    add("--keep-failed", action="store_true", help="keep a bundle that fails the parity gate")
    add("--quiet", action="store_true", help="no progress, no notes and no table")
    add_engine_options(parser)
    return parser


def _run(options: argparse.Namespace) -> int:
    from asag_export.bundle_export import export_bundle
    from asag_export.gate.parity import format_report

    engines = _engines(options)  # before an export that takes minutes
    check_bundle_place(options.output_dir, overwrite=options.overwrite)
    checkpoint = _with_limits(_checkpoint(options), options)
    preprocessing = _preprocessing(options, checkpoint)
    if engines is not None:
        check_canvases(engines, preprocessing)
    steps = 4 + len(MANUAL_STOPS.get(options.levels, ()))
    with progress(total=steps, unit="step", quiet=options.quiet) as bar:
        notes = [] if options.quiet else _notes(options, checkpoint)

        def step(description: str) -> None:
            while notes:  # once it is certain that there is something to do
                bar.write(f"{PROGRAM}: note: '{options.checkpoint}': {notes.pop(0)}", file=sys.stderr)
            bar.set_description(description)
            bar.update()

        result = export_bundle(
            checkpoint,
            options.output_dir,
            head=options.head,
            levels=options.levels,
            mode=options.mode,
            precision=options.precision,
            opset=options.opset,
            preprocessing=preprocessing,
            engines=engines,
            overwrite=options.overwrite,
            keep_failed=options.keep_failed,
            progress=step,
        )
    if not options.quiet:
        print(format_report(result.parity))
        if result.engines is not None:
            print(format_report(result.engines.report))
            for stage, why in result.engines.full_precision.items():
                print(f"  {stage} stays in float32: {why}")
            for stage, layers in result.engines.layers.items():
                print(f"  layers of {stage}: {in_words(layers)}")
        manifest = result.bundle.manifest
        print(
            f"{options.output_dir}: {manifest.variant}, {manifest.precision_in_words}, ready for asag-detect"
        )
    if not result.parity.passed or (result.engines is not None and not result.engines.report.passed):
        raise ParityError(f"the bundle at '{options.output_dir}' was kept although it failed the parity gate")
    if engines is not None:
        report = build_with_progress(result.bundle, engines, quiet=options.quiet)
        if not options.quiet:
            print("\n".join(summary(report, result.bundle, options.output_dir)))
    return 0


def _engines(options: argparse.Namespace) -> BuildOptions | None:
    """Read how engines are built, if they are asked for, and see that their library can build them."""
    if options.format not in FORMATS:
        raise ConfigError(f"unknown format '{options.format}'; choose one of {', '.join(FORMATS)}")
    if options.format == "onnx":
        given = given_engine_options(options)
        if given:
            raise ConfigError(f"{given[0]} is for engines; give --format tensorrt-rtx too, or leave it out")
        return None
    engines = engine_options(options, engine_format=options.format, precision=options.precision)
    check_targets(engines)
    return engines


def _checkpoint(options: argparse.Namespace) -> Checkpoint:
    from asag_training.checkpoints import load_checkpoint, untrained_checkpoint

    if options.untrained:
        if options.variant is None:
            raise ConfigError("--untrained needs to know which network: give --variant NAME")
        return untrained_checkpoint(options.variant)
    return load_checkpoint(options.checkpoint, variant=options.variant, weights=options.weights)


def _with_limits(checkpoint: Checkpoint, options: argparse.Namespace) -> Checkpoint:
    """Give the network room for other numbers of anchors and detections than it was trained with."""
    from asag_training.checkpoints.checkpoint import change_settings

    least = checkpoint.config.anchor_floor
    if options.anchor_cap is not None and options.anchor_cap < least:
        raise ConfigError(f"--anchor-cap is {options.anchor_cap}; this network needs at least {least}")
    asked = {"anchor_cap": options.anchor_cap, "max_detections": options.max_detections}
    changed = change_settings(checkpoint, [f"{name}={n}" for name, n in asked.items() if n is not None])
    if options.format != FORMATS[0]:
        config = changed.config
        fewer = f"give --max-detections {MOST_DETECTIONS}"
        check_detections(config.detection_limit, config.anchor_cap, config.num_classes, fewer)
    return changed


def _notes(options: argparse.Namespace, checkpoint: Checkpoint) -> list[str]:
    """Say what was taken of the checkpoint's file, and what it does not say."""
    from asag_training.checkpoints.published import about_heads

    chosen = [] if options.untrained else about_heads(options.checkpoint, checkpoint, options.head)
    return [*checkpoint.notes, *chosen, *checkpoint.assumed]


def _preprocessing(options: argparse.Namespace, checkpoint: Checkpoint) -> Preprocessing:
    """Take the pre-processing that the checkpoint was trained for, unless the user says otherwise."""
    return change_sides(checkpoint.prepared, options.shorter_side, options.longer_side, least=_LEAST_SIDE)


if __name__ == "__main__":
    sys.exit(main())
