"""Runs commands in one process that has the base install's packages alone, or some more.

    python base_install.py '{"allowed": ["onnx"], "commands": [["asag-detect", "--help"]]}'

Prints what came of each as JSON: exit code, stdout and stderr.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import io
import json
import sys
import traceback
from typing import Any

from support.every_program import PROGRAMS, commands

BASE = {"numpy", "cv2", "onnxruntime", "tqdm"}
_THEIRS = {"flatbuffers", "google", "packaging"}
"""What ONNX Runtime brings along."""
_OURS = {"asag_deploy", "asag_evaluation", "asag_training", "asag_export", "asag_bench", "support"}


class Absent(importlib.abc.MetaPathFinder):
    """Finds no package but those that are allowed."""

    def __init__(self, allowed: set[str]) -> None:
        self.allowed = allowed | BASE | _THEIRS | _OURS

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        top = name.partition(".")[0]
        if top not in self.allowed and top not in sys.stdlib_module_names and not top.startswith("_"):
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)


def main(text: str) -> None:
    """Run the commands; `--help` alone stands for that of every command of the program."""
    asked = json.loads(text)
    sys.meta_path.insert(0, Absent(set(asked["allowed"])))
    found = []
    for program, *arguments in asked["commands"]:
        every = commands(program) if arguments == ["--help"] else [((), None)]
        for words, _ in every:
            found.append({"command": [program, *words, *arguments], **_run(program, [*words, *arguments])})
    print(json.dumps(found))


def _run(program: str, arguments: list[str]) -> dict[str, Any]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = importlib.import_module(PROGRAMS[program]).main(arguments)
        except BaseException:
            traceback.print_exc()
            code = -1
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


if __name__ == "__main__":
    main(sys.argv[1])
