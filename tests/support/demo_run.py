"""One run of the demo, for all tests that look at what it leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

SCENES = 36
_PRINTED = "printed.txt"


class DemoRun(NamedTuple):
    """What it left."""

    folder: Path
    printed: str
    figures: dict[str, Any]


def run_demo(folder: Path) -> None:
    """Run the demo on `SCENES` scenes, and keep what it prints beside what it writes."""
    from asag_export.demo.cli import (
        main,  # with pycocotools, which a machine that is there for its GPU may lack
    )

    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *words, **options: lines.append(" ".join(map(str, words))))
        assert main(["--output-dir", str(folder), "--scenes", str(SCENES), "--crowds", "4"]) == 0
    (folder / _PRINTED).write_text("\n".join(lines), encoding="utf-8")


def read_run(folder: Path) -> DemoRun:
    """Read what `run_demo` left in a folder."""
    figures = json.loads((folder / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))
    return DemoRun(folder, (folder / _PRINTED).read_text(encoding="utf-8"), figures)
