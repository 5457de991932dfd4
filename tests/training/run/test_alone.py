"""Two runs in one folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from asag_deploy.errors import TrainingError
from asag_training.run.alone import alone_in

_HOLDS = """
import sys
from pathlib import Path
from asag_training.run.alone import alone_in
with alone_in(Path(sys.argv[1])):
    print("in", flush=True)
    sys.stdin.read()
"""


def test_a_second_run_is_kept_out_until_the_first_ends(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _HOLDS, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "in\n"
        with pytest.raises(TrainingError, match=f"'{tmp_path}' is in use by another run"), alone_in(tmp_path):
            pass
        first.kill()
    with alone_in(tmp_path):
        pass
    with alone_in(tmp_path):  # what has ended in this process is out, too
        pass


def test_what_fails_inside_comes_out(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), alone_in(tmp_path):
        (tmp_path / "nothing").read_text()
    with alone_in(tmp_path / "is not there"):
        pass
