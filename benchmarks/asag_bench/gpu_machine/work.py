"""What every step works with: the tree, a folder for what is made, the GPU, and programs of this Python."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from asag_bench.gpu_machine.programs import WARNINGS, Logs, Program, last_lines, start
from asag_bench.gpu_machine.steps import Skip
from asag_bench.result import Result, read_result, to_json
from asag_deploy.errors import BackendError
from asag_deploy.kernels import LIBRARY_VARIABLE

ROOT = Path(__file__).resolve().parents[3]
"""The source tree: nothing is installed, all is found by PYTHONPATH."""
_IMPORTED_FROM = (".", "training", "export", "benchmarks", "tests", "tests/reference")
BUILD_VARIABLE = "ASAG_KERNELS_BUILD"
"""A folder in which `plugins/` has been compiled, which the tests then do not do again."""
ONNXRUNTIME = "onnxruntime-gpu"
"""A package that takes the place of another, and so is given to those programs only that are about it."""
_COUNT = re.compile(r"(\d+) (passed|failed|skipped|error|errors)\b")
_REASON = re.compile(r"^SKIPPED \[\d+\] [^:]+(?::\d+)?: (.*)$", re.MULTILINE)


@dataclass(kw_only=True)
class Work:
    """The machine and the folders of one run."""

    folder: Path
    """For what is made on the way: the kernels, bundles, scenes."""
    gpu: str | None
    """Its compute capability, such as `sm90`; None in a rehearsal without one."""
    no_gpu: str = ""
    """Why there is none, in that case."""
    packages: dict[str, Path] = field(default_factory=dict)
    """What was carried, by name."""
    logs: Logs = field(default_factory=Logs)
    background: dict[str, Program] = field(default_factory=dict)
    """What is being made while the steps run."""
    _count: int = 0

    @property
    def build(self) -> Path:
        """Where the kernels are compiled."""
        return self.folder / "kernels"

    def need_gpu(self) -> None:
        """Skip a step that cannot be rehearsed without a GPU."""
        if self.gpu is None:
            raise Skip(f"no GPU: {self.no_gpu}")

    def start(
        self,
        command: Sequence[str | Path],
        *,
        packages: Sequence[str] = (),
        beside: tuple[int, int] | None = None,
    ) -> Program:
        """Start a program in the tree; `packages` are carried ones that it is to have as well.

        beside: on the cores that the steps leave, as which of how many that are made in the background.
        """
        self._count += 1
        return start(
            command,
            log=self.folder / f"output-{self._count}.txt",
            logs=self.logs,
            cwd=ROOT,
            environment=self._environment(packages),
            cores=_cores(beside),
        )

    def run(self, command: Sequence[str | Path], limit: float, packages: Sequence[str] = ()) -> str:
        """Run a program; return its output.

        Raises BackendError if it fails or takes longer than `limit` seconds.
        """
        program = self.start(command, packages=packages)
        return program.wait(limit)

    def python(self, module: str, *arguments: str | Path) -> list[str | Path]:
        """Return the command that runs a module of the tree."""
        return [sys.executable, *WARNINGS, "-m", module, *arguments]

    def asag_bench(self, *arguments: str | Path) -> list[str | Path]:
        """Return the command that runs the tree's `asag-bench`."""
        return [sys.executable, *WARNINGS, ROOT / "benchmarks", *arguments]

    def tests(self, file: str, limit: float, packages: Sequence[str] = ()) -> dict[str, Any]:
        """Run the tests of a file that are marked `gpu`; skipped, with the reason, if all of them are."""
        options = ["-m", "gpu", "-v", "-rs", "--tb=short", "-W", "default", "-p", "no:cacheprovider"]
        options += ["-o", f"faulthandler_timeout={max(limit - 10, 5):.0f}"]
        text = self.run(self.python("pytest", *options, file), limit, packages)
        counts = {state.rstrip("s"): int(number) for number, state in _COUNT.findall(last_lines(text, 1))}
        reasons = list(dict.fromkeys(_REASON.findall(text)))
        if not counts.get("passed"):
            raise Skip("; ".join(reasons) or "no test ran")
        return {"detail": last_lines(text, 1).strip("= "), "counts": counts, "skipped": reasons}

    def made(self, name: str, limit: float) -> Path:
        """Return what is made in the background under that name, once it is there.

        Raises BackendError if that fails, or is not done by then: it goes on for the steps that follow.
        """
        program = self.background.get(name)
        if program is not None and not program.ends_within(limit):
            raise BackendError(f"'{name}' is still being made after {limit:.0f} s of waiting")
        if program is not None:
            del self.background[name]
            program.wait(0)
        if not (self.folder / name).exists():
            raise BackendError(f"'{name}' could not be made, as said where it was first asked for")
        return self.folder / name

    def bench(
        self, arguments: Sequence[str | Path], limit: float, packages: Sequence[str] = ()
    ) -> dict[str, Any]:
        """Run `asag-bench run`; its page goes into the report."""
        output = self.folder / f"bench-{self._count}"
        fixed: list[str | Path] = ["--output-dir", output, "--no-plots", "--quiet"]
        self.run(self.asag_bench("run", *arguments, *fixed), limit, packages)
        result = read_result(output / "result.json")
        page = (output / "result.md").read_text(encoding="utf-8")
        return {
            "detail": _medians(result),
            "result": to_json(result),
            "page": f"\n{page}".replace("\n#", "\n##"),
        }

    def close(self) -> None:
        """End what is still being made."""
        for program in self.background.values():
            program.stop(grace=0)
        self.background.clear()

    def _environment(self, packages: Sequence[str]) -> dict[str, str]:
        carried = [path for name, path in self.packages.items() if name != ONNXRUNTIME or name in packages]
        folders = [*carried, *(ROOT / name for name in _IMPORTED_FROM)]
        library = self.build / "libasag_kernels.so"
        kernels = (
            {LIBRARY_VARIABLE: str(library), BUILD_VARIABLE: str(self.build)} if library.exists() else {}
        )
        inherited = [part for part in [os.environ.get("PYTHONPATH", "")] if part]
        return {
            "PYTHONPATH": os.pathsep.join([*(str(folder) for folder in folders), *inherited]),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONUNBUFFERED": "1",
            "ASAG_CACHE_DIR": str(self.folder / "cache"),
            **kernels,
        }


def _cores(beside: tuple[int, int] | None) -> list[int]:
    """Return half of the cores for the steps, or a share of the other half for what is made beside them."""
    cores = sorted(os.sched_getaffinity(0))
    half = (len(cores) + 1) // 2
    if len(cores) == 1:
        return cores
    if beside is None:
        return cores[:half]
    place, count = beside
    left = cores[half:]
    return left[place::count] or [left[place % len(left)]]


def _medians(result: Result) -> str:
    """Return the median milliseconds of every runner on each image group, in a line."""
    rows = []
    for group in result.groups:
        told = ", ".join(f"{name} {figures.ms['p50']:.2f}" for name, figures in group.runners.items())
        rows.append(f"{group.images}: {told} ms")
    return "; ".join(rows)
