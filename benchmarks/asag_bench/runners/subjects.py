"""What is timed: each takes a batch of pictures and says how long it took, and with what."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from asag_bench.measuring.phases import TimedNetwork, split
from asag_deploy.backends.network import Network
from asag_deploy.bundle.manifest import Level, Manifest
from asag_deploy.detector import Detector
from asag_deploy.images.reading import RgbImage
from asag_deploy.loop.loop import LoopChoice
from asag_deploy.loop.stopping import StopRule


@dataclass(frozen=True, kw_only=True)
class Run:
    """One call."""

    total_ms: float
    phases_ms: dict[str, float] = field(default_factory=dict)
    exits: tuple[Level, ...] = ()
    """The level at which each picture stopped."""


class Subject(Protocol):
    """Something that detects, and can be timed."""

    @property
    def name(self) -> str:
        """In tables."""
        ...

    def __call__(self, images: Sequence[RgbImage], max_level: Level | None) -> Run:
        """Detect in a batch of RGB images, probing no deeper than `max_level`."""
        ...


class Stopped:
    """A subject with a manual stop of its own, to be compared with the same one that goes on."""

    def __init__(self, subject: Subject, max_level: Level) -> None:
        self.name = f"{subject.name} (stopped at {max_level})"
        self._subject, self._max_level = subject, max_level

    def __call__(self, images: Sequence[RgbImage], max_level: Level | None) -> Run:
        """Detect in a batch of RGB images."""
        return self._subject(images, self._max_level)


class DetectorSubject:
    """A detector: the split loop over a network, whichever backend runs it."""

    def __init__(
        self,
        name: str,
        manifest: Manifest,
        network: Network,
        rule: Callable[[Level | None], StopRule],
        loop: LoopChoice = "auto",
    ) -> None:
        """The network that `manifest` describes; `loop` is what `Detector.load` takes."""
        self.name = name
        self.network = network
        self._manifest = manifest
        self._timed = TimedNetwork(network)
        self._rule = rule
        self._loop = network.loop(loop)

    def detector(self, max_level: Level | None = None) -> Detector:
        """The detector as it is used, untimed: what the accuracy is measured with."""
        return Detector(self._manifest, self.network, self._rule(max_level), loop=self._loop)

    def __call__(self, images: Sequence[RgbImage], max_level: Level | None) -> Run:
        """Detect in a batch of RGB images."""
        detector = Detector(self._manifest, self._timed, self._rule(max_level), loop=self._loop)
        self._timed.begin()
        start = time.perf_counter()
        found = detector(images, channel_order="rgb")
        total = (time.perf_counter() - start) * 1000
        return Run(
            total_ms=total,
            phases_ms=split(self._timed, found[0].times_ms),
            exits=tuple(detections.trace.exit_level for detections in found),
        )
