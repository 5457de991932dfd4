"""Where images come from: files, folders, globs, videos and cameras, as one stream of frames."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2

from asag_deploy.errors import AsagError, SourceError
from asag_deploy.images.reading import RgbImage, as_rgb, quiet_opencv, read_image

IMAGE_SUFFIXES = frozenset(
    ".avif .bmp .dib .gif .jp2 .jpe .jpeg .jpg .png .ppm .tif .tiff .webp".split()  # noqa: SIM905
)
VIDEO_SUFFIXES = frozenset(".avi .m4v .mkv .mov .mp4 .mpeg .mpg .webm .wmv".split())  # noqa: SIM905

_CAMERA = "camera:"


@dataclass(frozen=True, kw_only=True)
class Source:
    """One image file, video file or camera."""

    name: str
    """The path, or `camera:` and the camera's number, device or address."""
    kind: Literal["image", "video", "camera"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Frame:
    """One image of a source."""

    source: Source
    index: int
    """Position in its source, from 0."""
    number: int
    """Position in the whole stream, from 0; an image that could not be read has one too."""
    image: RgbImage
    fps: float | None = None
    """Frames a second of a video or camera, if it says."""

    @property
    def name(self) -> str:
        """What to call it in messages: the source, with the frame's index in a video or camera."""
        return self.source.name if self.source.kind == "image" else f"{self.source.name}#{self.index}"


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A source that gave nothing, or broke off."""

    source: str
    message: str
    """One sentence that names the source."""


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What a list of arguments stands for."""

    sources: tuple[Source, ...]
    failures: tuple[Failure, ...]
    """Folders and globs in which nothing was found."""


def list_sources(arguments: Sequence[str]) -> Listing:
    """Find the sources that arguments stand for, each once, in the order given.

    - a file: a video if its suffix says so, else an image (even if it does not exist: reading it will tell)
    - a folder: the images and videos directly in it, by name
    - a glob, where `**` goes through subfolders: the images and videos it matches, by name
    - a camera: `camera:0`, or just `0`; also `camera:/dev/video0` and `camera:rtsp://...`

    Raises SourceError if they stand for nothing at all.
    """
    sources: dict[Source, None] = {}
    failures = []
    for argument in arguments:
        try:
            sources.update(dict.fromkeys(_expand(argument)))
        except SourceError as error:
            failures.append(Failure(source=argument, message=str(error)))
    if not sources:
        raise SourceError(_why_none(failures))
    return Listing(sources=tuple(sources), failures=tuple(failures))


def count_frames(sources: Sequence[Source]) -> int | None:
    """Count the frames of all sources, as far as their headers say; None with a camera."""
    total = 0
    for source in sources:
        if source.kind == "camera":
            return None
        total += 1 if source.kind == "image" else _video_length(source)
    return total


def iter_frames(sources: Sequence[Source]) -> Iterator[Frame | Failure]:
    """Yield every frame of every source, in order, and a Failure for one that cannot be read.

    A camera goes on until it fails or the caller stops asking.
    """
    number = 0
    for source in sources:
        for item in _image_frame(source, number) if source.kind == "image" else _video_frames(source, number):
            yield item
            number += 1


def _why_none(failures: Sequence[Failure]) -> str:
    if not failures:
        return "no sources given: pass image files, folders, videos or cameras"
    if len(failures) == 1:
        return failures[0].message
    return f"none of the {len(failures)} sources has images or videos, beginning with: {failures[0].message}"


def _expand(argument: str) -> list[Source]:
    path = Path(argument)
    if argument.startswith(_CAMERA):
        if argument == _CAMERA:
            raise SourceError("'camera:' names no camera: write camera:0 for the first one")
        return [Source(name=argument, kind="camera")]
    if path.is_dir():
        return _known_files(sorted(path.iterdir()), f"folder '{argument}' holds no images or videos")
    if path.is_file():
        return [_file(path)]
    if argument.isdecimal():
        return [Source(name=f"{_CAMERA}{int(argument)}", kind="camera")]
    if glob.has_magic(argument):
        # Not Path.glob, which takes no absolute pattern and does not enter links to folders.
        matches = [Path(match) for match in sorted(glob.glob(argument, recursive=True))]  # noqa: PTH207
        return _known_files(matches, f"'{argument}' matches no images or videos")
    return [_file(path)]


def _known_files(paths: Sequence[Path], otherwise: str) -> list[Source]:
    """Keep what is an image or video by its suffix; hidden files are other programs' business."""
    known = IMAGE_SUFFIXES | VIDEO_SUFFIXES
    found = [
        _file(path)
        for path in paths
        if path.suffix.lower() in known and not path.name.startswith(".") and path.is_file()
    ]
    if not found:
        raise SourceError(otherwise)
    return found


def _file(path: Path) -> Source:
    is_video = path.suffix.lower() in VIDEO_SUFFIXES
    return Source(name=str(path), kind="video" if is_video else "image")


def _image_frame(source: Source, number: int) -> Iterator[Frame | Failure]:
    try:
        yield Frame(source=source, index=0, number=number, image=read_image(source.name))
    except AsagError as error:
        yield Failure(source=source.name, message=str(error))


def _video_frames(source: Source, first_number: int) -> Iterator[Frame | Failure]:
    index = 0
    with _capture(source) as capture:
        fps = capture.get(cv2.CAP_PROP_FPS)
        while True:
            with quiet_opencv():
                more, image = capture.read()
            if not more:
                break
            yield Frame(
                source=source,
                index=index,
                number=first_number + index,
                image=as_rgb(image, "bgr"),
                fps=fps if fps > 0 else None,
            )
            index += 1
    if index == 0:
        yield Failure(source=source.name, message=_why_nothing(source))
    elif source.kind == "camera":
        yield Failure(source=source.name, message=f"'{source.name}' broke off after {index} frames")


@contextmanager
def _capture(source: Source) -> Iterator[cv2.VideoCapture]:
    with quiet_opencv():
        address = source.name.removeprefix(_CAMERA) if source.kind == "camera" else source.name
        is_number = source.kind == "camera" and address.isdecimal()
        capture = cv2.VideoCapture(int(address)) if is_number else cv2.VideoCapture(address)
    try:
        yield capture
    finally:
        capture.release()


def _video_length(source: Source) -> int:
    with _capture(source) as capture:
        return max(int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), 1)


def _why_nothing(source: Source) -> str:
    if source.kind == "camera":
        return f"'{source.name}' gives no pictures: check that it is connected and not in use"
    if not Path(source.name).exists():
        return f"video '{source.name}' does not exist"
    return f"video '{source.name}' has no frames that OpenCV can read; it is damaged or of another format"
