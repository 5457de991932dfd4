"""`asag-build`: build engines of a bundle's graphs from the command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from asag_deploy.bundle.bundle import Bundle
from asag_deploy.command_line import (
    OneSentenceParser,
    exit_code,
    progress,
    whole_number,
)
from asag_deploy.engines.adapter import FORMATS
from asag_deploy.engines.build import COMPATIBILITIES, BuildOptions, BuildReport, build_engines, summary
from asag_deploy.engines.shapes import Batches
from asag_deploy.engines.targets import DEFAULT_CAPABILITIES
from asag_deploy.processing.canvases import parse_canvas

PROGRAM = "asag-build"


def main(argv: Sequence[str] | None = None) -> int:
    """Run `asag-build` and return its exit code: 0, or 2 with one sentence on stderr."""
    return exit_code(PROGRAM, lambda: _run(_parser().parse_args(argv)))


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for building engines, which `asag-export` has too."""
    group = parser.add_argument_group("engines")
    add = group.add_argument
    add(
        "--gpu",
        dest="gpus",
        metavar="SM",
        action="append",
        default=[],
        help="a compute capability, such as sm86; may be repeated (default: this machine's GPU, or "
        f"{', '.join(DEFAULT_CAPABILITIES)})",
    )
    add("--shared", action="store_true", help="one engine for all --gpu instead of one for each")
    add(
        "--max-batch",
        metavar="N",
        type=whole_number(1),
        default=4,
        help="most images at once (default %(default)s)",
    )
    add(
        "--usual-batch",
        metavar="N",
        type=whole_number(1),
        default=1,
        help="what to optimise for (default %(default)s)",
    )
    add(
        "--canvas",
        dest="canvases",
        metavar="HxW",
        action="append",
        default=[],
        help="also engines of exactly this shape, such as 800x1088: single images that it holds are padded "
        "to it, and others go by the engines of every shape; may be repeated",
    )
    add(
        "--canvases",
        dest="usual_canvases",
        choices=("default", "none"),
        default="none",
        help="default: also engines for a square, 4:3, 3:2 and the longest images; each canvas repeats the "
        "weights on the GPU (default %(default)s)",
    )
    add("--tf32", action="store_true", help="let float32 products lose 13 bits of mantissa, for speed")
    add(
        "--optimization-level", metavar="N", type=whole_number(0, 5), help="0 (quick build) to 5 (slow build)"
    )
    add(
        "--plugins", metavar="FILE", type=Path, help="tensorrt: the library of plugins, see plugins/README.md"
    )
    levels = ", ".join(COMPATIBILITIES)
    add("--compatibility", metavar="NAME", default="none", help=f"tensorrt: {levels} (default %(default)s)")
    add("--version-compatible", action="store_true", help="tensorrt: engines that later releases load too")


def given_engine_options(options: argparse.Namespace) -> list[str]:
    """Return the options of `add_engine_options` that were given, but for those given as they are anyway."""
    parser = OneSentenceParser()
    add_engine_options(parser)
    return [
        action.option_strings[0]
        for action in parser._actions
        if hasattr(options, action.dest) and getattr(options, action.dest) != action.default
    ]


def engine_options(
    options: argparse.Namespace, *, engine_format: str, precision: str | None, force: bool = False
) -> BuildOptions:
    """Turn the options of `add_engine_options` into BuildOptions.  Raises ConfigError for bad ones."""
    return BuildOptions(
        engine_format=engine_format,
        gpus=tuple(options.gpus),
        shared=options.shared,
        precision=precision,
        batches=Batches(usual=options.usual_batch, most=options.max_batch),
        canvases=tuple(parse_canvas(text) for text in options.canvases),
        usual_canvases=options.usual_canvases == "default",
        tf32=options.tf32,
        optimization_level=options.optimization_level,
        plugins=options.plugins,
        compatibility=options.compatibility,
        version_compatible=options.version_compatible,
        force=force,
    )


def build_with_progress(bundle: Bundle, options: BuildOptions, *, quiet: bool) -> BuildReport:
    """Call `build_engines` with a progress bar on stderr, if that is a terminal."""
    with progress(unit="engine", quiet=quiet) as bar:

        def step(description: str, done: int, total: int) -> None:
            bar.total = total
            bar.set_description(description)
            bar.update(done - bar.n)

        return build_engines(bundle, options, progress=step)


def _run(options: argparse.Namespace) -> int:
    wanted = engine_options(
        options, engine_format=options.format, precision=options.precision, force=options.force
    )
    bundle = Bundle.open(options.bundle)
    report = build_with_progress(bundle, wanted, quiet=options.quiet)
    if not options.quiet:
        print("\n".join(summary(report, bundle, options.bundle)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = OneSentenceParser(
        prog=PROGRAM,
        description="Compile the graphs of a bundle to TensorRT engines, in the bundle's folder engines/.",
        epilog="With tensorrt-rtx no GPU is needed; with tensorrt it takes the GPU that the engines are for.",
    )
    add = parser.add_argument
    add(
        "bundle",
        metavar="BUNDLE",
        type=Path,
        help="the folder that asag-export has written, or its address",
    )
    formats = " or ".join(FORMATS)
    add("--format", metavar="NAME", default=FORMATS[0], help=f"{formats} (default %(default)s)")
    add("--precision", metavar="NAME", help="fp32, fp16 or int8: fail unless the bundle is in it")
    add("--force", action="store_true", help="build also the engines that are current")
    add("--quiet", action="store_true", help="no progress and no summary")
    add_engine_options(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
