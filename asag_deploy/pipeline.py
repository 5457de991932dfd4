"""Images through a detector without waiting for one another: reading, detecting and writing overlap.

Three things go on at once:

reading     one thread takes the items of an iterable, which decodes files and videos, and sorts them into
            batches of images that reach the network at one size
detecting   as many threads as there are concurrent requests prepare batches and run the network
writing     the caller's own thread, which gets the results in the order of the items

No more than a fixed number of images are in flight, from before one is read until the caller has asked for
what comes after it: a caller that takes its time holds up the reading.  Which images make up a batch depends
on their sizes and order alone, never on timing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from threading import Event, Semaphore, Thread
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar, Unpack

import numpy as np

from asag_deploy.bundle.manifest import Manifest
from asag_deploy.call_options import CallOptions
from asag_deploy.detections import Detections
from asag_deploy.errors import ConfigError, EngineUnfitError, GpuMemoryError, ImageError, SourceError
from asag_deploy.images.reading import (
    ChannelOrder,
    ImageLike,
    RgbImage,
    as_rgb,
    check_channel_order,
    read_image,
    refuse_encoded,
)
from asag_deploy.images.sources import Frame, Source, iter_frames, list_sources
from asag_deploy.interruption import leave_behind
from asag_deploy.processing.preprocess import resized_shape

T = TypeVar("T")
Frames = Literal["first", "all"]
"""What an animated or multi-page image gives."""

Refusal = ImageError | EngineUnfitError | GpuMemoryError
"""An image that is none, that the engines were not built for, or that there is no room for on the GPU."""
_REFUSALS = (ImageError, EngineUnfitError, GpuMemoryError)

_READ_AHEAD = 3
"""Batches in flight beyond those being detected in: one that is read, one that waits, one that is written."""
_REACH = 2
"""Batches' worth of items after which an image waits no longer for others of its size."""
_PATIENCE_S = 5.0
"""How long closing waits for an iterable that is in the middle of giving its next item."""


class ImageDetector(Protocol):
    """What is asked of a detector: an `asag_deploy.detector.Detector`, or a stand-in."""

    @property
    def manifest(self) -> Manifest:
        """What the network is, and how images are resized for it."""
        ...

    @property
    def requests(self) -> int:
        """How many calls at once it was loaded for."""
        ...

    def __call__(
        self, images: list[RgbImage], *, channel_order: ChannelOrder = ..., **options: Unpack[CallOptions]
    ) -> list[Detections]:
        """Detect objects in a batch of images."""
        ...


def detect_all(
    detector: ImageDetector,
    items: Iterable[T],
    *,
    image_of: Callable[[T], RgbImage | None],
    batch_size: int = 1,
    requests: int | None = None,
    options: CallOptions | None = None,
) -> Generator[tuple[T, Detections | Refusal | None], None, None]:
    """Yield every item with what the detector finds in its image, in order.

    image_of: an item's image, uint8 (H, W, 3) RGB, or None for an item that only keeps its place.
    batch_size: images of one size that go through the network together; 1 is each by itself.
    requests: batches that are detected in at once; None for what the detector was loaded for.
    options: what each call asks of the detector.

    An image that the detector refuses comes with its ImageError, EngineUnfitError or GpuMemoryError, and the
    rest go on: a batch that it refuses is halved, and halved again.  Any other exception, of the iterable
    too, is raised where its item would come, which ends the stream.  `close` stops it early: it waits for
    what is under way, and drops the rest.  Raises ConfigError for a number less than 1.
    """
    wanted = detector.requests if requests is None else requests
    for name, number in (("batch_size", batch_size), ("requests", wanted)):
        if number < 1:
            raise ConfigError(f"{name} is {number}; expected at least 1")
    spec = detector.manifest.preprocessing
    return _run(
        _Work(
            detect=lambda images: detector(images, channel_order="rgb", **(options or {})),
            image_of=image_of,
            size_of=lambda image: resized_shape(image.shape[0], image.shape[1], spec),
            batch_size=batch_size,
            requests=wanted,
        ),
        items,
    )


def stream(
    detector: ImageDetector,
    sources: ImageLike | Iterable[ImageLike],
    *,
    batch_size: int,
    requests: int | None,
    channel_order: ChannelOrder,
    frames: Frames,
    options: CallOptions,
) -> Generator[Detections, None, None]:
    """Do what `Detector.stream` does, which says what the arguments are and what is raised."""
    check_channel_order(channel_order)
    if frames not in ("first", "all"):
        raise ConfigError(f"unknown frames '{frames}'; expected 'first' or 'all'")
    refuse_encoded(sources)
    if isinstance(sources, str | os.PathLike | np.ndarray):
        given: Iterable[ImageLike] = [sources]
    elif isinstance(sources, Iterable):
        given = sources
    else:
        raise ConfigError(f"expected images or names of sources to stream, got {type(sources).__name__}")
    pairs = detect_all(
        detector,
        _read_all(given, channel_order, all_frames=frames == "all"),
        image_of=lambda named: named.image,
        batch_size=batch_size,
        requests=requests,
        options=options,
    )
    return _raised_in_turn(pairs)


class _Named(NamedTuple):
    """An image of a stream, and what to call it."""

    name: str
    image: RgbImage
    time: float | None = None


def _raised_in_turn(
    pairs: Generator[tuple[_Named, Detections | Refusal | None], None, None],
) -> Generator[Detections, None, None]:
    with closing(pairs):
        for named, found in pairs:
            if isinstance(found, Detections):
                yield found if named.time is None else replace(found, time_s=named.time)
            elif found is not None:  # every item has an image
                raise type(found)(f"{named.name}: {found}") from found


def _read_all(
    given: Iterable[ImageLike], channel_order: ChannelOrder, *, all_frames: bool
) -> Iterator[_Named]:
    """Yield the images of arrays and of everything that names stand for (see `list_sources`), one by one."""
    number = 0
    for item in given:
        if isinstance(item, str | os.PathLike):
            for source in list_sources([os.fspath(item)], all_frames=all_frames).sources:
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
        yield _Named(f"'{frame.name}'", frame.image, frame.time)


@dataclass(frozen=True, kw_only=True)
class _Work(Generic[T]):
    """What is to be done with the items, and how many at a time."""

    detect: Callable[[list[RgbImage]], list[Detections]]
    image_of: Callable[[T], RgbImage | None]
    size_of: Callable[[RgbImage], Hashable]
    """What images of one batch have in common."""
    batch_size: int
    requests: int

    @property
    def in_flight(self) -> int:
        """The most images there are at any time."""
        return self.batch_size * (self.requests + _READ_AHEAD)

    @property
    def reach(self) -> int:
        """How many items later an image no longer waits for others.

        It is less than `in_flight`: else the reading could wait for a result to be taken while that result
        waits for images to be read.
        """
        return _REACH * self.batch_size


class _Pending(NamedTuple):
    """An image that is to be detected in, and who waits for it."""

    image: RgbImage
    result: Future[Detections | None]


class _Slot(NamedTuple, Generic[T]):
    """An item's place among the results."""

    item: T
    result: Future[Detections | None]


def _run(work: _Work[T], items: Iterable[T]) -> Generator[tuple[T, Detections | Refusal | None], None, None]:
    pool = ThreadPoolExecutor(work.requests, thread_name_prefix="asag-detecting")
    reader = _Reader(work, items, pool)
    reader.start()
    try:
        while (slot := reader.order.get()) is not None:
            if isinstance(slot, BaseException):
                raise slot
            yield slot.item, _outcome(slot.result)
            reader.room.release()
    finally:
        reader.stop()
        pool.shutdown(wait=True, cancel_futures=True)
        reader.join(_PATIENCE_S)
        if reader.is_alive():
            leave_behind(reader)


def _outcome(result: Future[Detections | None]) -> Detections | Refusal | None:
    try:
        return result.result()
    except _REFUSALS as error:
        return error


class _Reader(Thread, Generic[T]):
    """Reads items while there is room, and has them detected in batch by batch."""

    def __init__(self, work: _Work[T], items: Iterable[T], pool: ThreadPoolExecutor) -> None:
        # A daemon, because an iterable that never gives another item must not keep the process alive.
        super().__init__(name="asag-reading", daemon=True)
        self.order: SimpleQueue[_Slot[T] | BaseException | None] = SimpleQueue()
        """What was read, in order; at the end None, or the exception that ended it."""
        self.room = Semaphore(work.in_flight)
        self._work = work
        self._items = items
        self._pool = pool
        self._stopped = Event()
        self._batches = BatchesBySize[_Pending](work.batch_size, work.reach)

    def stop(self) -> None:
        """Read nothing more; what is being read is dropped."""
        self._stopped.set()
        self.room.release()

    def run(self) -> None:
        """Read to the end."""
        end: BaseException | None = None
        try:
            iterator = iter(self._items)
            try:
                self._read(iterator)
            finally:
                if isinstance(iterator, Generator):  # closes the video that it reads
                    iterator.close()
        except BaseException as error:  # whatever it is, it is for the caller to see
            end = error
        for batch in self._batches.rest():
            self._submit(batch)
        self.order.put(end)

    def _read(self, iterator: Iterator[T]) -> None:
        number = 0
        while True:
            self.room.acquire()
            if self._stopped.is_set():
                return
            try:
                item = next(iterator)
            except StopIteration:
                return
            self._sort(number, item)
            number += 1

    def _sort(self, number: int, item: T) -> None:
        image = self._work.image_of(item)
        result: Future[Detections | None] = Future()
        self.order.put(_Slot(item, result))
        if image is None:
            result.set_result(None)
        else:
            self._batches.add(number, self._work.size_of(image), _Pending(image, result))
        for batch in self._batches.ready(number):
            self._submit(batch)

    def _submit(self, batch: list[_Pending]) -> None:
        try:
            self._pool.submit(_detect, self._work.detect, batch)
        except RuntimeError as error:  # no thread can be started, or the stream was closed meanwhile
            for pending in batch:
                pending.result.set_exception(error)


def _detect(detect: Callable[[list[RgbImage]], list[Detections]], batch: list[_Pending]) -> None:
    """Detect in a batch; if it is refused, in its halves, so that all but an image that is refused go on."""
    try:
        found = list(zip(batch, detect([pending.image for pending in batch]), strict=True))
    except _REFUSALS as error:
        if len(batch) == 1:
            batch[0].result.set_exception(error)
            return
    except BaseException as error:  # raised in the caller's thread, at the first image of the batch
        for pending in batch:
            pending.result.set_exception(error)
        return
    else:
        for pending, detections in found:
            pending.result.set_result(detections)
        return
    # Out here, where the error is gone, and with it the memory that it refers to.
    middle = len(batch) // 2
    for half in (batch[:middle], batch[middle:]):
        _detect(detect, half)


@dataclass
class _Group(Generic[T]):
    first: int
    members: list[T] = field(default_factory=list)


class BatchesBySize(Generic[T]):
    """Sorts numbered things into batches of one size each, none waiting for more than `reach` others."""

    def __init__(self, batch_size: int, reach: int) -> None:
        self._batch_size = batch_size
        self._reach = reach
        self._open: dict[Any, _Group[T]] = {}

    def add(self, number: int, size: Hashable, member: T) -> None:
        """Take the next one; `number` counts everything that has come, things without a size too."""
        self._open.setdefault(size, _Group(number)).members.append(member)

    def ready(self, number: int) -> list[list[T]]:
        """Return batches that are full or have waited long enough by `number`, the first begun first."""
        due = [
            size
            for size, group in self._open.items()
            if len(group.members) == self._batch_size or number - group.first >= self._reach
        ]
        return [self._open.pop(size).members for size in due]

    def rest(self) -> list[list[T]]:
        """Return the batches that are left, full or not."""
        left = [group.members for group in self._open.values()]
        self._open.clear()
        return left
