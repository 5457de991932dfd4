"""The page of errors: it names every exception, exit code and program, and nothing else."""

from __future__ import annotations

import re
import signal
import tomllib
from pathlib import Path

from asag_deploy import errors
from asag_deploy.command_line import ALL_FINE, NOTHING_DONE, SOME_FAILED
from asag_deploy.interruption import Interruption

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")


def first_cells(heading: str) -> list[list[str]]:
    """Return what stands in code in the first column of each row below a heading."""
    part = PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    rows = [row for row in part.splitlines() if row.startswith("| ")]
    cells = [row.split("|")[1] for row in rows]
    return [re.findall(r"`([^`]+)`", cell) or [cell.strip()] for cell in cells]


def test_every_exception_is_on_the_page() -> None:
    described = [cell for cell in first_cells("Exceptions") if cell != ["exception"]]
    expected = {
        name: ([name, "ValueError"] if issubclass(kind, ValueError) else [name])
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.AsagError)
    }
    assert sorted(described) == sorted(expected.values())


def test_every_exit_code_is_on_the_page() -> None:
    described = {cell[0] for cell in first_cells("Exit codes")}
    codes = [ALL_FINE, SOME_FAILED, NOTHING_DONE]
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        interruption = Interruption()
        interruption.signal = number
        codes.append(interruption.exit_code)
    assert {str(code) for code in codes} <= described


def test_what_a_partial_failure_means_is_said_of_every_program() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    assert {name for name in scripts if f"`{name}" not in PAGE.partition("## Exceptions")[0]} == set()
