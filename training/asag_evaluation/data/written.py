"""Annotation files that this project writes, links to images, and what is said of a conversion.

Files of its own are told from those that it must not replace.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from asag_deploy.atomic import real_path
from asag_deploy.errors import OutputError, plural


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


def link_images(link: Path, image_dir: Path) -> None:
    """Make `link` a link to a folder of images, unless it leads there already.

    Raises OutputError if something else is there, or it cannot be made.
    """
    target = real_path(image_dir)
    if real_path(link) == target:
        return
    try:
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(target, target_is_directory=True)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise OutputError(
            f"could not make '{link}' a link to the images in '{image_dir}': {reason}"
        ) from None
