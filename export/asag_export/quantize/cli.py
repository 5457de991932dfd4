"""`asag-quantize`: quantise a float32 bundle to INT8 from the command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from asag_deploy.atomic import check_spares
from asag_deploy.backends import BACKENDS, DEFAULT_BACKEND, check_runs_here
from asag_deploy.bundle.bundle import Bundle, check_bundle_place
from asag_deploy.command_line import (
    OneSentenceParser,
    exit_code,
    printable,
    progress,
    real_number,
    whole_number,
)
from asag_deploy.errors import ConfigError, ParityError
from asag_evaluation.data.coco import TRAIN_SPLIT, VAL_SPLIT, CocoDataset
from asag_evaluation.data.orientation import add_orientation_option
from asag_export.quantize.calibration import DEFAULT_COUNT, check_count, choose, image_files, read_pictures
from asag_export.quantize.cost import (
    ACTIVATIONS,
    DEFAULT_MOST_LOSS,
    RESULTS,
    check_measurable,
    format_quantization,
)

PROGRAM = "asag-quantize"

EXIT_COST = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run `asag-quantize` and return its exit code: 0, 1 if it costs too much, 2 for any other error."""
    return exit_code(PROGRAM, lambda: _run(_parser().parse_args(argv)), {ParityError: EXIT_COST})


def _parser() -> argparse.ArgumentParser:
    parser = OneSentenceParser(
        prog=PROGRAM,
        description="Quantise a float32 bundle to INT8, calibrated on pictures.",
        epilog=f"With --data alone it calibrates on {TRAIN_SPLIT} and measures AP on {VAL_SPLIT}.",
    )
    add = parser.add_argument
    add(
        "bundle",
        metavar="BUNDLE",
        type=Path,
        help="the folder that asag-export has written, or its address",
    )
    add("--output-dir", metavar="DIR", type=Path, required=True, help="where the INT8 bundle is written")
    add("--images", metavar="PATH", nargs="+", help="folders, globs or files to calibrate on")
    add("--data", metavar="DIR", type=Path, help="a data set in COCO layout: AP before and after is measured")
    add("--calibration-split", metavar="NAME", help=f"default {TRAIN_SPLIT}")
    add("--split", metavar="NAME", help=f"what AP is measured on (default {VAL_SPLIT})")
    add_orientation_option(parser)
    add(
        "--count",
        metavar="N",
        type=whole_number(1),
        default=DEFAULT_COUNT,
        help="pictures (default %(default)s)",
    )
    add("--limit", metavar="N", type=whole_number(1), help="measure AP on the first N images only")
    kinds = "int8, for every runtime (default), or uint8, faster in ONNX Runtime but not for TensorRT"
    add("--activations", metavar="KIND", default=ACTIVATIONS[0], help=kinds)
    backends = f"what measures AP; may be repeated (default {DEFAULT_BACKEND})"
    add("--backend", metavar="NAME", dest="backends", action="append", help=backends)
    add(
        "--max-loss",
        metavar="AP",
        type=real_number(0, 1),
        default=DEFAULT_MOST_LOSS,
        help="the greatest fall of AP, 0 to 1 (default %(default)s)",
    )
    add("--overwrite", action="store_true", help="replace a bundle that is already there")
    add("--keep-failed", action="store_true", help="keep a bundle that costs too much")
    add("--quiet", action="store_true", help="no progress and no table")
    return parser


def _run(options: argparse.Namespace) -> int:
    _check(options)
    from asag_export.quantize.bundle_quantization import check_quantizable, quantize_bundle

    bundle = Bundle.open(options.bundle)
    check_quantizable(bundle)
    check_spares(options.output_dir, bundle.path)
    check_bundle_place(options.output_dir, overwrite=options.overwrite)
    data = _open_data(options, options.split or VAL_SPLIT, bundle, options.limit) if options.data else None
    for remark in [] if data is None or options.quiet else data.remarks():
        print(printable(remark))
    files = choose(_files(options, bundle), options.count)
    backends = options.backends or [DEFAULT_BACKEND]
    steps = (1 + len(RESULTS)) * len(files) + (2 * len(backends) * len(data) if data is not None else 0)
    with progress(total=steps, unit="picture", quiet=options.quiet) as bar:

        def step(description: str) -> None:
            bar.set_description(description, refresh=False)
            bar.update()

        pictures = read_pictures(files, bundle.manifest.preprocessing, lambda: step("reading"))
        result = quantize_bundle(
            bundle,
            options.output_dir,
            pictures,
            activations=options.activations,
            data=data,
            backends=backends,
            most_loss=options.max_loss,
            overwrite=options.overwrite,
            keep_failed=options.keep_failed,
            progress=step,
        )
    if not options.quiet:
        print(format_quantization(result.report))
        print(f"{options.output_dir}: {result.bundle.manifest.variant}, int8, ready for asag-detect")
    if result.report.failures():
        raise ParityError(f"the bundle at '{options.output_dir}' was kept although quantising costs too much")
    return 0


def _check(options: argparse.Namespace) -> None:
    """Refuse bad options before anything is read, and minutes before they are needed."""
    if options.images is None and options.data is None:
        raise ConfigError("there is nothing to calibrate on; give --images PATH or --data DIR")
    if options.images is not None and options.calibration_split is not None:
        raise ConfigError("--images is what is calibrated on: leave --calibration-split out")
    of_data = {"--split": options.split, "--limit": options.limit, "--backend": options.backends}
    for option, value in of_data.items():
        if options.data is None and value is not None:
            raise ConfigError(f"{option} is for measuring AP: give --data DIR too, or leave it out")
    if options.activations not in ACTIVATIONS:
        raise ConfigError(
            f"unknown activations '{options.activations}'; choose one of {', '.join(ACTIVATIONS)}"
        )
    check_count(options.count)
    unknown = [name for name in options.backends or () if name not in BACKENDS]
    if unknown:
        raise ConfigError(f"unknown backend '{unknown[0]}'; choose one of {', '.join(BACKENDS)}")
    for name in options.backends or ():
        check_runs_here(name)
    if options.data is not None:
        check_measurable()


def _files(options: argparse.Namespace, bundle: Bundle) -> list[Path]:
    """List the pictures to calibrate on."""
    if options.images is not None:
        return image_files(options.images)
    calibration = _open_data(options, options.calibration_split or TRAIN_SPLIT, bundle, None)
    return [calibration.path(i) for i in range(len(calibration))]


def _open_data(options: argparse.Namespace, split: str, bundle: Bundle, limit: int | None) -> CocoDataset:
    """Open a split of a data set with the bundle's classes, or its first `limit` images; raises DataError."""
    data = CocoDataset.open(
        options.data, split, categories=bundle.manifest.categories, orientation=options.orientation
    )
    return data.first(limit)


if __name__ == "__main__":
    sys.exit(main())
