"""Plots on machines where matplotlib finds no folder of its own, or is told what it does not know."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_SCRIPT = """
import tempfile
from asag_deploy.command_line import exit_code
tempfile._candidate_tempdir_list = lambda: ["/proc"]  # as in a read-only container without /tmp
def command():
    from asag_evaluation.plots import check_plots
    check_plots()
    return 0
raise SystemExit(exit_code("tool", command))
"""


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("MPLCONFIGDIR", "/proc/nowhere"),
        ("MPLBACKEND", "module://a_notebook_that_is_not_installed.backend_inline"),
        ("MPLBACKEND", "nonsense"),
    ],
)
def test_matplotlib_of_this_machine(variable: str, value: str) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), variable: value}
    done = subprocess.run([sys.executable, "-c", _SCRIPT], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_program_around_keeps_its_backend() -> None:
    script = (
        "import os; from asag_evaluation.plots import check_plots; check_plots(); "
        "import matplotlib; print(os.environ['MPLBACKEND'], matplotlib.rcParams['backend'])"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "MPLBACKEND": "svg"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["svg", "svg"], done.stderr
