"""Bytes that lie in an open file, where every process finds them that is handed them."""

from __future__ import annotations

import mmap
import os
import weakref
from multiprocessing.context import get_spawning_popen
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np
from numpy.typing import NDArray


class SharedBytes:
    """The first `size` bytes of a file, not to be written to; they stay when the file is deleted.

    A process that is being started (by `forkserver` or `spawn`) gets the descriptor and maps the same memory;
    any other pickle holds the bytes themselves.
    """

    def __init__(self, descriptor: int, size: int) -> None:
        """Take over an open descriptor.  Raises OSError or ValueError if the file is shorter."""
        self._descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)
        self.array: NDArray[np.uint8] = np.frombuffer(
            mmap.mmap(descriptor, size, access=mmap.ACCESS_READ), dtype=np.uint8
        )
        """uint8 (size,)."""

    @classmethod
    def in_memory(cls, content: bytes) -> SharedBytes:
        """Put bytes into a file that no disk knows of."""
        descriptor = os.memfd_create("asag")
        with os.fdopen(os.dup(descriptor), "wb") as file:
            file.write(content)
        return cls(descriptor, len(content))

    def __reduce__(self) -> tuple[Any, ...]:
        if get_spawning_popen() is None:
            return SharedBytes.in_memory, (self.array.tobytes(),)
        return _received, (DupFd(self._descriptor), self.array.size)


def _received(descriptor: Any, size: int) -> SharedBytes:
    return SharedBytes(descriptor.detach(), size)
