"""Images of several requests that go through the network together.

An image waits for others of its size whose requests ask the network for the same; not longer than it is told,
and no longer than the network is idle for want of a full batch whose time has come.  While the network is
busy, batches fill.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import NamedTuple

from asag_deploy.call_options import CallOptions
from asag_deploy.detections import Detections
from asag_deploy.errors import ConfigError, EngineUnfitError, GpuMemoryError, ImageError
from asag_deploy.images.reading import RgbImage

MOST_IMAGES = 256
_REFUSALS = (ImageError, EngineUnfitError, GpuMemoryError)
"""What may be the fault of one image of a batch alone."""

Detect = Callable[[list[RgbImage], CallOptions], list[Detections]]
"""Detects in images of one size, told what their requests ask for."""


@dataclass(frozen=True, kw_only=True)
class Batching:
    """How images are put together.  Raises ConfigError for values that make no sense."""

    images: int = 1
    """The most of a batch; 1 is each by itself."""
    wait_ms: float = 5.0
    """How long the first image of a batch waits for others."""

    def __post_init__(self) -> None:
        if not 1 <= self.images <= MOST_IMAGES:
            raise ConfigError(f"--batch is {self.images}; it must be from 1 to {MOST_IMAGES}")
        if not self.wait_ms >= 0:
            raise ConfigError(f"--batch-wait-ms is {self.wait_ms:g}; it must be at least 0")


class _Waiting(NamedTuple):
    image: RgbImage
    result: asyncio.Future[Detections]


@dataclass
class _Group:
    """Images that may go together."""

    key: Hashable
    options: CallOptions
    members: list[_Waiting] = field(default_factory=list)
    due: bool = False
    """Whether its first image has waited long enough."""


class Batcher:
    """Collects images into batches and has them detected in.  Its methods are for the event loop's thread."""

    def __init__(
        self,
        batching: Batching,
        detect: Detect,
        *,
        pool: Executor,
        batches: int,
        began: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Detect in `batches` at once, in threads of a pool; `began` is told how many images each has."""
        self._batching, self._detect = batching, detect
        self._pool, self._free, self._began = pool, batches, began
        self._groups: list[_Group] = []  # the first begun first

    async def detect(self, image: RgbImage, size: tuple[int, int], options: CallOptions) -> Detections:
        """Detect in an image that reaches the network at this size (height, width).

        Raises what the detector does.  An image whose request has a deadline goes alone: it would make the
        others' answers coarser too.
        """
        result: asyncio.Future[Detections] = asyncio.get_running_loop().create_future()
        alone = "deadline_ms" in options
        key: Hashable = object() if alone else (size, tuple(sorted(options.items())))
        group = next(
            (g for g in self._groups if g.key == key and len(g.members) < self._batching.images), None
        )
        if group is None:
            group = _Group(key, options, due=alone)
            self._groups.append(group)
            asyncio.get_running_loop().call_later(self._batching.wait_ms / 1000, self._come_due, group)
        group.members.append(_Waiting(image, result))
        self._begin_what_can()
        return await result

    def _come_due(self, group: _Group) -> None:
        group.due = True
        self._begin_what_can()

    def _begin_what_can(self) -> None:
        while self._free:
            ready = (g for g in self._groups if g.due or len(g.members) >= self._batching.images)
            group = next(ready, None)
            if group is None:
                return
            self._groups.remove(group)
            wanted = [member for member in group.members if not member.result.done()]
            if wanted:
                self._begin(wanted, group.options)

    def _begin(self, members: Sequence[_Waiting], options: CallOptions) -> None:
        self._free -= 1
        self._began(len(members))
        images = [member.image for member in members]
        work = asyncio.get_running_loop().run_in_executor(self._pool, self._each, images, options)
        work.add_done_callback(lambda done: self._end(members, done))

    def _end(self, members: Sequence[_Waiting], work: asyncio.Future[list[Detections | Exception]]) -> None:
        self._free += 1
        for number, member in enumerate(members):
            if member.result.done():  # nobody waits for it any more
                continue
            if work.cancelled():
                member.result.cancel()
                continue
            error = work.exception()
            found = work.result()[number] if error is None else error
            if isinstance(found, Detections):
                member.result.set_result(found)
            else:
                member.result.set_exception(found)
        self._begin_what_can()

    def _each(self, images: list[RgbImage], options: CallOptions) -> list[Detections | Exception]:
        """Detect in a batch; if it is refused, in each image alone, so that the others go on."""
        try:
            return list(self._detect(images, options))
        except _REFUSALS as error:
            if len(images) == 1:
                return [error]
        return [one for image in images for one in self._each([image], options)]
