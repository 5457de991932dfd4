"""How the C library keeps memory that training gives back."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""mallopt's names for its parameters, from glibc's malloc.h."""
_NEVER = -1


def keep_freed_memory() -> bool:
    """Let freed memory stay with the process instead of going back to the system; returns whether it will.

    A training pass on the CPU allocates and frees the same maps over and over.  glibc maps every large one
    anew, and touching its pages for the first time can take longer than computing what is written there: a
    third of a training step was measured.  Other C libraries have no such settings and are left as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, _NEVER))
