"""Programs that a step of the GPU machine starts, as tests want them."""

from __future__ import annotations

import sys
from pathlib import Path

from asag_bench.gpu_machine.programs import Logs, Program, start


def in_python(text: str, tmp_path: Path, logs: Logs | None = None) -> Program:
    """Start Python with this text as its program."""
    return start(
        [sys.executable, "-c", text],
        log=tmp_path / "log",
        logs=logs or Logs(),
        cwd=tmp_path,
        environment={"GIVEN": "by the step"},
    )
