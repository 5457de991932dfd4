"""Files and directories that appear complete or not at all.

Everything is first built under a hidden name beside its destination, then renamed, which is atomic within a
file system.  On any failure, an interrupt included, nothing is left behind and what was there before stays.
What a killed process leaves, the next one that writes into the same folder removes (see `leftovers`).
A link is followed: its target is what is written.

Where there can be no renaming, the finished content is copied instead: into a device, a pipe or an open
descriptor such as /dev/stdout, and into what is a mount point or lies in a folder that takes no new files.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import os
import re
import shutil
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from asag_deploy.errors import OutputError
from asag_deploy.interruption import held_back
from asag_deploy.leftovers import Hidden, is_hidden, remove_leftovers
from asag_deploy.scratch import file_in_memory

_MOST_LINKS = 40
_NO_RENAMING = (errno.EBUSY, errno.EXDEV, errno.EPERM, errno.EACCES, errno.EROFS)
"""How a rename fails onto a mount point, out of the file system, or in a folder that is not ours."""
_OF_THE_FILE_SYSTEM = "lost+found"
_DESCRIPTORS = re.compile(r"/proc/[^/]+(/task/[^/]+)?/fd")


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give the path of a temporary file to write; on success it becomes `path`, or its content goes into it.

    A file that is replaced hands on its permissions, and its owner where that may be set; its other names
    (hard links) keep the old content.  The temporary name keeps the suffix, because image and video writers
    choose their format by it, unless `path` is no regular file.  Missing parent folders are made.
    Raises OutputError for a folder or a write-protected file (before the body), or if anything, the body
    included, meets an OSError.
    """
    with _as_output_error(Path(path)):
        descriptor, final = _destination(Path(path))
        if descriptor is not None:
            with _spooled(os.dup(descriptor)) as temporary:
                yield temporary
        elif _takes_a_rename(final):
            with _beside(final) as temporary:
                yield temporary
        else:
            with _spooled(os.open(final, os.O_WRONLY), anew=final.is_file()) as temporary:
                yield temporary


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a file of text in UTF-8, whole or not at all; raises OutputError as `atomic_write` does."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def atomic_directory(
    path: str | os.PathLike[str], *, overwrite: bool, marker: str, parts: Sequence[str] = ()
) -> Iterator[Path]:
    """Give a temporary directory to fill; on success it becomes `path`.

    A directory that is already there is replaced if it is empty, or if `overwrite` is set, it holds a file
    called `marker` (none is, if that is empty), and no file but that and `parts` (patterns of paths, such as
    `engines/*`): by that we know our own, so that a mistyped path never costs somebody their files.  One that
    cannot be renamed, such as a mount point or the working directory, is filled where it is, the marker last.
    Raises OutputError where it may not be replaced (before anything is built), or if anything, the body
    included, meets an OSError.
    """
    with _as_output_error(Path(path)):
        final = _destination(Path(path))[1]
        check_replaceable(path, overwrite=overwrite, marker=marker, parts=parts)
        stays = _stays(final)
        hidden: Hidden | None = None
        try:
            with held_back():
                final.parent.mkdir(parents=True, exist_ok=True)
                _bring_back(final)
                for folder in (final.parent, final):
                    remove_leftovers(folder)
                hidden = Hidden(final / final.name if stays else final, directory=True)
            yield hidden.path
            check_replaceable(
                path, overwrite=overwrite, marker=marker, parts=parts
            )  # minutes may have passed
            with held_back():
                if stays:
                    _move_into(final, hidden.path, marker)
                else:
                    _move_into_place(hidden.path, final, marker)
        finally:
            with held_back():
                if hidden is not None:
                    hidden.remove()


def check_replaceable(
    path: str | os.PathLike[str], *, overwrite: bool, marker: str, parts: Sequence[str] = ()
) -> None:
    """Raise OutputError where `atomic_directory` would not write: see there."""
    shown, final = Path(path), _destination(Path(path))[1]
    if not final.exists():
        return
    if not final.is_dir():
        raise OutputError(f"'{shown}' exists and is not a directory; choose another output directory")
    if not _content(final):
        return
    if not (final / marker).is_file():
        what = f"files but no {marker}" if marker else "files"
        raise OutputError(
            f"'{shown}' holds {what}, so it is not replaced; choose a new or an empty directory"
        )
    if not overwrite:
        raise OutputError(
            f"'{shown}' already exists; choose another directory, or replace it with --overwrite"
        )
    foreign = _foreign(final, (marker, *parts))
    if foreign is not None:
        raise OutputError(
            f"'{shown}' also holds '{foreign}', which would be lost, so it is not replaced; "
            "move that away, or choose another directory"
        )


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Make a folder that results will be written into; raise OutputError now if they could not be."""
    with _as_output_error(Path(folder)), held_back():
        final = _destination(Path(folder))[1]
        final.mkdir(parents=True, exist_ok=True)
        remove_leftovers(final)
        Hidden(final / "probe").remove()


def check_writable_file(path: str | os.PathLike[str] | None) -> None:
    """Raise OutputError now if a file of results could not be written in the end; None is none."""
    if path is None:
        return
    with _as_output_error(Path(path)):
        descriptor, final = _destination(Path(path))
        beside = descriptor is None and _takes_a_rename(final)
    if beside:
        with contextlib.suppress(_NotWrittenError), atomic_write(path):
            raise _NotWrittenError


class _NotWrittenError(Exception):
    """Ends a trial."""


def check_spares(output: str | os.PathLike[str], *inputs: str | os.PathLike[str] | None) -> None:
    """Raise OutputError if writing `output`, a file or a whole directory, would cost one of the inputs.

    Inputs that are None were not given.
    """
    place = Path(os.path.realpath(output))
    for given in inputs:
        if given is None:
            continue
        inside = place.is_dir() and place in Path(os.path.realpath(given)).parents
        if inside or is_same_file(output, given):
            raise OutputError(f"'{output}' would replace '{given}', which is read: choose another place")


def is_same_file(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    """Tell whether two paths name the same file, by whatever links; also where it is yet to be written."""
    try:
        return Path(one).samefile(other)
    except (OSError, ValueError):
        return os.path.realpath(one) == os.path.realpath(other)


def real_path(path: Path) -> Path:
    """Return the absolute path behind all links, as far as it is there; links in a circle stay as they are.

    `Path.resolve` fails on such links, as Python 3.11 and 3.12 have it.
    """
    return Path(os.path.realpath(path))


def is_stdout(path: str | os.PathLike[str] | None) -> bool:
    """Tell whether what is written to `path` comes out where this program prints, so that it must not."""
    if path is None:
        return False
    try:
        descriptor, final = _destination(Path(path))
        target = final.stat() if descriptor is None else os.fstat(descriptor)
        return descriptor == 1 or (not stat.S_ISREG(target.st_mode) and os.path.samestat(target, os.fstat(1)))
    except (OSError, ValueError):
        return False


def _destination(path: Path) -> tuple[int | None, Path]:
    """Follow links; return this process's descriptor that `path` stands for, or None, and the last path.

    Raises OSError for links in a circle.
    """
    own = {os.path.realpath("/proc/self/fd"), os.path.realpath("/proc/thread-self/fd")}
    here = os.fspath(path if path.is_absolute() else Path.cwd() / path)
    for _ in range(_MOST_LINKS):
        folder, name = os.path.realpath(os.path.dirname(here)), os.path.basename(here)  # noqa: PTH119, PTH120
        file = Path(folder, name)
        if folder in own and name.isdecimal():
            return _writable(int(name)), file
        if _DESCRIPTORS.fullmatch(folder) or not file.is_symlink():
            return None, file
        here = str(file.parent / file.readlink())
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))


def _writable(descriptor: int) -> int:
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, "it is open for reading only")
    return descriptor


def _takes_a_rename(final: Path) -> bool:
    """Tell whether a file can be put in the place of `final`; raises OSError where nothing can be written."""
    try:
        mode = final.stat().st_mode
    except FileNotFoundError:
        return True
    if stat.S_ISDIR(mode) or not os.access(final, os.W_OK):
        code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EACCES
        raise OSError(code, os.strerror(code))
    if not stat.S_ISREG(mode) or _DESCRIPTORS.fullmatch(str(final.parent)):
        return False
    return os.access(final.parent, os.W_OK | os.X_OK)


@contextmanager
def _beside(final: Path) -> Iterator[Path]:
    """Give a hidden file in the folder of `final`, and rename it in the end."""
    hidden: Hidden | None = None
    try:
        with held_back():
            final.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(final.parent)
            hidden = Hidden(final)
        yield hidden.path
        with held_back():
            _replace(hidden.path, final)
    finally:
        with held_back():
            if hidden is not None:
                hidden.remove()


@contextmanager
def _spooled(target: int, *, anew: bool = False) -> Iterator[Path]:
    """Give a file in memory, and copy it in the end to an open descriptor, which is closed.

    anew: what was in it before goes.
    """
    with os.fdopen(target, "wb") as out, file_in_memory() as spool:
        yield spool
        if sys.stdout is not None:
            sys.stdout.flush()  # what was printed before comes first
        with held_back():
            if anew:
                out.truncate()
            with spool.open("rb") as content:
                shutil.copyfileobj(content, out)


def _replace(temporary: Path, final: Path) -> None:
    _hand_on(final, temporary)
    try:
        temporary.replace(final)
    except OSError as error:
        if error.errno not in _NO_RENAMING or not final.is_file():
            raise
        with temporary.open("rb") as content, final.open("r+b") as out:
            out.truncate()
            shutil.copyfileobj(content, out)


def _hand_on(before: Path, after: Path) -> None:
    """Give a file or directory the owner and the permissions of the one that it replaces, if there is one."""
    with contextlib.suppress(OSError):
        state = before.stat()
        with contextlib.suppress(OSError):
            os.chown(after, state.st_uid, state.st_gid)
        after.chmod(stat.S_IMODE(state.st_mode))


@contextmanager
def _as_output_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        if isinstance(error, FileExistsError) and error.filename is not None:
            reason = f"'{error.filename}' is no folder"
        raise OutputError(f"could not write '{path}': {reason}") from error


def _content(folder: Path) -> list[str]:
    """Return the names in a folder but for those that nobody put there on purpose."""
    names = (entry.name for entry in folder.iterdir())
    return sorted(name for name in names if not is_hidden(name) and name != _OF_THE_FILE_SYSTEM)


def _foreign(folder: Path, parts: Sequence[str]) -> str | None:
    """Return the path of a file in a folder, or below, that matches no pattern."""
    for below, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not is_hidden(name)]
        for name in sorted(names):
            path = Path(below, name).relative_to(folder)
            if not is_hidden(name) and not any(fnmatch(path.as_posix(), part) for part in parts):
                return str(path)
    return None


def _stays(final: Path) -> bool:
    """Tell whether a directory is there that cannot be renamed, or should not be."""
    if not final.is_dir():
        return False
    parent_takes_it = os.access(final.parent, os.W_OK | os.X_OK)
    return final.is_mount() or not parent_takes_it or is_same_file(final, os.curdir)


def _move_into(final: Path, temporary: Path, marker: str) -> None:
    """Put the content of one directory in the place of another's; the marker goes first and comes last."""
    (final / marker).unlink(missing_ok=True)
    for name in _content(final):
        if (final / name).is_dir() and not (final / name).is_symlink():
            shutil.rmtree(final / name)
        else:
            (final / name).unlink()
    for entry in sorted(temporary.iterdir(), key=lambda entry: entry.name == marker):
        entry.rename(final / entry.name)


def _move_into_place(temporary: Path, final: Path, marker: str) -> None:
    """Rename; what was there before then has the temporary name, or is gone.

    A directory of a container's image cannot be renamed, but what lies in it can be replaced.
    """
    if not final.exists() or not any(final.iterdir()):
        _hand_on(final, temporary)
        temporary.rename(final)
        return
    _hand_on(final, temporary)
    if _exchange(temporary, final):
        return
    aside = _aside(final)
    try:
        final.rename(aside)
    except OSError as error:
        if error.errno not in _NO_RENAMING:
            raise
        _move_into(final, temporary, marker)
        return
    try:
        temporary.rename(final)
    except BaseException:
        aside.rename(final)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _bring_back(final: Path) -> None:
    """Put a directory back whose replacement was cut short by a kill, where there is no exchange."""
    aside = _aside(final)
    if aside.is_dir():
        if final.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.rename(final)


def _aside(final: Path) -> Path:
    return final.with_name(f".asag-before-{hashlib.sha256(os.fsencode(final.name)).hexdigest()[:16]}")


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step, where the system and the file system can."""
    here, swap = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux's headers
    try:
        rename: Callable[..., int] = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError):
        return False
    return rename(here, os.fsencode(one), here, os.fsencode(other), swap) == 0
