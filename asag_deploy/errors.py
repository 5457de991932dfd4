"""Every exception this project raises on purpose.

AsagError
├── BundleError              a bundle that cannot be used
│   ├── BundleNotFoundError      no such directory, or no manifest in it
│   ├── BundleCorruptError       truncated, altered, or not what its manifest says
│   └── BundleVersionError       written by a newer release, or by a much older one
├── CheckpointError          a checkpoint that cannot be read, or is of another variant
├── TrainingError            a training run that cannot go on
├── DataError                a data set that cannot be read, or does not fit the network
├── FieldError               data from JSON that is not of the type that is declared; callers say where
├── ConfigError (ValueError) an option that makes no sense, or two that exclude each other
├── ImageError (ValueError)  an image that cannot be read, or an array that is no image
├── BackendError             a backend that this machine lacks, or that failed
│   ├── CaptureError             the probing loop could not be made one graph on the GPU
│   └── GpuMemoryError           there is no room on the GPU for something
├── EngineError              an engine that cannot be built or used
│   ├── EngineMissingError       none was built for this GPU
│   ├── EngineStaleError         from another graph or release of its library, or damaged
│   └── EngineUnfitError         for another GPU or other shapes
├── DownloadError            an address of a bundle or a checkpoint that gave none
├── SourceError              a file, folder, video or camera that gives no frames
├── OutputError              results that could not be written
├── ExportError              a network that could not be exported
└── ParityError              an exported bundle that does not compute what the network computes

Every message is one sentence that says what is wrong, where, and what to do about it.  The command line
tools print it and exit with code 2.
"""

from __future__ import annotations

import re
import unicodedata
from typing import NamedTuple

_LONGEST_MESSAGE = 1200


class AsagError(Exception):
    """Base of every exception the project raises on purpose.

    As text it is one line that can be shown anywhere, whatever the names of files and the contents that it
    quotes: control characters are written as escapes, and of a message that is too long the middle is left
    out.
    """

    def __str__(self) -> str:
        return one_line(super().__str__())


class BundleError(AsagError):
    """A bundle that cannot be used."""


class BundleNotFoundError(BundleError):
    """The directory does not exist or holds no manifest."""


class BundleCorruptError(BundleError):
    """A file of the bundle is missing, truncated, altered or malformed."""


class BundleVersionError(BundleError):
    """The bundle was written by a newer release than this one, or by a much older one."""


class CheckpointError(AsagError):
    """A checkpoint that cannot be read, or that belongs to another variant."""


class TrainingError(AsagError):
    """A training run that cannot go on, or be resumed."""


class DataError(AsagError):
    """A data set that cannot be read, or that does not fit the network."""


class FieldError(AsagError):
    """Data from JSON that is not what its schema says: half a sentence that names the field.

    What reads a file turns it into the error of that file.
    """


class ConfigError(AsagError, ValueError):
    """An option that makes no sense, or two that exclude each other."""


class ImageError(AsagError, ValueError):
    """An image that cannot be read, or an array that is not an image."""


class BackendError(AsagError):
    """A backend that this machine lacks, or that failed."""


class CaptureError(BackendError):
    """The probing loop could not be made one graph that runs on the GPU."""


class GpuMemoryError(BackendError):
    """There is no room on the GPU, or in the host's pinned memory, for what is asked for."""


class EngineError(AsagError):
    """An engine that cannot be built or used."""


class EngineMissingError(EngineError):
    """No engine was built for the GPU at hand."""


class EngineStaleError(EngineError):
    """The engine was built from another graph or by another release of its library, or it is damaged."""


class EngineUnfitError(EngineError):
    """The engine was built for another GPU, or for other shapes."""


class DownloadError(AsagError):
    """An address of a bundle or checkpoint that gave nothing, or nothing that could be kept."""


class SourceError(AsagError):
    """A file, folder, video or camera that gives no frames."""


class OutputError(AsagError):
    """Results that could not be written."""


class ExportError(AsagError):
    """A network that could not be exported."""


class ParityError(AsagError):
    """An exported bundle that does not compute what the network computes."""


class Problem(NamedTuple):
    """What keeps something from running on this machine; as text, both parts in one sentence."""

    what: str
    """What is missing, or does not fit."""
    remedy: str | None = None
    """What to do about it, such as the command that installs it; None if nothing helps."""

    def __str__(self) -> str:
        return self.what if self.remedy is None else f"{self.what}; {self.remedy}"


def one_line(text: str) -> str:
    """Return text that takes one line of a terminal and does nothing to it, however it came about."""
    if not text.isprintable():
        text = "".join(_shown(character) for character in text)
    if len(text) <= _LONGEST_MESSAGE:
        return text
    half = _LONGEST_MESSAGE // 2
    return f"{text[:half]} ... {text[-half:]}"


def _shown(character: str) -> str:
    """Return a character, or its escape if it controls anything, or cannot be encoded; spaces stay."""
    if character.isprintable() or unicodedata.category(character) == "Zs":
        return character
    return character.encode("unicode_escape").decode("ascii")


def plural(count: int, one: str, several: str | None = None) -> str:
    """Return how many of something there are, in words: 1 frame, 2 frames, 2 boxes, 2 classes.

    several: what follows another number than 1, where it is not `one` with an ending: `1 image is read`.
    """
    if several is None:
        several = f"{one}{'es' if one.endswith(('s', 'x', 'ch', 'sh')) else 's'}"
    return f"{count} {one if count == 1 else several}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type if it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def reason_of(error: BaseException) -> str:
    """Return why the system refused something, without its number: no such file or directory.

    What pyarrow says of a file of this machine is cut to that, too.  Other errors say their first line.
    """
    said = getattr(error, "strerror", None)
    if not said:
        return first_line(error)
    reason = re.sub(r".* Detail: \[errno \d+\] ", "", first_line(Exception(said)))
    return reason if "'" in reason else reason.lower()  # a name in it stays as it is
