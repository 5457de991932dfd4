"""One run at a time in an output folder: two would write the same files by turns."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from asag_deploy.errors import TrainingError


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder that is there, until the body ends, or the process however it does.

    Where the file system knows no locks, none are kept out.  Raises TrainingError if one is in it.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise TrainingError(
                    f"'{folder}' is in use by another run: wait until it ends, or give another folder"
                ) from None
        yield
