"""Where images come from: files, folders, globs, videos, addresses and cameras, as one stream of frames."""

from __future__ import annotations

import glob
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import cv2

from asag_deploy.errors import AsagError, SourceError, plural
from asag_deploy.images.addresses import as_file, is_address, is_live, normal, without_secrets
from asag_deploy.images.decoder_log import quiet_opencv
from asag_deploy.images.formats import image_header
from asag_deploy.images.frames import count_image_frames, read_frames
from asag_deploy.images.reading import RgbImage, as_rgb, read_image
from asag_deploy.images.video_containers import MJPEG_SUFFIXES, container_of, holds_pictures
from asag_deploy.images.videos import Video
from asag_deploy.plain_numbers import LARGEST, unsigned


def _suffixes(text: str) -> frozenset[str]:
    return frozenset(f".{word}" for word in text.split())


def _suffix(path: Path) -> str:
    return path.suffix.lower().rstrip()


IMAGE_SUFFIXES = _suffixes(
    "apng avif avifs bmp dib gif heic heif j2c j2k jfi jfif jif jp2 jpc jpe jpeg jpf jpg jpx mpo pam pbm pgm "
    "png pnm ppm ras sr tif tiff webp"
)
VIDEO_SUFFIXES = _suffixes(
    "360 3g2 3gp 3gpp asf avi dav divx dvr-ms evo f4v flv gxf h264 hevc insv ismv ivf lrv m1v m2p m2ts m2v "
    "m4v mj2 mjpeg mjpg mk3d mkv mov mp2v mp4 mp4v mpe mpeg mpg mpv mpv2 mxf nsv nut obu ogm ogv qt rm rmvb "
    "vob vro webm wmv wtv xvid y4m"
)
_SHARED_SUFFIXES = _suffixes(
    "264 265 amv avc bik dat dv h265 m2t mod mts ogg ogx smk tod tp trp ts vid video"
)
"""Suffixes of videos and of other things (TypeScript, music, data): in a folder the content decides."""

_PLAYLISTS = _suffixes("m3u8")
"""Lists of videos, which are one together; in a folder the videos themselves lie beside them."""

_MOST_LOOKED_AT = 10_000
"""Files and folders below a folder that are looked at for the sake of a better sentence."""

_MAY_HAVE_SEVERAL = _suffixes("apng avif avifs gif png tif tiff webp")
Kind = Literal["image", "animation", "pages", "video", "camera"]
_CAMERA = "camera:"


@dataclass(frozen=True, kw_only=True)
class Source:
    """One image file, video or camera."""

    name: str
    """The path; the address without its secrets; or `camera:` and the camera's number or device."""
    kind: Kind
    """An image of which all frames are wanted is an `animation`, or `pages` where they have no times.

    An address that has no end (rtsp and the like) is a camera."""
    address: str | None = field(default=None, repr=False)
    """The whole address of what is no file here, such as rtsp://user:secret@host/stream."""

    @property
    def is_file(self) -> bool:
        """Whether it is a file here, and `name` its path."""
        return self.address is None and self.kind != "camera"


@dataclass(frozen=True, kw_only=True, eq=False)
class Frame:
    """One image of a source."""

    source: Source
    index: int
    """Position in its source, from 0: of a video's frame, or a page."""
    number: int
    """Position in the whole stream, from 0; an image that could not be read has one too."""
    image: RgbImage
    frames: int = 1
    """How many frames or pages an image file has of which this is the first, the only one that is wanted."""
    time: float | None = None
    """Seconds from the start of a video or animation as players show it, or since a camera's first picture.

    None for images and pages."""
    duration: float | None = None
    """Seconds that the frame is shown, if the file says."""

    @property
    def name(self) -> str:
        """What to call it in messages: the source, with the frame's index if it has several."""
        return self.source.name if self.source.kind == "image" else f"{self.source.name}#{self.index}"


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A source that gave nothing, or broke off."""

    source: str
    message: str
    """One sentence that names the source."""
    frames: int = 0
    """How many frames came before it broke off."""


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What a list of arguments stands for."""

    sources: tuple[Source, ...]
    failures: tuple[Failure, ...]
    """Folders and globs in which nothing was found."""


def list_sources(arguments: Sequence[str], *, all_frames: bool = False) -> Listing:
    """Find the sources that arguments stand for, each once, in the order given.

    all_frames: animated and multi-page images give every frame, where they give the first else.

    - a file: a video if its content or else its suffix says so, otherwise an image (even if it does not
      exist: reading it will tell)
    - a folder: the images and videos directly in it, by name; its subfolders are not entered
    - a glob, where `**` goes through subfolders: the images and videos it matches, by name
    - an address: `rtsp://...`, `https://.../clip.mp4` and whatever else PyAV reads; `file://...` is a file
    - a camera: `camera:0`, or just `0`; also `camera:/dev/video0`

    Raises SourceError if they stand for nothing at all.
    """
    sources: dict[Source, None] = {}
    failures = []
    for argument in arguments:
        try:
            found = _expand(argument)
            sources.update(dict.fromkeys(map(_with_all_frames, found) if all_frames else found))
        except SourceError as error:
            failures.append(Failure(source=argument, message=str(error)))
    if not sources:
        raise SourceError(_why_none(failures))
    return Listing(sources=tuple(sources), failures=tuple(failures))


def count_frames(sources: Sequence[Source]) -> int | None:
    """Count the frames of all sources, as far as their headers say; None if one of them does not."""
    total = 0
    for source in sources:
        length = _length(source)
        if length is None:
            return None
        total += length
    return total


def iter_frames(sources: Sequence[Source]) -> Iterator[Frame | Failure]:
    """Yield every frame of every source, in order, and a Failure for one that cannot be read.

    A Failure also follows the frames of a video that breaks off before its end, or is damaged.  A camera goes
    on until it fails or the caller stops asking.
    """
    number = 0
    for source in sources:
        for item in _items(source, number):
            yield item
            number += 1


def _items(source: Source, number: int) -> Iterator[Frame | Failure]:
    if source.kind == "image":
        return _image_frame(source, number)
    if source.kind in ("animation", "pages"):
        return _all_frames(source, number)
    if source.kind == "camera" and source.address is None:
        return _camera_frames(source, number)
    return _video_frames(source, number)


def _why_none(failures: Sequence[Failure]) -> str:
    if not failures:
        return "no sources given: pass image files, folders, videos or cameras"
    if len(failures) == 1:
        return failures[0].message
    return f"none of the {len(failures)} sources has images or videos, beginning with: {failures[0].message}"


def _expand(argument: str) -> list[Source]:
    if not argument:
        raise SourceError("a source is an empty name: name an image, folder, video or camera")
    path = Path(argument)
    if not _is_there(path):  # a file may be called `udp:a.mp4`
        address = argument.removeprefix(_CAMERA)
        if is_address(address):
            return [_at(address)]
        if not address:
            raise SourceError("'camera:' names no camera: write camera:0 for the first one")
        if argument.startswith(_CAMERA):
            return [Source(name=argument, kind="camera")]
        path = as_file(argument)
    try:
        return _expand_path(path, argument)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise SourceError(f"'{path}' cannot be read: {reason.lower()}") from None


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # no name that a file can have
        return False


def _expand_path(path: Path, argument: str) -> list[Source]:
    if path.is_dir():
        return _known_files(sorted(path.iterdir()), f"folder '{path}' holds no images or videos", path)
    if path.is_file():
        return [_file(path)]
    if path.is_char_device() or re.fullmatch("/dev/video[0-9]+", str(path)):
        if not path.name.startswith("video"):
            raise SourceError(f"'{path}' is a device and no camera")
        return [Source(name=f"{_CAMERA}{path}", kind="camera")]
    number = unsigned(argument)
    if number is not None and number <= LARGEST:
        return [Source(name=f"{_CAMERA}{number}", kind="camera")]
    if glob.has_magic(argument):
        # Not Path.glob, which takes no absolute pattern and does not enter links to folders.
        matches = [Path(match) for match in sorted(glob.glob(argument, recursive=True))]  # noqa: PTH207
        return _known_files(matches, f"'{argument}' matches no images or videos")
    return [_file(path)]


def _at(address: str) -> Source:
    address = normal(address)
    kind: Kind = "camera" if is_live(address) else "video"
    return Source(name=without_secrets(address), kind=kind, address=address)


def _known_files(paths: Sequence[Path], otherwise: str, folder: Path | None = None) -> list[Source]:
    """Keep what is an image or video by its suffix; hidden files are other programs' business.

    Raises SourceError that says `otherwise` if there is none, and how to name those of the subfolders of
    `folder`.
    """
    found = [_file(path) for path in paths if _is_wanted(path)]
    if not found:
        if folder is not None and _subfolders_hold_some(folder):
            every = Path(glob.escape(str(folder)), "**", "*")
            otherwise += f", but its subfolders do: give '{every}' in quotes"
        raise SourceError(otherwise)
    return found


def _subfolders_hold_some(folder: Path) -> bool:
    """Tell whether images or videos lie below a folder, as far as a short look shows."""
    seen = 0
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if any(_is_wanted(Path(place, name)) for name in files[:_MOST_LOOKED_AT]):
            return True
        seen += len(folders) + len(files)
        if seen > _MOST_LOOKED_AT:
            break
    return False


def _is_wanted(path: Path) -> bool:
    return not path.name.startswith(".") and _is_known(path) and path.is_file()


def _is_known(path: Path) -> bool:
    suffix = _suffix(path)
    if suffix in _SHARED_SUFFIXES:
        return path.is_file() and holds_pictures(path)
    if not suffix:
        return path.is_file() and (holds_pictures(path) or _begins_as_image(path))
    return suffix in IMAGE_SUFFIXES or suffix in VIDEO_SUFFIXES


def _file(path: Path) -> Source:
    """Take a file for what it holds, whatever it is called; what holds neither, for what it is called."""
    suffix = _suffix(path)
    is_video = suffix in VIDEO_SUFFIXES | _PLAYLISTS or (suffix in _SHARED_SUFFIXES and path.is_fifo())
    if path.is_file():
        is_video = container_of(path) is not None or (is_video and not _holds_image(path))
    return Source(name=str(path), kind="video" if is_video else "image")


def _holds_image(path: Path) -> bool:
    """Tell whether a file with a video's suffix is an image; a row of JPEG images is a video."""
    return _suffix(path) not in MJPEG_SUFFIXES and _begins_as_image(path)


def _begins_as_image(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return image_header(file.read(4096)) is not None
    except OSError:
        return False


def _with_all_frames(source: Source) -> Source:
    if source.kind != "image" or count_image_frames(source.name) == 1:
        return source
    with Path(source.name).open("rb") as file:
        is_tiff = file.read(2) in (b"II", b"MM")
    return Source(name=source.name, kind="pages" if is_tiff else "animation")


def _image_frame(source: Source, number: int) -> Iterator[Frame | Failure]:
    path = Path(source.name)
    try:
        image = read_image(path)
        frames = count_image_frames(path) if _suffix(path) in _MAY_HAVE_SEVERAL else 1
        yield Frame(source=source, index=0, number=number, image=image, frames=frames)
    except AsagError as error:
        yield Failure(source=source.name, message=str(error))


def _all_frames(source: Source, first_number: int) -> Iterator[Frame | Failure]:
    """Yield every frame of an animation, or page; none of those that come before a damaged one is lost."""
    done, time_shown = 0, 0.0
    try:
        for frame in read_frames(source.name):
            yield Frame(
                source=source,
                index=frame.index,
                number=first_number + done,
                image=frame.image,
                time=None if frame.seconds is None else time_shown,
                duration=frame.seconds,
            )
            done += 1
            time_shown += frame.seconds or 0.0
    except AsagError as error:
        yield Failure(source=source.name, message=str(error), frames=done)


def _video_frames(source: Source, first_number: int) -> Iterator[Frame | Failure]:
    try:
        video = Video(source.name, source.address or Path(source.name), live=source.kind == "camera")
    except SourceError as error:
        yield Failure(source=source.name, message=str(error))
        return
    given = 0
    with video:
        for index, frame in enumerate(video.frames()):
            given += 1
            yield Frame(
                source=source,
                index=index,
                number=first_number + index,
                image=frame.image,
                time=frame.time,
                duration=frame.duration,
            )
        if video.problem is not None:
            yield Failure(source=source.name, message=video.problem, frames=given)


def _camera_frames(source: Source, first_number: int) -> Iterator[Frame | Failure]:
    """Yield what OpenCV gets from a camera, at the time at which it comes."""
    index, begun = 0, 0.0
    with _capture(source) as capture:
        while True:
            with quiet_opencv():
                more, image = capture.read()
            if not more:
                break
            now = time.monotonic()
            begun = begun or now
            yield Frame(
                source=source,
                index=index,
                number=first_number + index,
                image=as_rgb(image, "bgr"),
                time=now - begun,
            )
            index += 1
    name = source.name
    if index == 0:
        why = f"'{name}' gives no pictures: check that it is connected and not in use"
        yield Failure(source=name, message=why)
    else:
        message = f"'{name}' broke off after {plural(index, 'frame')}"
        yield Failure(source=name, message=message, frames=index)


@contextmanager
def _capture(source: Source) -> Iterator[cv2.VideoCapture]:
    with quiet_opencv():
        address = source.name.removeprefix(_CAMERA)
        number = unsigned(address)
        if number is None or number > LARGEST:
            capture = cv2.VideoCapture(address)
        else:
            capture = cv2.VideoCapture(number)
    try:
        yield capture
    finally:
        capture.release()


def _length(source: Source) -> int | None:
    """Return how many frames a source has, if its header says; a video that cannot be read counts as one."""
    if source.kind == "camera":
        return None
    if source.kind != "video":
        return 1 if source.kind == "image" else count_image_frames(source.name)
    if not source.is_file or Path(source.name).is_fifo():
        return None  # asking would be a second connection, or take away what is read later
    try:
        with Video(source.name, Path(source.name)) as video:
            return video.length
    except SourceError:
        return 1
