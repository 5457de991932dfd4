"""The pictures that the page offers: those that come with the package, or a folder of one's own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from asag_deploy.bundle.manifest import Manifest
from asag_deploy.errors import ConfigError
from asag_deploy.examples import PHOTOGRAPHS_CLASSES, photographs
from asag_deploy.images.drawing import Picture
from asag_deploy.images.sources import IMAGE_SUFFIXES
from asag_deploy.images.writing import write_picture
from asag_deploy.playground.looking import browsers_show, read

OWN = Path(__file__).parent / "examples"
"""Generated scenes; `tests/support/playground_examples.py` draws them."""
MOST = 12
_KNOWN_TO_BROWSERS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"})
_THUMBNAIL = 160
"""Pixels of the longer side."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """A picture to begin with."""

    file: Path
    """What is detected in; browsers show it."""
    thumbnail: Path


def own_examples(manifest: Manifest) -> list[Path]:
    """Return pictures that come with the package: photographs for a network of their classes, else scenes."""
    if tuple(category.name for category in manifest.categories) == PHOTOGRAPHS_CLASSES:
        return photographs()
    return list_examples(OWN)


def list_examples(folder: Path) -> list[Path]:
    """Return the images of a folder by name, the first dozen.

    By their names' ends; folders are not entered.  Raises ConfigError if there is no such folder, or no image
    in it.
    """
    if not folder.is_dir():
        raise ConfigError(f"--examples: there is no folder '{folder}'")
    named = (file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
    files = sorted(file for file in named if file.is_file())
    if not files:
        raise ConfigError(f"--examples: the folder '{folder}' holds no images")
    return files[:MOST]


def prepare(files: list[Path], folder: Path) -> list[Example]:
    """Copy pictures to `folder`, each with a thumbnail, for the server to show.

    Raises ImageError for a file that is no image.
    """
    result = []
    for number, file in enumerate(files):
        picture = read(file, str(file))
        place = folder / f"{number:02d}"
        place.mkdir(parents=True)
        if file.suffix.lower() in _KNOWN_TO_BROWSERS and browsers_show(file):
            copy = place / file.name
            copy.write_bytes(file.read_bytes())
        else:
            copy = place / f"{file.stem}.png"
            write_picture(copy, picture)
        thumbnail = folder / f"{number:02d}.jpg"
        write_picture(thumbnail, _thumbnail(picture))
        result.append(Example(file=copy, thumbnail=thumbnail))
    return result


def _thumbnail(picture: Picture) -> Picture:
    """Return the picture with a longer side of 160 pixels at most."""
    height, width = picture.shape[:2]
    factor = min(_THUMBNAIL / max(height, width), 1)
    size = max(round(width * factor), 1), max(round(height * factor), 1)
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)
