"""Files and directories that appear complete or not at all.

Everything is first built under a hidden name beside its destination, then renamed, which is atomic within a
file system.  On any failure, an interrupt included, nothing is left behind and what was there before stays.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from asag_deploy.errors import OutputError


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give the path of a temporary file to write; on success it becomes `path`, replacing a file there.

    The temporary name keeps the suffix, because image and video writers choose their format by it.  Missing
    parent folders are made.  Raises OutputError if anything, the body included, meets an OSError.
    """
    final = Path(path)
    temporary = _temporary_name(final)
    try:
        with _as_output_error(final):
            final.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            temporary.replace(final)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a file of text in UTF-8, whole or not at all; raises OutputError as `atomic_write` does."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def atomic_directory(path: str | os.PathLike[str], *, overwrite: bool, marker: str) -> Iterator[Path]:
    """Give a temporary directory to fill; on success it becomes `path`.

    A directory that is already there is replaced if it is empty, or if `overwrite` is set and it holds a file
    called `marker`: by that we know our own, so that a mistyped path never costs somebody their files.
    Raises OutputError where it may not be replaced (before anything is built), or if anything, the body
    included, meets an OSError.
    """
    final = Path(path)
    temporary = _temporary_name(final)
    try:
        with _as_output_error(final):
            _check_replaceable(final, overwrite, marker)
            final.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
            yield temporary
            _check_replaceable(final, overwrite, marker)  # the body may have taken minutes
            _move_into_place(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _temporary_name(final: Path) -> Path:
    # Not from `tempfile`, whose files and directories stay readable by their owner alone, even once renamed.
    whole = final.absolute()
    return whole.parent / f".{whole.stem}.{secrets.token_hex(4)}{whole.suffix}"


@contextmanager
def _as_output_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise OutputError(f"could not write '{path}': {reason}") from error


def _check_replaceable(path: Path, overwrite: bool, marker: str) -> None:
    if not path.exists() and not path.is_symlink():
        return
    if not path.is_dir() or path.is_symlink():
        raise OutputError(f"'{path}' exists and is not a directory; choose another output directory")
    if not any(path.iterdir()):
        return
    if not (path / marker).is_file():
        raise OutputError(
            f"'{path}' holds files but no {marker}, so it is not replaced; choose a new or an empty directory"
        )
    if not overwrite:
        raise OutputError(f"'{path}' already exists; choose another directory, or ask to overwrite it")


def _move_into_place(temporary: Path, final: Path) -> None:
    """Rename; what was there before is put aside first, and back if that fails."""
    if not final.exists():
        temporary.rename(final)
        return
    aside = _temporary_name(final)
    final.rename(aside)
    try:
        temporary.rename(final)
    except BaseException:
        aside.rename(final)
        raise
    shutil.rmtree(aside, ignore_errors=True)
