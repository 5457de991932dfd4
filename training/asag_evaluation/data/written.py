"""Annotation files that this project writes, links to images, and what is said of a conversion.

Files of its own are told from those that it must not replace.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from asag_deploy.atomic import atomic_directory, real_path
from asag_deploy.errors import OutputError, plural
from asag_deploy.images.sources import IMAGE_SUFFIXES

_MARKER = ".asag-data"
"""By this a folder of links is known as made here."""


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What a conversion made."""

    file: Path
    """The annotation file."""
    remarks: tuple[str, ...]
    """Sentences on what was odd."""


@dataclass
class Remarks:
    """What was odd in the files of a data set, with the first place of each kind."""

    kinds: Mapping[str, tuple[str, str]]
    """By its name, what is counted of a kind, and the sentence, in which {n} and {first} are filled in."""
    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def note(self, what: str, where: str) -> None:
        """Count an oddity."""
        self.counts[what] = self.counts.get(what, 0) + 1
        self.first.setdefault(what, where)

    def sentences(self) -> list[str]:
        """Return a sentence for each kind that was found, in the order of `kinds`."""
        return [
            said.format(n=plural(self.counts[what], noun), first=self.first[what])
            for what, (noun, said) in self.kinds.items()
            if what in self.counts
        ]


def check_ours(file: Path, description: str) -> None:
    """Raise OutputError if an annotation file is there that is not described so, by `info.description`."""
    if not file.exists():
        return
    try:
        content = json.loads(file.read_bytes())
        described = str(content["info"]["description"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        described = ""
    if description not in described:
        raise OutputError(
            f"there is a '{file}' already that was not written by this: remove it, or choose another "
            "--output-dir or --split"
        )


def link_images(link: Path, image_dir: Path, names: Iterable[str]) -> None:
    """Make `link` lead to the images of these names in `image_dir`, and to no others.

    It becomes a link to that folder, or, where more lies there than these, a folder of links to each.  One
    that was made so before is replaced, and the folder of the images itself is left as it is.  Raises
    OutputError if something else is there, or it cannot be made.
    """
    target = real_path(image_dir)
    is_there = real_path(link) == target
    if is_there and not link.is_symlink():
        return
    files = {PurePosixPath(name) for name in names}
    try:
        if not (link / _MARKER).exists() and not _holds_more(target, files):
            if not is_there:
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(target, target_is_directory=True)
            return
        if is_there:
            link.unlink()
        elif link.is_symlink():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
    except FileExistsError:
        raise OutputError(
            f"there is a '{link}' already that does not lead to the images in '{image_dir}': remove "
            "it, or choose another --output-dir or --split"
        ) from None
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise OutputError(
            f"could not make '{link}' a link to the images in '{image_dir}': {reason}"
        ) from None
    own = next((path for path in link.rglob("*") if path.name != _MARKER and _is_own(path)), None)
    if own is not None:
        raise OutputError(
            f"'{own}' is no link that was made here, so '{link}' is not replaced: move it away, or "
            "choose another --output-dir or --split"
        )
    with atomic_directory(link, overwrite=True, marker=_MARKER, parts=("*",)) as folder:
        (folder / _MARKER).touch()
        for file in sorted(files):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).symlink_to(real_path(target / file))


def _is_own(path: Path) -> bool:
    return not path.is_symlink() and not path.is_dir()


def _holds_more(folder: Path, files: Set[PurePosixPath]) -> bool:
    """Tell whether a folder holds images that are not among these files, or folders that none of them is in.

    Those are not gone into: it may be the root of a machine.
    """
    folders = {parent for file in files for parent in file.parents}
    for inner in folders:
        with os.scandir(folder / inner) as entries:
            for entry in entries:
                path = inner / entry.name
                if entry.name.startswith(".") or path in files:
                    continue
                if path not in folders and (entry.is_dir() or path.suffix.lower() in IMAGE_SUFFIXES):
                    return True
    return False
