"""`asag-bench`: what a bundle costs on this machine, by exit level, and against its peers."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from asag_bench.bench import Plan, run
from asag_bench.peers import PEERS, check_peers
from asag_bench.plots import check_plots, write_plots
from asag_bench.report import markdown, on_screen
from asag_deploy._version import __version__
from asag_deploy.atomic import atomic_write
from asag_deploy.backends import DEFAULT_BACKEND
from asag_deploy.command_line import OneSentenceParser, exit_code
from asag_deploy.errors import ConfigError

PROGRAM = "asag-bench"


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
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("bundle", type=Path, metavar="BUNDLE", help="the bundle's folder")
    add("--images", type=Path, metavar="DIR", help="pictures to time (default: generated scenes)")
    add("--data", type=Path, metavar="DIR", help="a data set in COCO layout: pictures to time, and its AP")
    add("--limit", type=int, metavar="N", help="use the first N pictures only")
    add("--backend", action="append", metavar="B", help="what runs the bundle; may be given again")
    add("--batch", type=int, action="append", metavar="N", help="images a call, 1 if not given; also again")
    add("--peer", action="append", default=[], metavar="NAME", help="compare with it; may be given again")
    add("--checkpoint", type=Path, metavar="FILE", help="what the bundle was made from, for PyTorch peers")
    add("--mode", choices=("exact", "fast"), help="how far to probe (default: as the bundle was exported)")
    add("--threads", type=int, metavar="N", help="CPU threads (default: each library's choice)")
    add("--duration", type=float, default=60.0, metavar="S", help="most seconds a row block (default: 60)")
    add("--warmup", type=int, default=3, metavar="N", help="calls of each shape before (default: 3)")
    add("--percentile", default="50,90,95,99", metavar="P,...", help="(default: 50,90,95,99)")
    add("--output-dir", type=Path, metavar="DIR", help="write result.json, result.md and plots to DIR")
    add("--quiet", action="store_true", help="no progress and no table")
    add("--version", action="version", version=f"{PROGRAM} {__version__}")
    return parser


def _run(options: argparse.Namespace, command: str) -> int:
    plan = _plan(options, command)
    check_peers(plan.peers, plan.checkpoint)
    if options.output_dir is not None:
        check_plots()
    result = run(plan)
    if options.output_dir is not None:
        with atomic_write(options.output_dir / "result.json") as temporary:
            temporary.write_text(json.dumps(result, allow_nan=False, indent=1) + "\n", encoding="utf-8")
        with atomic_write(options.output_dir / "result.md") as temporary:
            temporary.write_text(markdown(result), encoding="utf-8")
        write_plots(result, options.output_dir)
    if not options.quiet:
        print(on_screen(result))
    return 0


def _plan(options: argparse.Namespace, command: str) -> Plan:
    return Plan(
        command=command,
        bundle=options.bundle,
        images=options.images,
        data=options.data,
        limit=options.limit,
        backends=tuple(dict.fromkeys(options.backend or [DEFAULT_BACKEND])),
        batches=tuple(dict.fromkeys(options.batch or [1])),
        peers=tuple(dict.fromkeys(options.peer)),
        checkpoint=options.checkpoint,
        mode=options.mode,
        threads=options.threads,
        duration=options.duration,
        warmup=options.warmup,
        percentiles=_percentiles(options.percentile),
        quiet=options.quiet,
    )


def _percentiles(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(0 <= value <= 100 for value in values):
        raise ConfigError(f"--percentile is '{text}'; expected numbers from 0 to 100, such as 50,90,99")
    return values
