"""Images of several requests that go through the network together.

An image waits for others of its size whose requests ask the network for the same; not longer than it is told,
and no longer than the network is idle for want of a full batch whose time has come.  While the network is
busy, batches fill.  An image whose request has a deadline goes alone: it would make the others' answers
coarser too.
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
from asag_deploy.serving.options import Deadline

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
    deadline: Deadline
    members: list[_Waiting] = field(default_factory=list)
    due: bool = False
    """Whether its first image has waited long enough."""
    timer: asyncio.TimerHandle | None = None
    """What is to happen if it has not begun by then: it comes due, or its deadline passes."""


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

    async def detect(
        self, image: RgbImage, size: tuple[int, int], options: CallOptions, deadline: Deadline
    ) -> Detections:
        """Detect in an image that reaches the network at this size (height, width).

        The detector gets what is left of the deadline when it begins.  Raises what the detector does, and
        RefusedError once the deadline has passed before that.
        """
        loop = asyncio.get_running_loop()
        result: asyncio.Future[Detections] = loop.create_future()
        alone = deadline.ever
        key: Hashable = object() if alone else (size, tuple(sorted(options.items())))
        group = next(
            (g for g in self._groups if g.key == key and len(g.members) < self._batching.images), None
        )
        if group is None:
            group = _Group(key, options, deadline, due=alone)
            self._groups.append(group)
            if alone:
                group.timer = loop.call_later(max(deadline.seconds_left, 0), self._refuse, group)
            else:
                group.timer = loop.call_later(self._batching.wait_ms / 1000, self._come_due, group)
        group.members.append(_Waiting(image, result))
        self._begin_what_can()
        return await result

    def _come_due(self, group: _Group) -> None:
        group.due = True
        self._begin_what_can()

    def _refuse(self, group: _Group) -> None:
        """Refuse what waits in a group whose deadline has passed: the network has had no time for it."""
        self._drop(group)
        for member in group.members:
            if not member.result.done():
                member.result.set_exception(group.deadline.refusal())

    def _drop(self, group: _Group) -> None:
        """Let a group go: it begins, or never will."""
        if group in self._groups:
            self._groups.remove(group)
        if group.timer is not None:
            group.timer.cancel()

    def _begin_what_can(self) -> None:
        while self._free:
            ready = (g for g in self._groups if g.due or len(g.members) >= self._batching.images)
            group = next(ready, None)
            if group is None:
                return
            if group.deadline.seconds_left <= 0:  # its timer is about to say so
                self._refuse(group)
                continue
            self._drop(group)
            wanted = [member for member in group.members if not member.result.done()]
            if wanted:
                self._begin(wanted, group.deadline.added_to(group.options))

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
