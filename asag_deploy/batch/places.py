"""Where runs and pictures lie: folders of this machine, or addresses (s3://bucket/folder), by pyarrow."""

from __future__ import annotations

import functools
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, Self
from urllib.parse import quote_from_bytes, unquote_to_bytes

from asag_deploy.atomic import atomic_write
from asag_deploy.errors import ConfigError, ImageError, OutputError, SourceError, reason_of
from asag_deploy.images.reading import RgbImage, decode_image, read_image
from asag_deploy.interruption import end_before

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

_FILE = "file://"
_WEB = ("http://", "https://")
_WHOLE_OR_NOT = frozenset({"s3", "gcs", "abfs"})
"""Storage in which what is written appears when it is closed, by pyarrow's names."""


def is_remote(text: str) -> bool:
    """Tell whether a name is the address of other storage, and no path of this machine."""
    return "://" in text and not text.startswith(_FILE)


def is_of_the_web(text: str) -> bool:
    """Tell whether a name is an address of the web, of which nothing is read here."""
    return text.lower().startswith(_WEB)


def whole_name(text: str) -> str:
    """Return a path as an absolute one, since other processes have another working directory.

    Links are kept, and so are addresses.  `file://` is taken off.
    """
    if is_remote(text):
        return text.rstrip("/")
    path = os.path.abspath(text.removeprefix(_FILE))  # noqa: PTH100 (which keeps links)
    return path[1:] if path.startswith("//") else path  # two slashes, which POSIX lets mean anything


def beside(place: str, name: str) -> str:
    """Return where `name` lies, a path that may be relative to the folder `place`, or an address.

    Paths of this machine come in their shortest spelling, without `file://` if their bytes are UTF-8.
    """
    if is_remote(name):
        return name
    if name.startswith(_FILE):
        path = whole_name(os.fsdecode(unquote_to_bytes(name.removeprefix(_FILE))))
        try:
            path.encode()
        except UnicodeEncodeError:
            return as_address(path)
        return path
    whole = name if name.startswith("/") else f"{place.rstrip('/')}/{name}"
    return whole if is_remote(whole) else whole_name(whole)


def folder_of(name: str) -> str:
    """Return the folder of a file, by its path or address."""
    return name.rpartition("/")[0]


def as_address(path: str) -> str:
    """Return a path whose bytes are no UTF-8 as an address that is, and that `read_picture` takes."""
    return _FILE + quote_from_bytes(os.fsencode(path))


def read_picture(place: str, name: str) -> RgbImage:
    """Read a picture as uint8 (H, W, 3) RGB from a path or an address; `name` is what messages call it.

    Raises ImageError as `asag_deploy.images.reading.read_image` does.
    """
    if place.startswith(_FILE):
        return read_image(os.fsdecode(unquote_to_bytes(place.removeprefix(_FILE))))
    if not is_remote(place):
        return read_image(place)
    if is_of_the_web(place):
        raise ImageError(
            f"image '{name}' is on the web, of which asag-batch reads nothing: download it first"
        )
    try:
        files, path = _opened(place)
        with files.open_input_stream(path) as stream:
            data = stream.read()
    except FileNotFoundError:
        raise ImageError(f"image '{name}' does not exist") from None
    except (OSError, ConfigError) as error:
        raise ImageError(f"image '{name}' cannot be read: {reason_of(error)}") from None
    return decode_image(data, name)


@dataclass(frozen=True, kw_only=True)
class Listed:
    """One file of a place."""

    name: str
    """The whole path or address."""
    size: int


class Place:
    """A folder, on this machine or elsewhere.

    Raises ConfigError for an address of a kind that pyarrow does not know.  It travels to other processes as
    its name.
    """

    def __init__(self, name: str) -> None:
        self.name = whole_name(name)
        """The absolute path, or the address."""
        self._files, self._root = _opened(self.name)

    def __reduce__(self) -> tuple[type[Self], tuple[str]]:
        """Travel as a name."""
        return type(self), (self.name,)

    @property
    def is_local(self) -> bool:
        """Whether it is a folder of this machine."""
        return not is_remote(self.name)

    def read(self, name: str) -> bytes | None:
        """Return what a file holds; None if it is not there.  Raises SourceError if it cannot be read."""
        try:
            with self._files.open_input_stream(f"{self._root}/{name}") as stream:
                content: bytes = stream.read()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise SourceError(f"cannot read '{self.name}/{name}': {reason_of(error)}") from None
        return content

    def size(self, name: str) -> int | None:
        """Return how many bytes a file has; None if it is not there.  Raises SourceError as `read` does."""
        try:
            info = self._files.get_file_info(f"{self._root}/{name}")
        except OSError as error:
            raise SourceError(f"cannot read '{self.name}/{name}': {reason_of(error)}") from None
        return info.size if info.is_file else None

    def open(self, name: str) -> Any:
        """Open a file to read anywhere in it, as pyarrow does.  Raises SourceError if that cannot be."""
        try:
            return self._files.open_input_file(f"{self._root}/{name}")
        except OSError as error:
            raise SourceError(f"cannot read '{self.name}/{name}': {reason_of(error)}") from None

    def write(self, name: str, content: bytes) -> None:
        """Write a file, whole or not at all.  Raises OutputError if that cannot be."""
        if self.is_local:
            with atomic_write(Path(self.name, name)) as temporary:
                temporary.write_bytes(content)
            return
        path = f"{self._root}/{name}"
        try:
            if self._files.type_name in _WHOLE_OR_NOT:
                self._put(path, content)
                return
            self._files.create_dir(folder_of(path), recursive=True)
            hidden = f"{folder_of(path)}/.{secrets.token_hex(4)}-{PurePosixPath(path).name}"
            self._put(hidden, content)
            self._files.move(hidden, path)
        except OSError as error:
            raise OutputError(f"could not write '{self.name}/{name}': {reason_of(error)}") from error

    def _put(self, path: str, content: bytes) -> None:
        with self._files.open_output_stream(path) as stream:
            stream.write(content)

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with all that is in it; what is not there may be so."""
        path = f"{self._root}/{name}"
        try:
            if self._files.get_file_info(path).is_file:
                self._files.delete_file(path)
            else:
                self._files.delete_dir_contents(path, missing_dir_ok=True)
                self._files.delete_dir(path)
        except FileNotFoundError:
            return
        except OSError as error:
            raise OutputError(f"could not remove '{self.name}/{name}': {reason_of(error)}") from None

    def files(self, folder: str = "", *, recursive: bool = False) -> Iterator[Listed]:
        """Yield the files in a folder of the place, in the order of their names; none if it is not there.

        recursive: also those of the folders in it.  Hidden ones are left out.  Raises SourceError if it
        cannot be read.
        """
        from pyarrow.fs import FileSelector

        if self.is_local and not recursive:
            yield from _files_here(Path(self.name, folder))
            return
        path = f"{self._root}/{folder}".rstrip("/")
        try:
            found = self._files.get_file_info(FileSelector(path, recursive=recursive, allow_not_found=True))
        except OSError as error:
            raise SourceError(f"cannot read '{self.name}/{folder}': {reason_of(error)}") from None
        base = "/".join(filter(None, (self.name, folder)))
        for info in sorted(found, key=lambda info: info.path.split("/")):
            inside = info.path.removeprefix(path).lstrip("/")
            if info.is_file and not any(part.startswith(".") for part in inside.split("/")):
                yield Listed(name=f"{base}/{inside}", size=info.size)

    def holds_anything(self) -> bool:
        """Tell whether there is something in it; no folder holds nothing."""
        if self.is_local:
            folder = Path(self.name)
            if folder.exists() and not folder.is_dir():
                raise OutputError(f"'{self.name}' is a file; choose a folder for the results")
            return folder.is_dir() and any(not item.name.startswith(".") for item in folder.iterdir())
        return next(self.files(recursive=True), None) is not None


def _files_here(folder: Path) -> Iterator[Listed]:
    """Yield the files in a folder of this machine, whatever bytes their names have."""
    try:
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except FileNotFoundError:
        return
    except OSError as error:
        raise SourceError(f"cannot read '{folder}': {reason_of(error)}") from None
    for entry in found:
        if not entry.name.startswith(".") and entry.is_file():
            yield Listed(name=entry.path, size=entry.stat().st_size)


def kind_of(name: str) -> Literal["file", "folder", "nothing"]:
    """Return what lies at a path or an address.  Raises SourceError where that cannot be known."""
    try:
        from pyarrow.fs import FileType

        files, path = _opened(whole_name(name))
        info = files.get_file_info(path)
    except OSError as error:
        raise SourceError(f"cannot read '{name}': {reason_of(error)}") from None
    if info.is_file:
        return "file"
    return "nothing" if info.type == FileType.NotFound else "folder"


def _opened(name: str) -> tuple[FileSystem, str]:
    """Return a file system of pyarrow's, and the path in it, of an absolute path or an address."""
    if not is_remote(name):
        return _local(), name
    if is_of_the_web(name):
        raise ConfigError(
            f"'{name}' is an address of the web, of which asag-batch reads and writes nothing: give folders, "
            "or storage such as s3://bucket/folder"
        )
    scheme, _, rest = name.partition("://")
    machine, _, path = rest.partition("/")
    files, start = _elsewhere(f"{scheme}://{machine}/")
    return files, f"{start}/{path}".rstrip("/")


@functools.cache
def _local() -> FileSystem:
    from pyarrow.fs import LocalFileSystem

    return LocalFileSystem()


@functools.cache
def _elsewhere(address: str) -> tuple[FileSystem, str]:
    from pyarrow.fs import FileSystem

    end_before("pyarrow")
    try:
        files, start = FileSystem.from_uri(address)
    except (OSError, ValueError) as error:
        raise ConfigError(f"'{address}' is no address that can be read: {reason_of(error)}") from None
    return files, str(start).rstrip("/")
