"""Less memory that stays in RAM: files are read where they lie, and freed memory goes back to the system."""

from __future__ import annotations

import ctypes
import mmap
from typing import IO, Any

import numpy as np


class MappedFile:
    """The beginning of a file as memory, of which only what is being read is in RAM.

    It lives as long as this does, also when the file is deleted or another takes its name meanwhile.
    """

    def __init__(self, file: IO[bytes], size: int) -> None:
        """Map the first `size` bytes, at least one.  Raises OSError or ValueError if there are fewer."""
        # Libraries insist on memory that may be written to.  What they wrote would be theirs alone.
        self._mapping = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
        self.content: np.ndarray[Any, np.dtype[np.uint8]] = np.frombuffer(self._mapping, dtype=np.uint8)
        """uint8 (size,), not to be written to."""

    def leave_ram(self) -> None:
        """Let the content leave RAM; who reads it again finds it as it was."""
        self._mapping.madvise(mmap.MADV_DONTNEED)


def return_freed_memory() -> None:
    """Give the system what has been freed, which the C library keeps back for whoever asks next.

    Loading a network frees several times its weights, in blocks that are too small for what comes then.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # it is glibc's
        trim(0)
