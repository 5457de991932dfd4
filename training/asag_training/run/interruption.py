"""Ctrl-C and SIGTERM, which end a run without losing what it has done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Turns both signals into KeyboardInterrupt, but never in the middle of what must not be left half done.

    A context manager; in a thread that is not the main one, which gets no signals, it does nothing.  Signals
    that whoever started the program wants ignored stay so.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        """The signal that came first, if one did."""
        self._held = 0
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
        if self.signal is not None and not self._held:
            raise KeyboardInterrupt

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
        if not self._held:
            raise KeyboardInterrupt
