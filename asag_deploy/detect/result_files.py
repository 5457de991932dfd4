"""Results on disk: pictures, videos, JSON and COCO results, each written whole or not at all."""

from __future__ import annotations

import contextlib
import glob
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

from asag_deploy.atomic import atomic_write, real_path
from asag_deploy.detect.coco_ids import CocoIds, made_ids
from asag_deploy.detections import Detections
from asag_deploy.errors import AsagError, ConfigError, OutputError, SourceError
from asag_deploy.images.reading import RgbImage
from asag_deploy.images.sources import Frame, Source
from asag_deploy.images.video_writing import VideoFile, is_own_video
from asag_deploy.images.videos import import_av
from asag_deploy.images.writing import PICTURE_SUFFIXES, is_own_picture, write_picture
from asag_deploy.interruption import held_back
from asag_deploy.replacing import check_own_file

_LONGEST_NAME = 255
"""Bytes that a file's name may have."""
_LONGEST_START = 2**16
"""Bytes that the first of a list of results goes on for at most until its image's id."""
_OWN = "what asag-detect wrote"


class JsonList:
    """A JSON array in a file, written item by item.

    A context manager: the file appears when it ends well.  Raises OutputError when it cannot be written.
    Where the disk is full, the items until then appear as a whole array; otherwise nothing is left behind.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = path
        self._items = 0
        self._ends = [1]
        """Bytes up to the end of the last two items."""
        with ExitStack() as stack:
            temporary = stack.enter_context(atomic_write(path))
            self._file = stack.enter_context(temporary.open("wb", buffering=0))
            self._write(b"[")
            self._stack = stack.pop_all()

    def append(self, item: object) -> None:
        """Add an item (any JSON value).

        Text is UTF-8; an item with a file name that is none is written in ASCII, a byte that stands for
        nothing as \\udc80 to \\udcff, as Python does.
        """
        text = json.dumps(item, ensure_ascii=False, allow_nan=False)
        try:
            encoded = text.encode()
        except UnicodeEncodeError:
            encoded = json.dumps(item, allow_nan=False).encode()
        try:
            self._write((b",\n" if self._items else b"\n") + encoded)
        except OSError as error:
            self._end_early(error)
        self._items += 1
        self._ends = [self._ends[-1], self._file.tell()]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file.closed:  # ended early
            return
        if error is not None:
            self._stack.__exit__(kind, error, traceback)
            return
        try:
            self._write(b"\n]\n")
        except OSError as full:
            self._end_early(full)
        self._stack.close()

    def _write(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            left = left[self._file.write(left) or 0 :]

    def _end_early(self, error: OSError) -> NoReturn:
        """Take back what is there in part, so that what was whole ends well; raises OutputError."""
        reason = (error.strerror or str(error)).lower()
        failure = OutputError(f"could not write '{self._path}': {reason}")
        for end in reversed(self._ends):
            try:
                self._file.truncate(end)
                self._file.seek(end)
                self._write(b"\n]\n")
            except OSError:
                self._items -= 1
                continue
            self._stack.close()
            kept = f"its first {self._items} results are kept" if self._items > 0 else "it is empty"
            raise OutputError(f"{failure}; {kept}") from error
        self._stack.__exit__(OutputError, failure, None)
        raise failure from error


class ResultWriter:
    """Everything `asag-detect` writes about a stream of frames: pictures or videos, JSON, COCO results.

    As a context manager it completes its files even when one of the project's own exceptions or Ctrl-C ends
    the stream, because what was found until then is worth having; any other exception drops them.
    Raises ConfigError if an output would overwrite a source, OutputError if one would replace what no run
    of ours wrote, or cannot be written.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        output_dir: Path | None = None,
        json_file: Path | None = None,
        coco_file: Path | None = None,
        coco_ids: CocoIds | None = None,
        inputs: Sequence[Path] = (),
        trace: bool = False,
    ) -> None:
        """Open the files.

        coco_ids: None for `made_ids`.  inputs: files and folders beside the sources that must stay as they
        are, such as the bundle.
        """
        self._trace = trace
        self._pictures = plan_pictures(sources, output_dir) if output_dir is not None else {}
        self._ids = made_ids(sources) if coco_ids is None else coco_ids
        self._video: VideoFile | None = None
        self._video_source: Source | None = None
        self.notes: list[str] = []
        """What the user should know about what was written, one sentence each."""
        files = [file for file in (json_file, coco_file) if file is not None]
        pictures = [path for source, path in self._pictures.items() if source.kind != "pages"]
        _check_outputs([*pictures, *files], sources, inputs)
        _check_replaced(self._pictures, files)
        if any(source.kind == "camera" for source in self._pictures):  # which may be read without PyAV
            import_av("writing annotated videos")
        with ExitStack() as stack:
            self._json = stack.enter_context(JsonList(json_file)) if json_file is not None else None
            self._coco = stack.enter_context(JsonList(coco_file)) if coco_file is not None else None
            stack.pop_all()  # from here on `__exit__` completes them

    def add(self, frame: Frame, detections: Detections) -> None:
        """Write one frame's results."""
        image_id = self._ids.image(frame.source, frame.number)
        if self._json is not None:
            place = {"source": frame.source.name, "frame": frame.index, "image_id": image_id}
            place["time_s"] = None if frame.time is None else round(frame.time, 6)
            self._json.append(place | detections.to_json())
        if self._coco is not None and image_id is not None:
            for result in detections.to_coco(image_id, categories=self._ids.categories):
                self._coco.append(result)
        if frame.source in self._pictures:
            picture = detections.plot(frame.image, trace=self._trace, channel_order="rgb")
            self._add_picture(frame, picture)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, AsagError | KeyboardInterrupt):
            kind = error = None
        with held_back(), ExitStack() as stack:  # completes the rest even if one fails
            for file in (self._json, self._coco):
                if file is not None:
                    stack.callback(file.__exit__, kind, error, traceback)
            if error is None:
                self._end_video()
            elif self._video is not None:
                self._video.__exit__(kind, error, traceback)

    def _add_picture(self, frame: Frame, picture: RgbImage) -> None:
        path = self._pictures[frame.source]
        if frame.source.kind == "pages":
            write_picture(path / f"page-{frame.index + 1}{_picture_suffix(frame.source)}", picture)
            return
        if frame.source.kind == "image":
            write_picture(path, picture)
            return
        with held_back():  # so that a video has a frame, and every frame is whole
            self._add_frame(frame, picture, path)

    def _add_frame(self, frame: Frame, picture: RgbImage, path: Path) -> None:
        if self._video is None or self._video_source != frame.source:
            self._end_video()
            height, width = picture.shape[:2]
            self._video = VideoFile(path, height=height, width=width)
            self._video_source = frame.source
        video = self._video
        try:
            video.add(picture, time=frame.time or 0.0, duration=frame.duration)
        except OutputError:
            self._video = None  # it has ended by itself
            raise

    def _end_video(self) -> None:
        video, self._video = self._video, None
        if video is None or self._video_source is None:
            return
        path = self._pictures[self._video_source]
        if not video.is_h264:
            self.notes.append(
                f"'{path}' is MPEG-4 part 2, which browsers do not play: this PyAV has no encoder for H.264"
            )
        if video.scaled:
            self.notes.append(
                f"the pictures of '{self._video_source.name}' change their size: {video.scaled} of them are "
                f"scaled to the first one's in '{path}'"
            )
        with video:
            pass


def plan_pictures(sources: Sequence[Source], folder: Path) -> dict[Source, Path]:
    """Choose a path in `folder` for the picture or video of each source, no two the same.

    Images keep their name, with .png where their format cannot be written; videos, animations and cameras
    become .mp4; pages get a folder.  Sources of the same name in different folders are numbered.
    """
    plan: dict[Source, Path] = {}
    taken: Counter[str] = Counter()
    for source in sources:
        stem = Path(source.name).stem
        if not source.is_file:
            stem = "".join(c if c.isalnum() else "-" for c in source.name)
        if source.kind == "pages":
            suffix = "-pages"
        else:
            suffix = _picture_suffix(source) if source.kind == "image" else ".mp4"
        first = _fitting(stem, suffix)
        candidate = first
        while taken[candidate.lower()]:
            taken[first.lower()] += 1
            candidate = _fitting(stem, f"-{taken[first.lower()]}{suffix}")
        taken[candidate.lower()] += 1
        plan[source] = folder / candidate
    return plan


def _picture_suffix(source: Source) -> str:
    suffix = Path(source.name).suffix
    return suffix if suffix.lower() in PICTURE_SUFFIXES else ".png"


def _fitting(stem: str, suffix: str) -> str:
    """Join the two, with as much of the stem as a file's name may have."""
    while len(os.fsencode(stem + suffix)) > _LONGEST_NAME:
        stem = stem[:-1]
    return stem + suffix


def _check_outputs(outputs: Sequence[Path], sources: Sequence[Source], inputs: Sequence[Path]) -> None:
    """Refuse to write over what is read, into the bundle, or twice into one file, links or not."""
    read = {_identity(Path(source.name)): source.name for source in sources if source.is_file}
    read |= {_identity(path): str(path) for path in inputs if not path.is_dir()}
    folders = [real_path(path) for path in inputs if path.is_dir()]
    written: dict[object, Path] = {}
    for path in outputs:
        identity = _identity(path)
        if identity in read:
            raise ConfigError(f"'{path}' is one of the sources: write the results to another folder")
        if any(folder in real_path(path).parents for folder in folders):
            raise ConfigError(f"'{path}' lies in the bundle, which stays as it is: choose another place")
        if path.is_dir():
            raise OutputError(f"could not write '{path}': it is a folder")
        if identity in written and identity != _identity(Path(os.devnull)):
            raise ConfigError("two results would be written to the same file: give each its own name")
        written[identity] = path


def _check_replaced(pictures: Mapping[Source, Path], lists: Sequence[Path]) -> None:
    """Refuse to replace what no run of ours made, such as an annotation file or a photograph."""
    for path in lists:
        check_own_file(path, _is_list_of_results, "results")
    for source, path in pictures.items():
        if source.kind == "pages":
            for page in sorted(path.glob(f"page-*{glob.escape(_picture_suffix(source))}")):
                check_own_file(page, is_own_picture, _OWN)
        elif source.kind == "image":
            check_own_file(path, is_own_picture, _OWN)
        else:
            check_own_file(path, _is_own_video, _OWN)


def _is_list_of_results(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(_LONGEST_START).lstrip()
    first = start[1:].lstrip()
    return start.startswith(b"[") and (first[:1] in (b"", b"]") or b'"image_id"' in first)


def _is_own_video(path: Path) -> bool:
    with contextlib.suppress(SourceError):  # without PyAV there is no writing either
        return is_own_video(path)
    return True


def _identity(path: Path) -> object:
    """Return the same for two paths exactly if they lead to the same file."""
    resolved = real_path(path)  # also through folders that are yet to be made
    try:
        found = resolved.stat()
    except (OSError, ValueError):
        return resolved
    return found.st_dev, found.st_ino
