"""Places for what is written and read again within a moment."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from asag_deploy.errors import OutputError
from asag_deploy.leftovers import Hidden, remove_leftovers

_NAMED_BY = ("TMPDIR", "TEMP", "TMP")
_USUAL = ("/tmp", "/var/tmp", "/dev/shm", os.curdir)


@contextmanager
def file_in_memory() -> Iterator[Path]:
    """Give the path of an empty file that no disk knows of, and that is gone in the end; it has no suffix."""
    descriptor = os.memfd_create("asag")
    try:
        yield Path(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


@contextmanager
def path_in_utf8(path: Path) -> Iterator[Path]:
    """Give a path to a file that libraries find which take no names but those in UTF-8."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        descriptor = os.open(path, os.O_RDONLY)
    else:
        yield path
        return
    try:
        yield Path(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Give an empty folder that only this user reads, and that is gone in the end.

    What a killed process has left there is removed first.  Raises OutputError if nothing can be written
    anywhere.
    """
    hidden = _hidden_folder()
    try:
        yield hidden.path
    finally:
        hidden.remove()


def _hidden_folder() -> Hidden:
    named = (os.environ.get(name) for name in _NAMED_BY)
    for place in (Path(place) for place in (*named, *_USUAL) if place):
        with contextlib.suppress(OSError):
            remove_leftovers(place)
            hidden = Hidden(place / "scratch", directory=True)
            hidden.path.chmod(0o700)
            return hidden
    raise OutputError("there is no folder for what is written for a moment only: set TMPDIR to one with room")
