"""The requests in hand: how many there may be, who is next, and the network that they wait for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING, NamedTuple, Protocol, Unpack, overload

import numpy as np

from asag_deploy.bundle.manifest import Manifest
from asag_deploy.call_options import CallOptions
from asag_deploy.detections import Detections
from asag_deploy.errors import plural
from asag_deploy.images.reading import ChannelOrder, RgbImage, checked_header, decode_image
from asag_deploy.processing.preprocess import resized_shape
from asag_deploy.serving.batching import Batcher, Batching
from asag_deploy.serving.exchange import Timed
from asag_deploy.serving.limits import Limits, RefusedError, unavailable
from asag_deploy.serving.metrics import Metrics
from asag_deploy.serving.options import Asked, Deadline
from asag_deploy.serving.requests import ClientGone, watched
from asag_deploy.serving.texts import megapixels
from asag_deploy.timing import since

if TYPE_CHECKING:
    from starlette.requests import Request

_PATIENCE_SECONDS = 0.2
"""How long a request waits for a place: those before it may be of clients that are just seen to have gone."""


class ImageFile(NamedTuple):
    """An image file as it came."""

    data: bytes
    name: str = "request body"
    """What sentences call it."""


class ServedDetector(Protocol):
    """What is asked of a detector: `asag_deploy.Detector`, or what stands in for it."""

    @property
    def manifest(self) -> Manifest:
        """What the bundle says about itself."""
        ...

    @overload
    def __call__(
        self, images: RgbImage, *, channel_order: ChannelOrder = ..., **options: Unpack[CallOptions]
    ) -> Detections: ...

    @overload
    def __call__(
        self, images: list[RgbImage], *, channel_order: ChannelOrder = ..., **options: Unpack[CallOptions]
    ) -> list[Detections]: ...


class _Worked(NamedTuple):
    """What was found in an image, and what that took beside the detector's own time."""

    found: Detections
    decode_ms: float
    wait_ms: float
    """For others of its batch."""


class Service:
    """A detector, and the requests that there are for it.  Its methods are for the event loop's thread."""

    def __init__(
        self, detector: ServedDetector, limits: Limits, metrics: Metrics, *, batching: Batching, warm_up: bool
    ) -> None:
        """Serve a detector within limits; warm_up: detect once in each thread before it is ready."""
        self.manifest = detector.manifest
        self.in_hand = 0
        """Requests whose bodies are read, that wait, or that are detected in."""
        self.warm = not warm_up
        """Whether the network has been tried, if that was asked for."""
        self._detector, self._limits, self._metrics = detector, limits, metrics
        self._places = asyncio.Semaphore(limits.requests + limits.queue)
        # While batches are detected in, one more is decoded.
        together = batching.images
        self._at_once = limits.requests if together == 1 else (limits.requests + 1) * together
        self._turns = asyncio.Semaphore(self._at_once)
        self._pool = ThreadPoolExecutor(limits.requests, thread_name_prefix="asag-serve")
        self._decoders: ThreadPoolExecutor | None = None
        self._batcher: Batcher | None = None
        if together > 1:
            self._decoders = ThreadPoolExecutor(limits.requests, thread_name_prefix="asag-serve-decode")
            self._batcher = Batcher(
                batching,
                self._detect_together,
                pool=self._pool,
                batches=limits.requests,
                began=metrics.batched,
            )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Warm up, and let go of the threads in the end; one that is still detecting ends once it has."""
        warming = None if self.warm else asyncio.create_task(self._warm_up())
        try:
            yield
        finally:
            if warming is not None:
                warming.cancel()
            for pool in (self._pool, self._decoders):
                if pool is not None:
                    pool.shutdown(wait=False, cancel_futures=True)

    async def _warm_up(self) -> None:
        """Detect in a grey picture of the network's size; a failure is for the first request to tell."""
        spec = self.manifest.preprocessing
        grey = np.full(
            (spec.shorter_side, min(spec.longer_side, spec.shorter_side * 4 // 3), 3), 127, np.uint8
        )
        loop = asyncio.get_running_loop()
        calls = [
            loop.run_in_executor(self._pool, lambda: self._detector(grey, channel_order="rgb"))
            for _ in range(self._limits.requests)
        ]
        await asyncio.gather(*calls, return_exceptions=True)
        self.warm = True

    @asynccontextmanager
    async def place(self, deadline: Deadline) -> AsyncIterator[None]:
        """Take one of the places that there are, before the body is read, so that memory is bounded too.

        Raises RefusedError if there is none, or the deadline has passed.
        """
        try:
            async with asyncio.timeout(min(_PATIENCE_SECONDS, deadline.seconds_left)):
                await self._places.acquire()
        except TimeoutError:
            deadline.check()
            raise unavailable(
                f"the server is busy with {plural(self.in_hand, 'image')}, which is all it takes; try again "
                "soon",
                "busy",
            ) from None
        self._in_hand(1)
        try:
            yield
        finally:
            self._in_hand(-1)
            self._places.release()

    async def detect(
        self, request: Request, images: Sequence[ImageFile], asked: Asked, deadline: Deadline
    ) -> list[Timed]:
        """Detect in the image files of a request, as long as somebody waits for the answer.

        Everything is found that the network finds; `Asked.of` says what of it is asked for.  Raises
        ClientGone, RefusedError for want of time or for an image that is too large, and what the detector
        raises; with several images, for the first that fails.
        """
        width = asyncio.Semaphore(self._at_once)  # one request is not before all others with all its images

        async def one(file: ImageFile, gone: asyncio.Task[None]) -> Timed:
            async with width:
                begin = time.perf_counter()
                await self._turn(gone, deadline)
                queue_ms = since(begin)
                worked = await asyncio.shield(self._begin(file, asked.call, deadline))
                queue_ms += worked.wait_ms
                self._metrics.detected(worked.found, queue_ms=queue_ms, decode_ms=worked.decode_ms)
                return Timed(worked.found, queue_ms)

        async with watched(request) as gone:
            tasks = [asyncio.create_task(one(file, gone)) for file in images]
            try:
                return list(await asyncio.gather(*tasks))
            finally:
                for task in tasks:
                    task.cancel()

    async def _turn(self, gone: asyncio.Task[None], deadline: Deadline) -> None:
        """Wait until the network has time; raise ClientGone or RefusedError if that comes to nothing."""
        deadline.check()
        turn = asyncio.create_task(self._turns.acquire())
        given = False
        self._metrics.queue_length.inc()
        try:
            left = min(self._limits.queue_seconds, deadline.seconds_left)
            await asyncio.wait((turn, gone), timeout=max(left, 0), return_when=asyncio.FIRST_COMPLETED)
            given = turn.done() and not gone.done()
        finally:
            self._metrics.queue_length.dec()
            if not given and not turn.cancel():
                self._turns.release()
        if gone.done():
            raise ClientGone
        if not given:
            deadline.check()
            raise unavailable(
                f"the network had no time within {self._limits.queue_seconds:g} seconds; try again later",
                "no_time",
            )

    def _begin(self, file: ImageFile, options: CallOptions, deadline: Deadline) -> asyncio.Future[_Worked]:
        """Begin with an image whose turn it is; the turn ends when the work does, whoever waits for it.

        Until then it takes memory, and the network's time.
        """
        work: asyncio.Future[_Worked]
        if self._batcher is None:
            loop = asyncio.get_running_loop()
            work = loop.run_in_executor(self._pool, self._detect_alone, file, options, deadline)
        else:
            work = asyncio.ensure_future(self._in_a_batch(self._batcher, file, options, deadline))
        work.add_done_callback(lambda _: self._turns.release())
        return work

    async def _in_a_batch(
        self, batcher: Batcher, file: ImageFile, options: CallOptions, deadline: Deadline
    ) -> _Worked:
        begin = time.perf_counter()
        image, decode_ms = await asyncio.get_running_loop().run_in_executor(
            self._decoders, self._decode, file
        )
        size = resized_shape(image.shape[0], image.shape[1], self.manifest.preprocessing)
        found = await batcher.detect(image, size, options, deadline)
        waited = since(begin) - decode_ms - found.times_ms.get("total", 0.0)
        return _Worked(found, decode_ms, max(waited, 0.0))

    def _detect_alone(self, file: ImageFile, options: CallOptions, deadline: Deadline) -> _Worked:
        image, decode_ms = self._decode(file)
        found = self._detector(image, channel_order="rgb", **deadline.added_to(options))
        return _Worked(found, decode_ms, 0.0)

    def _detect_together(self, images: list[RgbImage], options: CallOptions) -> list[Detections]:
        return self._detector(images, channel_order="rgb", **options)

    def _decode(self, file: ImageFile) -> tuple[RgbImage, float]:
        """Return the image, and how many milliseconds that took."""
        begin = time.perf_counter()
        data, name = file
        header, most = checked_header(data, name), self._limits.max_pixels
        if header.height * header.width > most:
            raise RefusedError(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"'{name}' has {header.width} x {header.height} pixels, "
                f"more than the {megapixels(most)} "
                "that this server takes; send a smaller one",
                reason="too_many_pixels",
            )
        return decode_image(data, name, max_pixels=most), since(begin)

    def _in_hand(self, more: int) -> None:
        self.in_hand += more
        self._metrics.in_flight.set(self.in_hand)
