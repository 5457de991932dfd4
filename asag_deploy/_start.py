"""The first moments of a program of this project, while it is importing.

A signal then ends it in silence: there is nothing to keep yet.  Once the program runs, `interruption` says
what a signal does.  Where the package is imported by another program, nothing is changed.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType

_DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)
_SCRIPTS = ("training/train.py", "benchmarks", "benchmarks/__main__.py")
"""What is run from a clone without an installation, as `python benchmarks`."""


def _end(number: int, frame: FrameType | None) -> None:
    os._exit(128 + number)


def _is_ours(arguments: list[str]) -> bool:
    """Tell whether Python was called with one of the project's programs: installed, by `-m` or a script."""
    called = Path(sys.argv[0] if sys.argv else "")
    if called.name.startswith("asag-"):
        return True
    with contextlib.suppress(OSError):  # the working directory may be gone
        clone = Path(os.path.realpath(__file__)).parent.parent
        if Path(os.path.realpath(called)) in [clone / script for script in _SCRIPTS]:
            return True
    modules = [after for option, after in itertools.pairwise(arguments) if option == "-m"]
    return bool(modules) and modules[0].startswith("asag_")


def _open_what_is_closed() -> None:
    """Let no file get the number of a standard stream that is closed, as by `2>&-`: libraries write there.

    What is printed then is lost, as was asked for; a file of results that goes there is refused.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDONLY)  # it gets the lowest number that is free
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 (it stays)


if _is_ours(sys.orig_argv) and threading.current_thread() is threading.main_thread():
    for _number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(_number) in _DEFAULTS:
            signal.signal(_number, _end)
    _open_what_is_closed()
