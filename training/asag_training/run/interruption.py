"""Ctrl-C and SIGTERM, which end a run without losing what it has done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

_IMPATIENT = 3
"""So many signals mean that whoever sends them will not wait for the run to be saved."""


class Interruption:
    """Turns the first of these signals into KeyboardInterrupt, but never amid what must not be left half done.

    Those that follow raise nothing: a terminal and `torchrun` both tell the same processes, and what saves
    the run must not be interrupted in its turn.  The third ends the process at once, as if nobody heeded it.

    A context manager; in a thread that is not the main one, which gets no signals, it does nothing.  Signals
    that whoever started the program wants ignored stay so.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        """The signal that came first, if one did."""
        self._count = 0
        self._held = 0
        self._taken = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            heeded = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._receive) for number in heeded}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal gave

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """Let the body end before an interruption is raised."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
        if self.signal is not None and not self._held and not self._taken:
            self._taken = True
            raise KeyboardInterrupt

    def take(self) -> bool:
        """Return whether an interruption has come; none will be raised from now on."""
        self._taken = True
        return self.signal is not None

    @contextmanager
    def ignored(self) -> Iterator[None]:
        """Let the body end; an interruption that comes, or has come, is not raised."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or number
        self._count += 1
        if self._count >= _IMPATIENT:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if not self._held and not self._taken:
            self._taken = True
            raise KeyboardInterrupt
