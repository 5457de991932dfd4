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
        self._mutex = threading.RLock()  # a finaliser may come in while the same thread holds it
        self._going_on = 0
        self._put_off: deque[Callable[[], object]] = deque()

    @contextlib.contextmanager
    def going_on(self) -> Iterator[None]:
        """While this thread captures; another thread's capture is waited for."""
        with self._turn:
            collects = gc.isenabled()
            gc.disable()
            self._going_on += 1
            try:
                yield
            finally:
                with self._mutex:
                    self._going_on -= 1
                if collects:
                    gc.enable()
                self._catch_up()

    @contextlib.contextmanager
    def none_going_on(self) -> Iterator[None]:
        """Wait for other threads' captures, and let none begin meanwhile."""
        with self._turn:
            yield

    def when_over(self, action: Callable[[], object]) -> None:
        """Do it now, or as soon as no capture is going on; a BackendError is then lost."""
        with self._mutex:
            if self._going_on:
                self._put_off.append(action)
                return
        action()

    def _catch_up(self) -> None:
        while self._put_off and not self._going_on:
            action = self._put_off.popleft()
            with contextlib.suppress(BackendError):  # there is nobody left to be told
                action()


captures = Captures()
"""Of this process: CUDA's rules hold for all its threads and libraries."""
