"""Results on disk: pictures, videos, JSON and COCO results, each written whole or not at all."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from asag_deploy.atomic import atomic_write
from asag_deploy.detections import Detections
from asag_deploy.errors import AsagError, ConfigError, OutputError
from asag_deploy.images.reading import RgbImage
from asag_deploy.images.sources import Frame, Source
from asag_deploy.images.writing import PICTURE_SUFFIXES, VideoFile, write_picture
from asag_deploy.interruption import held_back

_DEFAULT_FPS = 25.0


class JsonList:
    """A JSON array in a file, written item by item.

    A context manager: the file appears when it ends well.  Raises OutputError when it cannot be written, and
    leaves nothing behind then.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._separator = "\n"
        with ExitStack() as stack:
            temporary = stack.enter_context(atomic_write(path))
            self._file = stack.enter_context(temporary.open("w", encoding="utf-8"))
            self._file.write("[")
            self._stack = stack.pop_all()

    def append(self, item: object) -> None:
        """Add an item (any JSON value)."""
        text = json.dumps(item, ensure_ascii=False, allow_nan=False)
        try:
            self._file.write(self._separator + text)
        except OSError as error:
            self._stack.__exit__(type(error), error, error.__traceback__)  # raises it as an OutputError
        self._separator = ",\n"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._stack:
            if error is not None:
                raise error
            if not self._file.closed:
                self._file.write("\n]\n")


class ResultWriter:
    """Everything `asag-detect` writes about a stream of frames: pictures or videos, JSON, COCO results.

    As a context manager it completes its files even when one of the project's own exceptions or Ctrl-C ends
    the stream, because what was found until then is worth having; any other exception drops them.
    Raises ConfigError if an output would overwrite a source, OutputError if one cannot be written.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        output_dir: Path | None = None,
        json_file: Path | None = None,
        coco_file: Path | None = None,
        trace: bool = False,
    ) -> None:
        self._trace = trace
        self._pictures = plan_pictures(sources, output_dir) if output_dir is not None else {}
        self._image_ids = coco_image_ids(sources)
        self._video: VideoFile | None = None
        self._video_source: Source | None = None
        outputs = [*self._pictures.values(), *(file for file in (json_file, coco_file) if file is not None)]
        _check_outputs(outputs, sources)
        with ExitStack() as stack:
            self._json = stack.enter_context(JsonList(json_file)) if json_file is not None else None
            self._coco = stack.enter_context(JsonList(coco_file)) if coco_file is not None else None
            stack.pop_all()  # from here on `__exit__` completes them

    def add(self, frame: Frame, detections: Detections) -> None:
        """Write one frame's results."""
        image_id = self._image_ids.get(frame.source, frame.number + 1)
        if self._json is not None:
            place = {"source": frame.source.name, "frame": frame.index, "image_id": image_id}
            self._json.append(place | detections.to_json())
        if self._coco is not None:
            for result in detections.to_coco(image_id):
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
            for file in (self._json, self._coco, self._video):
                if file is not None:
                    stack.callback(file.__exit__, kind, error, traceback)

    def _add_picture(self, frame: Frame, picture: RgbImage) -> None:
        path = self._pictures[frame.source]
        if frame.source.kind == "image":
            write_picture(path, picture)
            return
        if self._video is None or self._video_source != frame.source:
            self._end_video()
            height, width = picture.shape[:2]
            self._video = VideoFile(path, fps=frame.fps or _DEFAULT_FPS, height=height, width=width)
            self._video_source = frame.source
        self._video.add(picture)

    def _end_video(self) -> None:
        video, self._video = self._video, None
        if video is not None:
            with video:
                pass


def plan_pictures(sources: Sequence[Source], folder: Path) -> dict[Source, Path]:
    """Choose a path in `folder` for the picture or video of each source, no two the same.

    Images keep their name, with .png where their format cannot be written; videos and cameras become .mp4.
    Sources of the same name in different folders are numbered.
    """
    plan: dict[Source, Path] = {}
    taken: Counter[str] = Counter()
    for source in sources:
        name = Path(source.name)
        stem, suffix = name.stem, name.suffix
        if source.kind == "camera":
            stem = "".join(c if c.isalnum() else "-" for c in source.name)
        if source.kind != "image":
            suffix = ".mp4"
        elif suffix.lower() not in PICTURE_SUFFIXES:
            suffix = ".png"
        candidate = f"{stem}{suffix}"
        while taken[candidate.lower()]:
            taken[f"{stem}{suffix}".lower()] += 1
            candidate = f"{stem}-{taken[f'{stem}{suffix}'.lower()]}{suffix}"
        taken[candidate.lower()] += 1
        plan[source] = folder / candidate
    return plan


def coco_image_ids(sources: Sequence[Source]) -> dict[Source, int]:
    """Return the image ids that COCO file names hold (000000000139.jpg is 139), if every source has its own.

    Empty otherwise: then images are numbered from 1 in the order they are read.
    """
    stems = [Path(source.name).stem for source in sources]
    if not all(source.kind == "image" for source in sources) or not all(stem.isdecimal() for stem in stems):
        return {}
    ids = {source: int(stem) for source, stem in zip(sources, stems, strict=True)}
    return ids if len(set(ids.values())) == len(ids) else {}


def _check_outputs(outputs: Sequence[Path], sources: Sequence[Source]) -> None:
    inputs = {Path(source.name).resolve() for source in sources if source.kind != "camera"}
    for path in outputs:
        if path.resolve() in inputs:
            raise ConfigError(f"'{path}' is one of the sources: write the results to another folder")
        if path.is_dir():
            raise OutputError(f"could not write '{path}': it is a folder")
    if len({path.resolve() for path in outputs}) < len(outputs):
        raise ConfigError("two results would be written to the same file: give each its own name")
