"""The image files of a data set: found under the names that annotation tools give them, and their headers."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import NamedTuple

from asag_deploy.images.file_names import alike, meant_names
from asag_deploy.images.formats import image_header


class StoredSize(NamedTuple):
    """What the header of an image file says."""

    height: int
    """Of the pixels as they are stored."""
    width: int
    orientation: int
    """As in EXIF, 1 to 8."""

    @property
    def upright(self) -> tuple[int, int]:
        """Height and width once the orientation is applied."""
        return (self.width, self.height) if self.orientation >= 5 else (self.height, self.width)


class ImageFiles:
    """A folder of images.

    Names are looked for as they are, and then as they are meant: with the folders of the machine that they
    were annotated on, its way to separate them, escaped as in addresses, in other letters or encodings.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._listed: frozenset[str] | None = None
        self._alike: dict[str, Path | None] | None = None

    def has(self, name: str) -> bool:
        """Tell whether a file of this name lay in the folder itself when that was listed, by the first call.

        One that has come since, or lies in a folder below, is none.
        """
        if self._listed is None:
            self._listed = _files_in(self.folder)
        return name in self._listed

    def find(self, name: str) -> Path | None:
        """Return the file of a name, or None if there is none, or more than one alike."""
        for candidate in meant_names(name):
            if is_file(self.folder / candidate):
                return self.folder / candidate
        if not self.folder.is_dir():
            return None
        for candidate in meant_names(name):
            found = self._files_alike().get(alike(candidate))
            if found is not None:
                return found
        return None

    def _files_alike(self) -> dict[str, Path | None]:
        """Return the files by their names in small letters; None where two are alike."""
        if self._alike is None:
            self._alike = {}
            for path in sorted(self.folder.rglob("*")):
                key = alike(path.relative_to(self.folder).as_posix())
                self._alike[key] = None if key in self._alike else path
        return self._alike


def _files_in(folder: Path) -> frozenset[str]:
    """Return the names of the files in a folder; to list them takes less than to look for each."""
    try:
        with os.scandir(folder) as entries:
            return frozenset(entry.name for entry in entries if _is_file_there(entry))
    except OSError:  # it is not there, or not to be read
        return frozenset()


def _is_file_there(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link in a circle
        return False


def is_file(path: Path) -> bool:
    """Tell whether there is such a file; no name that a file system refuses is one."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long a name; one with a null character
        return False


def stored_size(path: Path) -> StoredSize | None:
    """Read the header of an image file; None if it cannot be read or does not say its size."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            header = image_header(data)
    except (OSError, ValueError):  # ValueError: an empty file cannot be mapped
        return None
    if header is None or min(header.height, header.width) < 1:
        return None
    return StoredSize(header.height, header.width, header.orientation)
