"""`asag-bench`: what a bundle costs on this machine, by exit level, and against its peers."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from asag_bench.bench import run
from asag_bench.measuring.plan import Plan
from asag_bench.reports.plots import check_plots, write_plots
from asag_bench.reports.report import markdown, on_screen
from asag_bench.runners.peers import PEERS
from asag_deploy.atomic import atomic_write
from asag_deploy.backends import DEFAULT_BACKEND
from asag_deploy.command_line import OneSentenceParser, exit_code
from asag_deploy.errors import ConfigError

PROGRAM = "asag-bench"
_LIST: dict[str, Any] = {"action": "append", "default": []}
"""An option that takes several values, with commas or by giving it again."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `asag-bench` with these arguments (None: the command line's) and return its exit code.

    0: measured, stable or not; 2: nothing could be measured, with the reason in one sentence on stderr; 130:
    interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = f"{PROGRAM} {shlex.join(arguments)}"
    return exit_code(PROGRAM, lambda: _run(_parser().parse_args(arguments), command))


def _parser() -> argparse.ArgumentParser:
    parser = OneSentenceParser(
        prog=PROGRAM,
        description="Measure what a bundle costs on this machine, by exit level, and against its peers.",
        epilog="Peers: " + "; ".join(f"{name}, {text}" for name, text in PEERS.items()) + ".",
    )
    add = parser.add_argument
    add("bundles", type=Path, nargs="+", metavar="BUNDLE", help="a bundle's folder; several of one network")
    add("--images", type=Path, metavar="DIR", help="pictures to time (default: generated scenes)")
    add("--data", type=Path, metavar="DIR", help="a data set in COCO layout: pictures to time, and its AP")
    add("--limit", type=int, metavar="N", help="use the first N pictures only")
    add("--shape", metavar="HxW", help="pictures of this height and width: generated or resized before")
    add("--backend", **_LIST, metavar="B,...", help="what runs the bundles (default: onnxruntime)")
    add("--precision", **_LIST, metavar="P,...", help="only these of fp32, fp16, bf16, int8 (default: all)")
    add("--batch", **_LIST, metavar="N,...", help="images a call (default: 1)")
    add("--peer", **_LIST, metavar="NAME,...", help="compare with these, listed below")
    add("--reference", metavar="NAME", help="say how many times as fast as it (default: torch, or the first)")
    add("--checkpoint", type=Path, metavar="FILE", help="what the bundle was made from, for PyTorch peers")
    add("--mode", choices=("exact", "fast"), help="how far to probe (default: as the bundle was exported)")
    add("--threads", type=int, metavar="N", help="CPU threads (default: each library's choice)")
    add("--duration", type=float, default=60.0, metavar="S", help="most seconds a row block (default: 60)")
    add("--warmup", type=int, default=3, metavar="N", help="calls of each shape before (default: 3)")
    add("--percentile", default="50,90,95,99", metavar="P,...", help="(default: 50,90,95,99)")
    add(
        "--output-dir",
        "--output",
        type=Path,
        metavar="DIR",
        help="write result.json, result.md and plots to DIR",
    )
    add("--no-plots", action="store_true", help="no plots beside result.json and result.md")
    add("--quiet", action="store_true", help="no progress and no table")
    return parser


def _run(options: argparse.Namespace, command: str) -> int:
    plan = _plan(options, command)
    if options.output_dir is not None and not options.no_plots:
        check_plots()
    result = run(plan)
    if options.output_dir is not None:
        with atomic_write(options.output_dir / "result.json") as temporary:
            temporary.write_text(json.dumps(result, allow_nan=False, indent=1) + "\n", encoding="utf-8")
        with atomic_write(options.output_dir / "result.md") as temporary:
            temporary.write_text(markdown(result), encoding="utf-8")
        if not options.no_plots:
            write_plots(result, options.output_dir)
    if not options.quiet:
        print(on_screen(result))
    return 0


def _plan(options: argparse.Namespace, command: str) -> Plan:
    return Plan(
        command=command,
        bundles=tuple(dict.fromkeys(options.bundles)),
        images=options.images,
        data=options.data,
        limit=options.limit,
        shape=None if options.shape is None else parse_shape(options.shape),
        backends=_listed(options.backend) or (DEFAULT_BACKEND,),
        precisions=_listed(options.precision),
        batches=_batches(options.batch),
        peers=_listed(options.peer),
        reference=options.reference,
        checkpoint=options.checkpoint,
        mode=options.mode,
        threads=options.threads,
        duration=options.duration,
        warmup=options.warmup,
        percentiles=_percentiles(options.percentile),
        quiet=options.quiet,
    )


def _listed(values: Sequence[str]) -> tuple[str, ...]:
    """An option's values, each once, whether given with commas or by giving the option again."""
    return tuple(dict.fromkeys(part for value in values for part in value.split(",")))


def _batches(values: Sequence[str]) -> tuple[int, ...]:
    listed = _listed(values) or ("1",)
    try:
        return tuple(int(value) for value in listed)
    except ValueError:
        raise ConfigError(f"--batch is '{','.join(listed)}'; expected whole numbers, such as 1,4") from None


def parse_shape(text: str) -> tuple[int, int]:
    """Height and width of `800x1088`; raises ConfigError for what is none."""
    height, _, width = text.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise ConfigError(f"--shape is '{text}'; expected height x width in pixels, such as 800x1088")
    return int(height), int(width)


def _percentiles(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(0 <= value <= 100 for value in values):
        raise ConfigError(f"--percentile is '{text}'; expected numbers from 0 to 100, such as 50,90,99")
    return values


if __name__ == "__main__":
    sys.exit(main())
