"""`Detector.stream`: detections in all that arrays and names of sources stand for, image after image."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from asag_deploy.detections import Detections
from asag_deploy.errors import ConfigError, ImageError, SourceError
from asag_deploy.images.reading import (
    ChannelOrder,
    ImageLike,
    RgbImage,
    as_rgb,
    check_channel_order,
    read_image,
)
from asag_deploy.images.sources import Frame, Source, iter_frames, list_sources
from asag_deploy.pipeline import Refusal, detect_all

if TYPE_CHECKING:
    from asag_deploy.detector import Detector


def stream(
    detector: Detector,
    sources: ImageLike | Iterable[ImageLike],
    *,
    batch_size: int,
    requests: int | None,
    channel_order: ChannelOrder,
) -> Generator[Detections, None, None]:
    """What `Detector.stream` does, which says what the arguments are and what is raised."""
    check_channel_order(channel_order)
    if isinstance(sources, str | os.PathLike | np.ndarray):
        given: Iterable[ImageLike] = [sources]
    elif isinstance(sources, Iterable):
        given = sources
    else:
        raise ConfigError(f"expected images or names of sources to stream, got {type(sources).__name__}")
    pairs = detect_all(
        detector,
        _read_all(given, channel_order),
        image_of=lambda named: named.image,
        batch_size=batch_size,
        requests=requests,
    )
    return _results(pairs)


class _Named(NamedTuple):
    """An image of a stream, and what to call it."""

    name: str
    image: RgbImage


def _results(
    pairs: Generator[tuple[_Named, Detections | Refusal | None], None, None],
) -> Generator[Detections, None, None]:
    with closing(pairs):
        for named, found in pairs:
            if isinstance(found, Detections):
                yield found
            elif found is not None:  # every item has an image
                raise type(found)(f"{named.name}: {found}") from found


def _read_all(given: Iterable[ImageLike], channel_order: ChannelOrder) -> Iterator[_Named]:
    """The images of arrays and of everything that names stand for (see `list_sources`), one by one."""
    number = 0
    for item in given:
        if isinstance(item, str | os.PathLike):
            for source in list_sources([os.fspath(item)]).sources:
                for named in _read_source(source):
                    yield named
                    number += 1
            continue
        name = f"image {number} of the stream, counted from 0"
        try:
            image = as_rgb(item, channel_order)
        except ImageError as error:
            raise ImageError(f"{name}: {error}") from None
        yield _Named(name, image)
        number += 1


def _read_source(source: Source) -> Iterator[_Named]:
    if source.kind == "image":
        yield _Named(f"'{source.name}'", read_image(source.name))
        return
    for frame in iter_frames([source]):
        if not isinstance(frame, Frame):
            raise SourceError(frame.message)
        yield _Named(f"'{frame.name}'", frame.image)
