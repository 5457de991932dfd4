"""Runners: whatever is timed.  Each takes a batch of pictures, and says how long it took and with what.

The detector is not touched, and so not slowed down where nothing is measured: the network it runs is wrapped.
Times are the host's.  A backend that returns before its device has finished shows the wait where the host
next needs a value, which is at the latest in `download`; the sum is the same.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from numpy.typing import NDArray

from asag_deploy.backends.hooked_network import HookedNetwork
from asag_deploy.backends.network import Network
from asag_deploy.bundle.manifest import Level, Manifest, ProbeLevel, Probing
from asag_deploy.detector import Detector
from asag_deploy.images.reading import RgbImage
from asag_deploy.loop.loop import LoopChoice
from asag_deploy.loop.stages import Array, LevelOutputs
from asag_deploy.loop.stopping import StopRule
from asag_deploy.timing import since

STAGES = ("normalize", "backbone", "probe_p4", "probe_p3", "decoder")
PHASES = ("preprocess", "upload", *STAGES, "select", "loop", "download", "postprocess")
"""Everything a call does, in this order; `loop` is what the host does between stages."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One call."""

    total_ms: float
    phases_ms: dict[str, float] = field(default_factory=dict)
    exits: tuple[Level, ...] = ()
    """The level at which each picture stopped."""


class Runner(Protocol):
    """Something that detects, and can be timed."""

    @property
    def name(self) -> str:
        """In tables."""
        ...

    def __call__(self, images: Sequence[RgbImage], max_level: Level | None) -> Run:
        """Detect in a batch of RGB images, probing no deeper than `max_level`."""
        ...


class StoppedRunner:
    """A runner with a manual stop of its own, to be compared with the same one that goes on."""

    def __init__(self, runner: Runner, max_level: Level) -> None:
        self.name = f"{runner.name} (stopped at {max_level})"
        self._runner, self._max_level = runner, max_level

    def __call__(self, images: Sequence[RgbImage], max_level: Level | None) -> Run:
        """Detect in a batch of RGB images."""
        return self._runner(images, self._max_level)


class DetectorRunner:
    """A detector: the split loop over a network, whichever backend runs it."""

    def __init__(
        self,
        name: str,
        manifest: Manifest,
        network: Network,
        rule: Callable[[Level | None], StopRule],
        loop: LoopChoice = "auto",
        deadline_ms: float | None = None,
    ) -> None:
        """Take the network that `manifest` describes; `loop` and `deadline_ms` are as for `Detector.load`."""
        self.name = name
        self.network = network
        self._manifest = manifest
        self._timed = TimedNetwork(network)
        self._rule = rule
        self._loop = network.loop(loop, deadline_ms)
        self._deadline_ms = deadline_ms

    def detector(self, max_level: Level | None = None) -> Detector:
        """Return the detector as it is used, untimed: what the accuracy is measured with."""
        return self._detector(self.network, max_level)

    def __call__(self, images: Sequence[RgbImage], max_level: Level | None) -> Run:
        """Detect in a batch of RGB images."""
        detector = self._detector(self._timed, max_level)
        self._timed.begin()
        start = time.perf_counter()
        found = detector(images, channel_order="rgb")
        total = since(start)
        return Run(
            total_ms=total,
            phases_ms=split(self._timed, found[0].times_ms),
            exits=tuple(detections.trace.exit_level for detections in found),
        )

    def _detector(self, network: Network, max_level: Level | None) -> Detector:
        rule = self._rule(max_level)
        return Detector(self._manifest, network, rule, loop=self._loop, deadline_ms=self._deadline_ms)


class TimedNetwork(HookedNetwork):
    """A network, and the milliseconds that its parts have taken since `begin`.

    The loop on the network's device runs the stages by itself: then `loop` is all of them.
    """

    def __init__(self, network: Network) -> None:
        super().__init__(network, before=self._stage_begins, after=self._stage_ends)
        self.times_ms: defaultdict[str, float] = defaultdict(float)
        self.fetched_at_the_end_ms = 0.0
        """Downloads since the decoder ran, which the detector counts as post-processing."""
        self._begun = 0.0

    def begin(self) -> None:
        """Forget the times of the call before."""
        self.times_ms.clear()
        self.fetched_at_the_end_ms = 0.0

    def _stage_begins(self, name: str, inputs: Mapping[str, Array]) -> None:
        self._begun = time.perf_counter()

    def _stage_ends(self, name: str, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        self.times_ms[name] += since(self._begun)
        if name == "decoder":
            self.fetched_at_the_end_ms = 0.0

    def upload(self, array: NDArray[Any]) -> Array:
        """Upload a host array, timed."""
        start = time.perf_counter()
        uploaded = super().upload(array)
        self.times_ms["upload"] += since(start)
        return uploaded

    def download(self, array: Array) -> NDArray[Any]:
        """Download an array to the host, timed."""
        start = time.perf_counter()
        downloaded = super().download(array)
        taken = since(start)
        self.times_ms["download"] += taken
        self.fetched_at_the_end_ms += taken
        return downloaded

    def select(
        self, probing: Probing, level: ProbeLevel, before: LevelOutputs, image_size: Array
    ) -> tuple[Array, Array]:
        """Find where the next level looks, timed."""
        start = time.perf_counter()
        found = super().select(probing, level, before, image_size)
        self.times_ms["select"] += since(start)
        return found


def split(timed: TimedNetwork, call_ms: Mapping[str, float]) -> dict[str, float]:
    """Split the call that has just ended, of which the detector reports `call_ms`, into its phases.

    Their sum is the call's total.
    """
    phases = {name: timed.times_ms[name] for name in PHASES if name in timed.times_ms}
    phases["preprocess"] = call_ms["preprocess"]
    if "normalize" not in phases:  # done by OpenCV, or by a kernel with upload, resizing and padding
        phases["normalize"] = call_ms["normalize"]
    phases["postprocess"] = max(call_ms["postprocess"] - timed.fetched_at_the_end_ms, 0.0)
    phases["loop"] = max(call_ms["total"] - sum(phases.values()), 0.0)
    return {name: phases[name] for name in PHASES if name in phases}
