"""Ctrl-C, SIGTERM and SIGHUP, which end a program without losing what it has done.

The first of them raises KeyboardInterrupt in the main thread, whatever it is, so that all of them end a
program in the same way.  What must not be left half done is held back from it.  So is an import: libraries
in C++ end the process where one of their modules fails in the middle.  Raised where Python can only print an
exception, such as in a finaliser, it is raised once more.  The signals that follow raise nothing, so that
what saves the work is not interrupted in its turn; but whoever insists ends the program on the spot.  What
it then leaves hidden, the next run removes (see `leftovers`).
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SAME_REQUEST_S = 1.0
"""Signals that come so soon after the first are the same request: `timeout` sends two, a terminal with
`torchrun` three."""
_REQUESTS_THAT_INSIST = 3
_AGAIN_S = 0.05
"""After this time, what could not be raised is tried again."""
_IMPORT = "<frozen importlib._bootstrap>"


class Interruption:
    """Turns these signals into KeyboardInterrupt, but never in the middle of what is held back.

    A context manager; in a thread that is not the main one, which gets no signals, it does nothing.  Signals
    that whoever started the program wants ignored, as `nohup` does, stay so.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        """The signal that came first, if one did."""
        self.was_raised = False
        """Whether KeyboardInterrupt has been raised, whatever became of it."""
        self._held = 0
        self._taken = False
        """Whether it has been raised, or is not to be."""
        self._requests = 0
        self._first_s = 0.0
        self._before: dict[int, Any] = {}
        self._entered_in: CodeType | None = None
        self._hook_before = sys.unraisablehook

    @property
    def exit_code(self) -> int:
        """The exit code of a program that this has ended: 130, or 143 for SIGTERM, 129 for SIGHUP."""
        return 128 + (self.signal or signal.SIGINT)

    def __enter__(self) -> Interruption:
        if _in_main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):  # None: not set by Python
                    self._before[number] = signal.signal(number, self._receive)
            self._before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._try_again)
            self._entered_in = sys._getframe(1).f_code
            self._hook_before, sys.unraisablehook = sys.unraisablehook, self._unraisable
            _active.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        if self in _active:
            _active.remove(self)
            signal.setitimer(signal.ITIMER_REAL, 0)
            sys.unraisablehook = self._hook_before
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """Let the body end before an interruption is raised; other threads are never interrupted."""
        with self._holding():
            yield
        self._raise()

    @contextmanager
    def ignored(self) -> Iterator[None]:
        """Let the body end; an interruption that comes, or that waits, is not raised."""
        with self._holding():
            yield
        self.take()

    def take(self) -> bool:
        """Return whether an interruption has come; it will not be raised any more."""
        self._taken = self.signal is not None
        return self._taken

    @contextmanager
    def _holding(self) -> Iterator[None]:
        counts = _in_main_thread()
        self._held += counts
        try:
            yield
        finally:
            self._held -= counts

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._first_s = number, now
        elif now - self._first_s < _SAME_REQUEST_S:
            return
        self._requests += 1
        if self._requests >= _REQUESTS_THAT_INSIST:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            os._exit(128 + number)  # as the first process of a container, which that does not end
        self._raise(frame)

    def _try_again(self, number: int, frame: FrameType | None) -> None:
        self._raise(frame)

    def _raise(self, frame: FrameType | None = None) -> None:
        if self.signal is None or self._held or self._taken or not _in_main_thread():
            return
        if self._imports(frame):
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_S)
            return
        self._taken = self.was_raised = True
        raise KeyboardInterrupt

    def _imports(self, frame: FrameType | None) -> bool:
        """Return whether a module is being imported, by whatever this has been entered for."""
        while frame is not None and frame.f_code is not self._entered_in:
            if frame.f_code.co_filename == _IMPORT:
                return True
            frame = frame.f_back
        return False

    def _unraisable(self, raised: sys.UnraisableHookArgs) -> None:
        """Raise again, and later, what was raised where it ends nothing."""
        if self.was_raised and issubclass(raised.exc_type, KeyboardInterrupt):
            self._taken = False
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_S)
        else:
            self._hook_before(raised)


_left_behind: list[threading.Thread] = []


def leave_behind(thread: threading.Thread) -> None:
    """Take note of a daemon thread that waits for what may never come, such as a video's next bytes."""
    _left_behind[:] = [other for other in _left_behind if other.is_alive()]
    _left_behind.append(thread)


_at_once: list[str] = []


def end_before(library: str) -> None:
    """Take note of a library that may abort the process when Python ends, such as pyarrow's for S3."""
    _at_once.append(library)


def end_without_what_is_left(code: int) -> None:
    """Let the program end at once if such a thread or library is there, with this exit code.

    It would go on in its library while that is taken down around it, and now and then end in a segmentation
    fault.
    """
    if _at_once or any(thread.is_alive() for thread in _left_behind):
        atexit.register(os._exit, code)  # what is registered last is called first


_active: list[Interruption] = []
"""Those that have handlers installed; the last one gets the signals."""


def current() -> Interruption:
    """Return what turns signals into KeyboardInterrupt at present, or one that does nothing."""
    return _active[-1] if _active else Interruption()


@contextmanager
def held_back() -> Iterator[None]:
    """Let the body end before an interruption is raised, if a program heeds them; the library does not."""
    with current().held_back():
        yield


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
