"""The first moments of a program of this project, while it is importing.

A signal then ends it in silence: there is nothing to keep yet.  A package that cannot be imported is one
sentence.  Once the program runs, `interruption` says what a signal does, and `command_line` what an
exception.  Where the package is imported by another program, nothing is changed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType, TracebackType

from asag_deploy import extras

_DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)
_NOTHING_DONE = 2
_INSTALLED = frozenset(
    f"asag-{name}"
    for name in (
        *("batch", "bench", "build", "data", "detect", "eval", "export"),
        *("paper", "playground", "quantize", "serve", "train"),
    )
)
_PACKAGES = frozenset(f"asag_{name}" for name in ("bench", "deploy", "evaluation", "export", "training"))
_OPTIONS_WITH_VALUES = ("-W", "-X", "--check-hash-based-pycs")
_SCRIPTS = ("training/train.py", "benchmarks", "benchmarks/__main__.py")
"""What is run from a clone without an installation, as `python benchmarks`."""


def _end(number: int, frame: FrameType | None) -> None:
    os._exit(128 + number)


def _name_if_ours(arguments: list[str]) -> str | None:
    """Return what one of the project's programs was called by: its name, a script, or its module after `-m`.

    None where Python runs something else.
    """
    called = Path(sys.argv[0] if sys.argv else "")
    if called.name in _INSTALLED:
        return called.name
    module = _module_after_m(arguments)
    if module is not None:
        return module if module.partition(".")[0] in _PACKAGES else None
    with contextlib.suppress(OSError):  # the working directory may be gone
        clone = Path(os.path.realpath(__file__)).parent.parent
        if Path(os.path.realpath(called)) in [clone / script for script in _SCRIPTS]:
            return called.name
    return None


def _module_after_m(arguments: list[str]) -> str | None:
    """Return the module that Python itself was told to run; an -m behind a script is the script's own."""
    words = iter(arguments[1:])
    for word in words:
        if word == "-m":
            return next(words, None)
        if word in _OPTIONS_WITH_VALUES:
            next(words, None)
        elif not word.startswith("-") or word in ("-", "-c"):
            break
    return None


def _say_what_is_missing(program: str) -> None:
    """Let a program that cannot be imported for want of a package end with a sentence, and 2."""
    before = sys.excepthook

    def end(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if not isinstance(error, ImportError) or extras.is_own(error):
            before(kind, error, traceback)
            return
        print(f"{program}: error: {extras.missing(error, program)}", file=sys.stderr, flush=True)
        os._exit(_NOTHING_DONE)

    sys.excepthook = end


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


_program = _name_if_ours(sys.orig_argv)
IS_PROGRAM = _program is not None and threading.current_thread() is threading.main_thread()
"""Whether this process is one of the project's programs, and not another that imports it."""
if _program is not None and IS_PROGRAM:
    for _number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(_number) in _DEFAULTS:
            signal.signal(_number, _end)
    _open_what_is_closed()
    _say_what_is_missing(_program)
