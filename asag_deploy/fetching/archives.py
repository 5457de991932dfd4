"""Bundles that are packed into one file: .zip or .tar."""

from __future__ import annotations

import lzma
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from asag_deploy.atomic import atomic_directory
from asag_deploy.downloads import is_web_page
from asag_deploy.errors import DownloadError, OutputError, first_line
from asag_deploy.fetching.manifests import MANIFEST
from asag_deploy.fetching.web import MOST_BYTES

_MOST_FILES = 1000
_UNPACKED = "bundle"
_DAMAGED = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, RuntimeError, OSError)


class _Member(NamedTuple):
    path: PurePosixPath
    size: int
    item: zipfile.ZipInfo | tarfile.TarInfo


def unpacked(archive: Path, address: str) -> Path:
    """Return the folder of the bundle in an archive; it is unpacked beside it the first time.

    The manifest may lie at the top, or in a folder.  Only what lies beside it is unpacked.  Raises
    DownloadError if the archive is damaged, holds no bundle, too much, or anything that would lie outside it.
    """
    folder = archive.parent / _UNPACKED
    if not folder.is_dir():
        try:
            with atomic_directory(folder, overwrite=False, marker="") as made:
                _unpack(archive, address, made)
        except OutputError as error:
            if not folder.is_dir():  # unless another process was faster
                raise DownloadError(f"'{address}' cannot be unpacked: {error}") from None
    return folder


def _unpack(archive: Path, address: str, folder: Path) -> None:
    with _members(archive, address) as (members, read):
        _check(members, address)
        manifests = [m.path for m in members if m.path.name == MANIFEST and len(m.path.parts) <= 3]
        if not manifests:
            raise DownloadError(f"'{address}' is not a packed bundle: it holds no {MANIFEST}")
        top = min(manifests, key=lambda path: len(path.parts)).parent
        for member in members:
            if top in member.path.parents:
                final = folder / member.path.relative_to(top)
                final.parent.mkdir(parents=True, exist_ok=True)
                with read(member) as source, final.open("xb") as target:
                    shutil.copyfileobj(source, target, 2**20)


def _bounded(members: Iterable[_Member], address: str) -> Iterator[_Member]:
    """Yield members as long as they are no more than a bundle may hold, before the next is looked for."""
    total = 0
    for number, member in enumerate(members, start=1):
        total += member.size
        if number > _MOST_FILES or total > MOST_BYTES:
            raise DownloadError(f"'{address}' would unpack to more than any bundle holds: it is refused")
        yield member


def _check(members: Sequence[_Member], address: str) -> None:
    seen: set[PurePosixPath] = set()
    for member in members:
        if member.path in seen:
            raise DownloadError(f"'{address}' holds '{member.path}' twice: it is refused")
        seen.add(member.path)
    both = next((path for member in members for path in member.path.parents if path in seen), None)
    if both is not None:
        raise DownloadError(f"'{address}' holds '{both}' both as a file and as a folder: it is refused")
    for member in members:
        parts = member.path.parts
        if (
            member.path.is_absolute()
            or ".." in parts
            or any("\\" in p or ":" in p or "\0" in p for p in parts)
        ):
            raise DownloadError(
                f"'{address}' holds '{member.path}', which would lie outside it: it is refused"
            )


class _Reader:
    """Opens members of an archive."""

    def __init__(self, archive: zipfile.ZipFile | tarfile.TarFile) -> None:
        self._archive = archive

    def __call__(self, member: _Member) -> IO[bytes]:
        if isinstance(self._archive, zipfile.ZipFile):
            assert isinstance(member.item, zipfile.ZipInfo)
            return self._archive.open(member.item)
        assert isinstance(member.item, tarfile.TarInfo)
        opened = self._archive.extractfile(member.item)
        assert opened is not None, "only of regular files"
        return opened


@contextmanager
def _members(archive: Path, address: str) -> Iterator[tuple[list[_Member], _Reader]]:
    """Give the regular files of an archive, and what opens them; links and devices are refused."""
    try:
        if address.lower().endswith(".zip") or zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as packed:
                infos = [info for info in packed.infolist() if not info.is_dir()]
                _no_links((i.filename for i in infos if stat.S_ISLNK(i.external_attr >> 16)), address)
                files = (_Member(PurePosixPath(i.filename), i.file_size, i) for i in infos)
                yield list(_bounded(files, address)), _Reader(packed)
        else:
            with tarfile.open(archive) as packed_tar:
                items = (item for item in packed_tar if not item.isdir())
                entries = (_Member(PurePosixPath(i.name), i.size, i) for i in items)
                members = list(_bounded(entries, address))
                _no_links((i.name for i in packed_tar.getmembers() if not (i.isdir() or i.isreg())), address)
                yield members, _Reader(packed_tar)
    except _DAMAGED as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        with archive.open("rb") as file:
            what = "is a web page" if is_web_page(file.read(1024)) else "is damaged, or no archive"
        why = (
            "" if isinstance(error, tarfile.TarError) else f" ({first_line(error)})"
        )  # those are of many lines
        raise DownloadError(f"'{address}' {what}: check the address{why}") from None


def _no_links(names: Iterator[str], address: str) -> None:
    name = next(names, None)
    if name is not None:
        raise DownloadError(f"'{address}' holds '{name}', which is no regular file: it is refused")
