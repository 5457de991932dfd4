"""`asag-eval`: measure a bundle or a checkpoint on a data set; PyTorch is needed for a checkpoint only."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asag_deploy.backends import check_runs_here
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.command_line import (
    ALL_FINE,
    MOST_PIXELS,
    OneSentenceParser,
    exit_code,
    progress,
    whole_number,
)
from asag_deploy.detector_options import DetectorOptions, add_detector_options, detector_options
from asag_deploy.errors import CheckpointError, ConfigError
from asag_deploy.fetching.locate import local_model
from asag_evaluation.data.coco import VAL_SPLIT, CocoDataset
from asag_evaluation.data.orientation import add_orientation_option
from asag_training.checkpoints.foreign_files import what_checkpoints

if TYPE_CHECKING:
    from asag_evaluation.predictor import Predictor

PROGRAM = "asag-eval"

TORCH = "torch"
"""The backend that runs checkpoints."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `asag-eval` with these arguments (None: the command line's) and return its exit code.

    0: all fine; 2: nothing could be measured, with the reason in one sentence on stderr; 130: interrupted.
    """
    return exit_code(PROGRAM, lambda: _run(_parser().parse_args(argv)))


def _parser() -> argparse.ArgumentParser:
    parser = OneSentenceParser(
        prog=PROGRAM,
        description="Measure a checkpoint or a bundle on a data set in COCO layout.",
    )
    add = parser.add_argument
    add(
        "model",
        type=Path,
        metavar="BUNDLE_OR_CHECKPOINT",
        help="a bundle's folder, or a checkpoint's file, or its address",
    )
    add("--data", type=Path, required=True, metavar="DIR", help="the data set's folder")
    add("--split", default=VAL_SPLIT, metavar="NAME", help=f"which part of it (default: {VAL_SPLIT})")
    add_orientation_option(parser)
    add("--limit", type=whole_number(1), metavar="N", help="measure on the first N images only")
    add("--output-dir", type=Path, metavar="DIR", help="write the figures, the detections and plots to DIR")
    add("--batch", type=whole_number(1), default=1, metavar="N", help="images to run at once (default: 1)")
    add("--quiet", action="store_true", help="print no table")
    add_detector_options(parser)
    add = parser.add_argument_group(
        "for a checkpoint", "PyTorch runs it: its backend is torch, and its mode exact if none is given."
    ).add_argument
    add("--head", metavar="HEAD", help="which decoder (default: main)")
    add(
        "--weights",
        choices=("model", "ema"),
        help="which of a file's weights: those that were trained, or their average, EMA (default: model)",
    )
    said = "(default: what the checkpoint says; if it says nothing"
    add(
        "--shorter-side",
        type=whole_number(1, MOST_PIXELS),
        metavar="PIXELS",
        help=f"images' shorter side {said}, 800)",
    )
    add(
        "--longer-side",
        type=whole_number(1, MOST_PIXELS),
        metavar="PIXELS",
        help=f"the most their longer side may be {said}, 1333, CrowdHuman 1500)",
    )
    add(
        "--set",
        dest="changes",
        action="append",
        default=[],
        metavar="NAME=V,V,...",
        help="measure it under other settings, e.g. score_low=0.05,0.1; repeated, under all combinations",
    )
    add(
        "--device",
        default="cpu",
        metavar="D",
        help="where PyTorch runs it: cpu, cuda or cuda:N (default: cpu)",
    )
    return parser


def _run(options: argparse.Namespace) -> int:
    options.model = local_model(options.model)
    if not options.model.is_dir():
        import asag_training.evaluation.checkpoint_predictor  # noqa: F401 (says what is missing, first)
    from asag_evaluation.evaluate import evaluate
    from asag_evaluation.report import check_report, table, write_report

    if options.limit is not None and options.limit < 1:
        raise ConfigError(f"--limit is {options.limit}; it must be at least 1")
    if options.changes:
        return _sweep(options)
    check_report(options.output_dir)  # before what may take hours
    notes = list[str]()
    predictor = _predictor(options, notes.append)
    manifest = predictor.detector.manifest
    found = CocoDataset.open(
        options.data, options.split, categories=manifest.categories, orientation=options.orientation
    )
    dataset = found.first(options.limit)
    _print_notes(options, notes, manifest.trained)
    with progress(total=len(dataset), unit="image") as bar:
        evaluation = evaluate(
            predictor.detector,
            dataset,
            proposals=predictor.proposals,
            batch=options.batch,
            on_image=lambda sample, detections: bar.update(),
        )
    if not options.quiet:
        read = _what_was_read(found, dataset)
        print("\n".join([f"{predictor.name} on {options.data} {options.split}", *read, table(evaluation)]))
    if options.output_dir is not None:
        write_report(evaluation, options.output_dir, name=f"{predictor.name}, {options.split}")
    return ALL_FINE


def _sweep(options: argparse.Namespace) -> int:
    """Measure a checkpoint under every combination of settings that `--set` asks for."""
    if options.model.is_dir():
        checkpoints = what_checkpoints(options.model)
        if checkpoints is not None:
            raise CheckpointError(f"'{options.model}' is {checkpoints}")
        raise ConfigError(
            f"'{options.model}' is a bundle, whose settings are in its graphs: give the checkpoint that it "
            "was exported from, or leave --set out"
        )
    from asag_training.evaluation.checkpoint_predictor import evaluated_checkpoint
    from asag_training.evaluation.device import check_device
    from asag_training.evaluation.sweep import evaluate_ways, read_ways
    from asag_training.evaluation.sweep_report import check_sweep, on_screen, sweep_row, write_sweep

    chosen = detector_options(options)
    _check_for_torch(options.model, chosen)
    if chosen.deadline_ms is not None:
        raise ConfigError("--deadline-ms makes figures depend on the machine: leave it out of a --set")
    check_device(options.device)
    check_sweep(options.output_dir)
    notes = list[str]()
    checkpoint = evaluated_checkpoint(options.model, **_reading(options), note=notes.append)
    ways = read_ways(options.changes, checkpoint.config)
    given = {"categories": checkpoint.categories, "orientation": options.orientation}
    found = CocoDataset.open(options.data, options.split, **given)
    dataset = found.first(options.limit)
    _print_notes(options, notes, checkpoint.trained)
    name = f"{checkpoint.config.variant} (torch) on {options.data.resolve().name} {options.split}"
    rows = []
    with progress(total=len(ways) * len(dataset), unit="image") as bar:
        given = {"options": chosen, "batch": options.batch, "device": options.device}
        for way, evaluation in evaluate_ways(checkpoint, ways, dataset, **given, on_image=bar.update):
            rows.append(sweep_row(way, evaluation))
            if options.output_dir is not None:  # what is measured is kept, whatever comes
                write_sweep(rows, options.output_dir, name=name, images=len(dataset))
    if not options.quiet:
        read = _what_was_read(found, dataset)
        print("\n".join([name, *read, "", *on_screen(rows)]))
    return ALL_FINE


def _what_was_read(found: CocoDataset, dataset: CocoDataset) -> list[str]:
    """Return lines about the data that was found, and about how much of it is measured on."""
    part = [] if len(dataset) == len(found) else [f"measured on {len(dataset)} of {len(found)} images"]
    return [found.counts.describe(), *found.remarks(), *part]


def _print_notes(options: argparse.Namespace, notes: Sequence[str], trained: bool) -> None:
    for sentence in notes:
        print(f"{PROGRAM}: note: '{options.model}': {sentence}", file=sys.stderr)
    if not trained:
        print(f"{PROGRAM}: warning: the weights are untrained, so the figures mean nothing", file=sys.stderr)


def _predictor(options: argparse.Namespace, note: Callable[[str], object]) -> Predictor:
    """Load the bundle or the checkpoint (ConfigError for options that do not go together)."""
    from asag_evaluation.predictor import bundle_predictor

    path, chosen = options.model, detector_options(options)
    for name in ("shorter_side", "longer_side"):
        side = getattr(options, name)
        if side is not None and side < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {side} is no image size: expected 1 pixel or more")
    checkpoints = what_checkpoints(path) if path.is_dir() else None
    if checkpoints is not None:
        raise CheckpointError(f"'{path}' is {checkpoints}")
    if not path.is_dir():
        return _checkpoint_predictor(path, chosen, options, note)
    of_checkpoints = (options.head, options.weights, options.shorter_side, options.longer_side)
    if any(value is not None for value in of_checkpoints) or options.device != "cpu":
        raise ConfigError(
            f"'{path}' is a bundle, whose head, weights, image size and device are decided: leave them out"
        )
    if chosen.backend == TORCH:
        raise ConfigError(f"'{path}' is a bundle, which PyTorch does not run: leave the backend out")
    check_runs_here(chosen.backend)
    return bundle_predictor(Bundle.open(path), chosen)


def _checkpoint_predictor(
    path: Path, chosen: DetectorOptions, options: argparse.Namespace, note: Callable[[str], object]
) -> Predictor:
    _check_for_torch(path, chosen)
    from asag_training.evaluation.checkpoint_predictor import checkpoint_predictor

    return checkpoint_predictor(path, chosen, device=options.device, **_reading(options), note=note)


def _check_for_torch(path: Path, chosen: DetectorOptions) -> None:
    """Raise ConfigError for options that PyTorch has no use for."""
    if chosen.backend not in (None, TORCH):
        raise ConfigError(
            f"'{path}' is a checkpoint, which only PyTorch runs, not {chosen.backend}: export it, "
            "or leave the backend out"
        )
    if chosen.threads is not None or chosen.requests != 1:
        raise ConfigError(
            f"'{path}' is a checkpoint, and --threads and --requests are for bundles: leave them out, and "
            "set OMP_NUM_THREADS if PyTorch is to have fewer threads"
        )


def _reading(options: argparse.Namespace) -> dict[str, Any]:
    """Return how a checkpoint is to be read."""
    return {
        "head": options.head,
        "weights": options.weights or "model",
        "shorter_side": options.shorter_side,
        "longer_side": options.longer_side,
        "classes": lambda: CocoDataset.open(options.data, options.split).categories,
    }


if __name__ == "__main__":
    sys.exit(main())
