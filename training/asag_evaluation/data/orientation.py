"""Whether images were annotated upright or as they are stored, where the two differ.

A photograph may state how it is to be turned.  Viewers and many annotation tools turn it, others do not, and
boxes are only right on the pixels that they were drawn on.  The width and height in the annotation file tell
which these are, unless the picture is square or turned by half: then what the other pictures of the file say
is taken to hold for it too.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from asag_deploy.errors import DataError
from asag_evaluation.data.image_files import StoredSize, stored_size

OrientationRule = Literal["auto", "upright", "stored"]
"""On which pixels images were annotated whose size does not tell; `auto`: as those whose size does."""
Reading = Literal["upright", "stored"]

RULES: tuple[OrientationRule, ...] = get_args(OrientationRule)
OPTION = "--orientation"
_ENOUGH = 25
"""Images whose size tells, after which no more are looked for."""


def add_orientation_option(parser: argparse.ArgumentParser) -> None:
    """Add `--orientation` to a program that opens data sets."""
    parser.add_argument(
        OPTION,
        choices=RULES,
        default="auto",
        metavar="RULE",
        help="on which pixels photographs were annotated that say how to turn them, where their size does "
        "not tell: upright, stored, or auto (the default): as those whose size tells",
    )


@dataclass(frozen=True, kw_only=True)
class SizedImage:
    """An image as its annotations see it."""

    path: Path
    height: int
    width: int


def reading_by_size(size: StoredSize, height: int, width: int) -> Reading | None:
    """Return on which pixels an image of these annotated sides was annotated; None if its size does not tell.

    An image that is not to be turned is `upright`.
    """
    if size.orientation == 1:
        return "upright"
    fits_upright = size.upright == (height, width)
    fits_stored = (size.height, size.width) == (height, width)
    if fits_upright == fits_stored:
        return None
    return "upright" if fits_upright else "stored"


class OrientationChoice:
    """Decides for each image of an annotation file whether it is to be turned; shared by its subsets."""

    def __init__(self, rule: OrientationRule, images: Sequence[SizedImage], where: str) -> None:
        self._rule, self._images, self._where = rule, images, where
        self._inferred: Reading | None = None

    def reading(self, size: StoredSize, image: SizedImage) -> Reading:
        """Return on which pixels an image was annotated.

        Raises DataError if that cannot be known: its size does not tell, and other images contradict each
        other.
        """
        told = reading_by_size(size, image.height, image.width)
        if told is not None:
            return told
        if self._rule != "auto":
            return self._rule
        if self._inferred is None:
            self._inferred = self._infer(image.path)
        return self._inferred

    def survey(self, most: int | None = None) -> Survey:
        """Look at the headers of the first `most` images (None: of all)."""
        chosen = self._images[:most]
        told: dict[Reading | None, list[Path]] = {"upright": [], "stored": [], None: []}
        for image in chosen:
            size = stored_size(image.path)
            if size is not None and size.orientation != 1:
                told[reading_by_size(size, image.height, image.width)].append(image.path)
        return Survey(
            images=len(chosen),
            upright=tuple(told["upright"]),
            stored=tuple(told["stored"]),
            open=tuple(told[None]),
            rule=self._rule,
        )

    def _infer(self, path: Path) -> Reading:
        found: set[Reading] = set()
        for told in _told(self._images):
            found.add(told)
        if len(found) > 1:
            raise DataError(
                f"image '{path}' is to be turned, its size does not tell whether it was annotated so, and "
                f"others in '{self._where}' were annotated in both ways: give {OPTION} upright or stored"
            )
        return next(iter(found), "upright")


def _told(images: Iterable[SizedImage]) -> Iterable[Reading]:
    """Yield what the first images say whose size tells."""
    count = 0
    for image in images:
        size = stored_size(image.path)
        told = (
            None
            if size is None or size.orientation == 1
            else reading_by_size(size, image.height, image.width)
        )
        if told is not None:
            yield told
            count += 1
            if count == _ENOUGH:
                return


@dataclass(frozen=True, kw_only=True)
class Survey:
    """The images that state an orientation, by what the size of their annotations says."""

    images: int
    """How many were looked at."""
    upright: tuple[Path, ...]
    """Annotated as they are shown."""
    stored: tuple[Path, ...]
    """Annotated as they are stored."""
    open: tuple[Path, ...]
    """Square or turned by half, so that their size does not tell."""
    rule: OrientationRule

    @property
    def is_contradictory(self) -> bool:
        """Whether some images cannot be read, since those whose size tells contradict each other."""
        return self.rule == "auto" and bool(self.open and self.upright and self.stored)

    def describe(self) -> str | None:
        """Return what was found and which setting changes it, in a line; None if no image is to be turned."""
        total = len(self.upright) + len(self.stored) + len(self.open)
        if not total:
            return None
        line = (
            f"{total} of {self.images} images state an orientation: by their size {len(self.upright)} were "
            f"annotated upright and {len(self.stored)} as stored"
        )
        if not self.open:
            return line
        line += f", and of {len(self.open)} it does not tell (the first is '{self.open[0].name}')"
        if self.is_contradictory:
            return f"{line}: give {OPTION} upright or {OPTION} stored"
        if self.rule != "auto":
            return f"{line}: read as {OPTION} {self.rule} says"
        guess, other = ("stored", "upright") if self.stored else ("upright", "stored")
        why = "like the others" if self.stored or self.upright else "for want of others"
        return f"{line}: read as {OPTION} {guess}, {why}; if boxes lie on nothing, give {OPTION} {other}"
