"""`asag-bench gpu run`: everything that takes an NVIDIA GPU, in one go, with one report.

It compiles the kernels for this GPU, runs the checks and the tests that are marked `gpu`, times with
`asag-bench`, and writes `gpu_machine.json`, `.md` and `.log` after every step.  A step that cannot be done
says why; the others go on.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from asag_bench.gpu_machine.archive import unpack_archive
from asag_bench.gpu_machine.plan import begin, plan
from asag_bench.gpu_machine.report import NAME, write_report
from asag_bench.gpu_machine.steps import Result, Step, run_steps
from asag_bench.gpu_machine.work import ROOT, Work
from asag_bench.measuring.machine import describe_machine
from asag_bench.result import to_json
from asag_deploy.cuda import open_cuda, why_no_cuda
from asag_deploy.errors import BackendError, ConfigError, Problem
from asag_deploy.scratch import scratch_folder

_LEAST_SECONDS = 30.0
_TO_END = 8.0
"""Seconds that are kept for ending what still runs."""


def run_all(
    output_dir: Path,
    *,
    carried: Path | None = None,
    seconds: float = 480.0,
    work_dir: Path | None = None,
    only: Sequence[str] = (),
    rehearse: bool = False,
    command: str = "",
) -> bool:
    """Do all steps in so many seconds, and write the report; return whether one failed.

    carried: the archive of packages that the machine lacks.  only: words, of which a step's name has to hold
    one.  rehearse: without a GPU, do whatever does not need one.  command: what was typed, for the report.

    Raises BackendError where there is nothing to check, ConfigError for options that make no sense.
    """
    if not seconds >= _LEAST_SECONDS:
        raise ConfigError(f"--seconds is {seconds:g}; expected at least {_LEAST_SECONDS:g}")
    end = time.monotonic() + seconds - _TO_END
    problem = why_no_cuda()
    if problem is not None and not rehearse:
        raise BackendError(f"there is nothing to check without a GPU: {problem} (--rehearse does the rest)")
    with scratch_folder() as temporary:
        folder = (work_dir or temporary).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        packages = unpack_archive(carried, folder) if carried else {}
        work = Work(folder=folder, gpu=None, no_gpu=str(problem or ""), packages=packages)
        machine = {"command": command} | to_json(describe_machine()) | _describe_gpu(work, problem)
        return _do(work, machine, output_dir, chosen(plan(work), only), end)


def chosen(steps: Sequence[Step], words: Sequence[str]) -> list[Step]:
    """Return the steps with one of the words in their name, after the kernels that they need.

    Without words these are all.

    Raises ConfigError if that leaves none.
    """
    found = [step for step in steps[1:] if not words or any(word in step.name for word in words)]
    if not found:
        names = ", ".join(step.name for step in steps[1:])
        raise ConfigError(f"no step has '{words[0]}' in its name; the steps are: {names}")
    return [steps[0], *found]


def _do(work: Work, machine: dict[str, Any], output: Path, steps: Sequence[Step], end: float) -> bool:
    output.mkdir(parents=True, exist_ok=True)

    def report(results: Sequence[Result]) -> None:
        write_report(output, machine, results, work.logs.parts, {str(work.folder): "WORK", str(ROOT): "."})

    report([])
    begin(work, steps)
    try:
        results = run_steps(steps, end, report)
    finally:
        work.close()
    counts = {state: sum(r.state == state for r in results) for state in ("passed", "failed", "skipped")}
    told = ", ".join(f"{number} {state}" for state, number in counts.items())
    print(f"{told}; {output / NAME}.md, .json and .log")
    return counts["failed"] > 0


def _describe_gpu(work: Work, problem: Problem | None) -> dict[str, Any]:
    """Return the GPU as the driver describes it; `work` gets its compute capability."""
    carried = {"carried": sorted(work.packages)} if work.packages else {}
    if problem is not None:
        return {"gpu": f"no GPU: {problem}", **carried}
    cuda = open_cuda()
    work.gpu = cuda.capability
    driver, runtime = cuda.versions()
    versions = {"driver_cuda": driver, "runtime_cuda": runtime, "kernel": platform.release()}
    return {"gpu": f"{cuda.name} ({cuda.capability})", **versions, **carried}
