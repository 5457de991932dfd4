"""`scripts/gpu_machine.py`: everything that takes an NVIDIA GPU, in one go, with one report."""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from asag_bench.gpu_machine.archive import make_archive, unpack_archive
from asag_bench.gpu_machine.plan import begin, plan
from asag_bench.gpu_machine.report import NAME, write_report
from asag_bench.gpu_machine.steps import Result, Step, run_steps
from asag_bench.gpu_machine.work import ROOT, Work
from asag_bench.measuring.machine import describe_machine
from asag_deploy.command_line import ALL_FINE, SOME_FAILED, OneSentenceParser, exit_code
from asag_deploy.cuda import open_cuda, why_no_cuda
from asag_deploy.errors import BackendError, ConfigError, Problem

PROGRAM = NAME
_LEAST_SECONDS = 30.0
_TO_END = 8.0
"""Seconds that are kept for ending what still runs."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run it and return the exit code.

    0: nothing failed; 1: something did; 2: nothing could be done, with the reason in one sentence on stderr.
    """
    return exit_code(PROGRAM, lambda: _command(_parser().parse_args(argv)))


def _parser() -> argparse.ArgumentParser:
    parser = OneSentenceParser(
        prog=PROGRAM, description="Check and time everything that takes an NVIDIA GPU."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    run = commands.add_parser("run", help="on the machine with the GPU: all steps, with one report")
    add = run.add_argument
    add("--output-dir", metavar="DIR", type=Path, default=Path("gpu-report"), help="default %(default)s")
    add("--carried", metavar="FILE", type=Path, help="the archive that `archive` made")
    add("--seconds", metavar="S", type=float, default=480.0, help="for all of it (default: 480)")
    add("--work-dir", metavar="DIR", type=Path, help="for what is made on the way (default: a temporary one)")
    add("--only", metavar="TEXT", action="append", default=[], help="only steps with this in their name")
    add("--rehearse", action="store_true", help="without a GPU: do whatever does not need one")
    run.set_defaults(run=_run)

    archive = commands.add_parser("archive", help="anywhere with a network: what to carry to that machine")
    add = archive.add_argument
    default = Path("build/gpu-packages.tar.xz")
    add("--output", metavar="FILE", type=Path, default=default, help="default %(default)s")
    add(
        "--wheel", metavar="FILE", type=Path, action="append", default=[], help="default: downloaded with pip"
    )
    add("--gpu", metavar="SM", default="sm90", help="whose machine code is kept (default %(default)s)")
    add("--python", metavar="V", default="3.12", help="that machine's Python (default %(default)s)")
    add("--limit-mib", metavar="N", type=float, default=64.0, help="with the tree (default: 64)")
    archive.set_defaults(run=_archive)
    return parser


def _command(options: argparse.Namespace) -> int:
    return int(options.run(options))


def _archive(options: argparse.Namespace) -> int:
    digits = options.gpu.removeprefix("sm")
    if not digits.isdecimal():
        raise ConfigError(f"--gpu is '{options.gpu}'; expected a compute capability, such as sm90")
    carried = make_archive(
        options.output,
        ROOT,
        wheels=options.wheel,
        gpu=int(digits),
        limit_mib=options.limit_mib,
        python=options.python,
    )
    print(f"{options.output}: {carried}, of at most {options.limit_mib:g} MiB")
    print(f"carry the tree and this file; there: python scripts/{PROGRAM}.py run --carried {options.output}")
    return ALL_FINE


def _run(options: argparse.Namespace) -> int:
    if not options.seconds >= _LEAST_SECONDS:
        raise ConfigError(f"--seconds is {options.seconds:g}; expected at least {_LEAST_SECONDS:g}")
    end = time.monotonic() + options.seconds - _TO_END
    problem = why_no_cuda()
    if problem is not None and not options.rehearse:
        raise BackendError(f"there is nothing to check without a GPU: {problem} (--rehearse does the rest)")
    with tempfile.TemporaryDirectory(prefix=f"{PROGRAM}-") as temporary:
        folder = (options.work_dir or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        packages = unpack_archive(options.carried, folder) if options.carried else {}
        work = Work(folder=folder, gpu=None, no_gpu=str(problem or ""), packages=packages)
        machine = describe_machine() | _describe_gpu(work, problem)
        steps = chosen(plan(work), options.only)
        return _do(work, machine, options.output_dir, steps, end)


def chosen(steps: Sequence[Step], words: Sequence[str]) -> list[Step]:
    """The steps with one of the words in their name, after the kernels that they need; all without words.

    Raises ConfigError if that leaves none.
    """
    found = [step for step in steps[1:] if not words or any(word in step.name for word in words)]
    if not found:
        names = ", ".join(step.name for step in steps[1:])
        raise ConfigError(f"no step has '{words[0]}' in its name; the steps are: {names}")
    return [steps[0], *found]


def _do(work: Work, machine: dict[str, Any], output: Path, steps: Sequence[Step], end: float) -> int:
    output.mkdir(parents=True, exist_ok=True)

    def report(results: Sequence[Result]) -> None:
        write_report(output, machine, results, work.logs.parts)

    report([])
    begin(work)
    try:
        results = run_steps(steps, end, report)
    finally:
        work.close()
    counts = {state: sum(r.state == state for r in results) for state in ("passed", "failed", "skipped")}
    told = ", ".join(f"{number} {state}" for state, number in counts.items())
    print(f"{told}; {output / NAME}.md, .json and .log")
    return SOME_FAILED if counts["failed"] else ALL_FINE


def _describe_gpu(work: Work, problem: Problem | None) -> dict[str, Any]:
    """The GPU, as the driver describes it; `work` gets its compute capability."""
    carried = {"carried": sorted(work.packages)} if work.packages else {}
    if problem is not None:
        return {"gpu": f"no GPU: {problem}", **carried}
    cuda = open_cuda()
    work.gpu = cuda.capability
    driver, runtime = cuda.versions()
    versions = {"driver_cuda": driver, "runtime_cuda": runtime, "kernel": platform.release()}
    return {"gpu": f"{cuda.name} ({cuda.capability})", **versions, **carried}


if __name__ == "__main__":
    sys.exit(main())
