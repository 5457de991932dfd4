"""What a process that was forked never gives back, since its threads stayed behind."""

from __future__ import annotations

import ctypes
import os
import weakref
from typing import TypeVar

T = TypeVar("T")

_held: list[weakref.ref[object]] = []


def kept_in_forks(thing: T) -> T:
    """Return what a library has started threads for; a process that is forked keeps it until it has ended.

    Giving it back there waits for threads that are not there: with ONNX Runtime a segmentation fault, with
    OpenVINO a process that never ends.  So it would be as soon as the last reference goes, or Python ends.
    """
    _held[:] = [other for other in _held if other() is not None]
    _held.append(weakref.ref(thing))
    return thing


def _keep() -> None:
    for reference in _held:
        thing = reference()
        if thing is not None:
            # A reference of Python's own would be cleared as Python ends.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


os.register_at_fork(after_in_child=_keep)
