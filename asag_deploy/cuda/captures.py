"""One capture at a time, and what a capture forbids is put off until it is over.

CUDA refuses `cudaFree` and the like to a thread that captures a graph, and a synchronisation of the device to
every thread; either invalidates the capture.  But a finaliser may want to free memory at any moment.  So what
this project frees waits here, and Python's cyclic garbage collector, which would run other libraries'
finalisers, rests meanwhile.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections import deque
from collections.abc import Callable, Iterator

from asag_deploy.errors import BackendError


class Captures:
    """Whether a graph is being captured in this process.  Safe to call from threads and finalisers."""

    def __init__(self) -> None:
        self._turn = threading.RLock()
        self._going_on = 0
        self._put_off: deque[Callable[[], object]] = deque()

    @contextlib.contextmanager
    def going_on(self) -> Iterator[None]:
        """Hold the turn while this thread captures; wait first for another thread's capture."""
        try:
            with self.none_going_on():
                self._going_on += 1
                try:
                    yield
                finally:
                    self._going_on -= 1
        finally:
            self._catch_up()

    @contextlib.contextmanager
    def none_going_on(self) -> Iterator[None]:
        """Wait for other threads' captures, and let none begin meanwhile."""
        with self._turn:
            collects = gc.isenabled()
            gc.disable()
            try:
                yield
            finally:
                if collects:
                    gc.enable()

    def when_over(self, action: Callable[[], object]) -> None:
        """Do it now, or as soon as no capture is going on; a BackendError is then lost.

        Without a lock, as a finaliser may come here while its thread holds any.
        """
        if not self._going_on:
            action()
            return
        self._put_off.append(action)
        self._catch_up()  # if the capture has ended since

    def _catch_up(self) -> None:
        while self._put_off and not self._going_on:
            # Another thread may be faster; and there is nobody left to be told of a failure.
            with contextlib.suppress(IndexError, BackendError):
                self._put_off.popleft()()


captures = Captures()
"""The captures of this process, since CUDA's rules hold for all its threads and libraries."""
