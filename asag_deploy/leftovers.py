"""Hidden files and directories in the making, and what is left of them when a process is killed.

A process holds a lock (`flock`) on each of its own, which ends with the process however it ends.  So whatever
can be locked is left over, and is removed.  The name says whose it is: on a network file system that has no
locks across machines, those of another machine are named in the log, and left.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import logging
import os
import platform
import re
import secrets
import shutil
import stat
import time
from pathlib import Path

_log = logging.getLogger(__name__)

_NAME = re.compile(r"\..*\.asag-([0-9a-f]{8})-([0-9a-f]{8})-[0-9a-f]{8}(\.[^./]*)?", re.DOTALL)
_LONGEST_SUFFIX = 16
_ROOM = len(".") + len(".asag-12345678-12345678-12345678") + _LONGEST_SUFFIX
_USUAL_LONGEST_NAME = 255
_SHARE_OF_TIME = 0.01
"""A folder of many files is looked through again only when that costs no more of the time than this."""


class Hidden:
    """A hidden file or directory beside `final`, which exists and is locked until `remove`.

    It keeps the suffix of `final`, and the beginning of its name as far as the file system takes it.
    Raises OSError where it cannot be made.
    """

    def __init__(self, final: Path, *, directory: bool = False) -> None:
        self.path = hidden_name(final)
        self._lock: int | None = None
        if directory:
            self.path.mkdir()
            self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        else:
            # Not from `tempfile`, whose files stay readable by their owner alone, even once renamed.
            self._lock = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with contextlib.suppress(OSError):  # without locks, nobody removes what is left over
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def remove(self) -> None:
        """Remove whatever is there under the hidden name by now, and give up the lock."""
        _remove(self.path)
        if self._lock is not None:
            with contextlib.suppress(OSError):
                fcntl.flock(self._lock, fcntl.LOCK_UN)  # also for processes that were forked meanwhile
            os.close(self._lock)
            self._lock = None


def hidden_name(final: Path) -> Path:
    """Return a new hidden name beside `final`, which fits the file system where the one of `final` does."""
    stem, suffix = final.stem, final.suffix
    if len(os.fsencode(suffix)) > _LONGEST_SUFFIX:
        suffix = ""
    try:
        longest = os.pathconf(final.parent, "PC_NAME_MAX")
    except (OSError, ValueError):
        longest = _USUAL_LONGEST_NAME
    while len(os.fsencode(stem)) > max(longest - _ROOM, 1):
        stem = stem[:-1]
    boot, station = _this_machine()
    return final.parent / f".{stem}.asag-{boot}-{station}-{secrets.token_hex(4)}{suffix}"


def is_hidden(name: str) -> bool:
    """Tell whether a file of that name is one in the making, or one that is left over."""
    return _NAME.fullmatch(name) is not None


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left in a folder; name in the log what may be another machine's."""
    start = time.monotonic()
    if start < _not_before.get(folder, start):
        return
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        found = [(entry.name, match) for entry in entries if (match := _NAME.fullmatch(entry.name))]
        for name, match in found:
            _remove_if_left_over(folder / name, match[1], match[2])
    if len(_not_before) > _MOST_FOLDERS:
        _not_before.clear()
    end = time.monotonic()
    _not_before[folder] = end + (end - start) / _SHARE_OF_TIME


def forget() -> None:
    """Forget which folders were looked through just now."""
    _not_before.clear()


_MOST_FOLDERS = 1000
_not_before: dict[Path, float] = {}
"""By folder, when it is next worth looking through."""
_named: set[Path] = set()


def _remove_if_left_over(path: Path, boot: str, station: str) -> None:
    try:
        lock = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:  # removed meanwhile, or another user's
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        own_boot, own_station = _this_machine()
        if boot == own_boot or station == own_station:
            if os.path.samestat(os.fstat(lock), path.lstat()):
                _remove(path)
        else:
            _name(path)
    except BlockingIOError:  # somebody is at it
        return
    except OSError:  # no locks here
        _name(path)
    finally:
        os.close(lock)


def _name(path: Path) -> None:
    if path not in _named:
        _named.add(path)
        _log.warning(
            "'%s' may be left of a program that was killed on another machine: delete it if none is at it",
            path,
        )


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        if stat.S_ISDIR(path.lstat().st_mode):
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


@functools.cache
def _this_machine() -> tuple[str, str]:
    """Return what tells this machine since it was started, and this installation, from others.

    Containers share the first, whatever they are called; the second outlives a restart.
    """
    node = platform.node()
    boot = _read("/proc/sys/kernel/random/boot_id") or node
    machine = _read("/etc/machine-id") or boot
    return _digest(boot), _digest(f"{machine} {node}")


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeError):
        return ""


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
