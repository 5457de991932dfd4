"""What decoders complain of: the only sign that libjpeg made up a part of a picture.

libjpeg mends damaged data as well as it can and says so on C's standard error stream, where libpng writes
as well; OpenCV neither passes that on nor stops.  So that stream is another one while an image is decoded.
It hands what the decoding thread writes to Python, and everything else to the standard error that was there.
Python's own `sys.stderr` has nothing to do with it.  Where the C library has no such streams (other than
glibc), nothing is heard.
"""

from __future__ import annotations

import ctypes
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import cv2
import numpy as np

_opencv_log: Any = getattr(cv2.utils, "logging", cv2)
_SILENT = 0
_STDERR = 2
_UNBUFFERED = 2

_Write = ctypes.CFUNCTYPE(ctypes.c_ssize_t, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


class _Functions(ctypes.Structure):
    """`cookie_io_functions_t`: what a stream does to be read, written, positioned and closed."""

    _fields_ = (
        ("read", ctypes.c_void_p),
        ("write", _Write),
        ("seek", ctypes.c_void_p),
        ("close", ctypes.c_void_p),
    )


class _Listening:
    """Who listens, and the stream that was there before the first of them."""

    lock = threading.Lock()
    heard: dict[int, list[bytes]] = {}  # noqa: RUF012 (one for the process)
    stream: int | None = None
    before: int | None = None


@contextmanager
def decoder_log() -> Iterator[list[bytes]]:
    """Collect what this thread writes to C's standard error stream."""
    thread = threading.get_ident()
    heard: list[bytes] = []
    with _Listening.lock:
        place = _stderr_pointer()
        if place is not None and not _Listening.heard:
            _Listening.before, place.value = place.value, _stream()
        _Listening.heard[thread] = heard
    try:
        yield heard
    finally:
        with _Listening.lock:
            _Listening.heard.pop(thread, None)
            if place is not None and not _Listening.heard:
                place.value = _Listening.before


class _Quiet:
    """How many callers want OpenCV silent, and the log level that the last of them restores."""

    lock = threading.Lock()
    depth = 0
    level = 0


@contextmanager
def quiet_opencv() -> Iterator[None]:
    """Keep OpenCV's own log off the terminal; errors come as exceptions instead.  Safe across threads."""
    with _Quiet.lock:
        _Quiet.depth += 1
        if _Quiet.depth == 1:
            _Quiet.level = _opencv_log.getLogLevel()
            _opencv_log.setLogLevel(_SILENT)
    try:
        yield
    finally:
        with _Quiet.lock:
            _Quiet.depth -= 1
            if _Quiet.depth == 0:
                _opencv_log.setLogLevel(_Quiet.level)


def _forget_other_threads() -> None:
    """Begin anew in a forked process, which has none of the threads that were listening."""
    _Listening.lock = threading.Lock()
    place = _stderr_pointer()
    if _Listening.heard and place is not None:
        place.value = _Listening.before
    _Listening.heard.clear()


os.register_at_fork(after_in_child=_forget_other_threads)


def jpeg_complaint(data: bytes) -> str | None:
    """Decode a JPEG for nothing but what libjpeg finds wrong with it; None if that is nothing."""
    with decoder_log() as heard:
        try:
            cv2.imdecode(np.frombuffer(data, dtype=np.uint8), cv2.IMREAD_UNCHANGED)
        except cv2.error:
            return None
    return jpeg_damage(heard, data)


def jpeg_damage(heard: list[bytes], data: bytes) -> str | None:
    """Return what libjpeg found wrong with the data of a picture; None if that is nothing, or does no harm.

    Some bytes too many, or padding with one and the same, are what some cameras write.
    """
    for line in b"".join(heard).decode("latin-1").splitlines():
        complaint = line.removeprefix("Corrupt JPEG data: ")
        extra = re.match(r"(\d+) extraneous bytes", complaint)
        if extra is not None:
            end = data.rfind(b"\xff\xd9")
            padding = data[max(end - int(extra[1]), 0) : max(end, 0)]
            if int(extra[1]) > _FEW_BYTES and len(set(padding)) > 1:
                return complaint
        elif complaint != line:
            return complaint
    return None


_FEW_BYTES = 64


def _write(cookie: int | None, text: int, size: int) -> int:
    """Stand in for the stream's `write`."""
    written = ctypes.string_at(text, size)
    heard = _Listening.heard.get(threading.get_ident())
    if heard is not None:
        heard.append(written)
    else:
        with suppress(OSError):  # it may be closed
            os.write(_STDERR, written)
    return size


_FUNCTIONS = _Functions(read=None, write=_Write(_write), seek=None, close=None)
"""Kept as long as the process, like the stream that calls them."""


def _stderr_pointer() -> Any | None:
    """Return the variable that C's `stderr` is; None where it cannot be replaced."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "fopencookie") or not hasattr(library, "gnu_get_libc_version"):
        return None
    return ctypes.c_void_p.in_dll(library, "stderr")


def _stream() -> int | None:
    """Return the stream that calls `_write`, made once."""
    if _Listening.stream is None:
        library = ctypes.CDLL(None)
        library.fopencookie.restype = ctypes.c_void_p
        library.fopencookie.argtypes = (ctypes.c_void_p, ctypes.c_char_p, _Functions)
        library.setvbuf.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
        stream = library.fopencookie(None, b"w", _FUNCTIONS)
        library.setvbuf(stream, None, _UNBUFFERED, 0)
        _Listening.stream = stream
    return _Listening.stream
