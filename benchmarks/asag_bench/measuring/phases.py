"""Where the time of a call goes: a network that takes note of what it is asked, and the split of a call.

The detector is not touched, and so not slowed down where nothing is measured: the network it runs is wrapped.
Times are the host's.  A backend that returns before its device has finished shows the wait where the host
next needs a value, which is at the latest in `download`; the sum is the same.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from asag_deploy.backends.hooked_network import WrappedNetwork
from asag_deploy.backends.network import Network
from asag_deploy.bundle.manifest import ProbeLevel, Probing
from asag_deploy.loop.stages import Array, LevelOutputs, Stage

STAGES = ("normalize", "backbone", "probe_p4", "probe_p3", "decoder")
PHASES = ("preprocess", "upload", *STAGES, "select", "loop", "download", "postprocess")
"""Everything a call does, in this order; `loop` is what the host does between stages."""


class TimedNetwork(WrappedNetwork):
    """A network, and the milliseconds that its parts have taken since `begin`.

    The loop on the network's device runs the stages by itself: then `loop` is all of them.
    """

    def __init__(self, network: Network) -> None:
        super().__init__(network)
        self.times_ms: defaultdict[str, float] = defaultdict(float)
        self.fetched_at_the_end_ms = 0.0
        """Downloads since the decoder ran, which the detector counts as post-processing."""

    def begin(self) -> None:
        """Forget the times of the call before."""
        self.times_ms.clear()
        self.fetched_at_the_end_ms = 0.0

    def stage(self, name: str) -> Stage:
        """The stage called `name`, timed."""
        run = self._network.stage(name)

        def timed(inputs: Mapping[str, Array]) -> dict[str, Array]:
            start = time.perf_counter()
            outputs = run(inputs)
            self.times_ms[name] += _since(start)
            if name == "decoder":
                self.fetched_at_the_end_ms = 0.0
            return outputs

        return timed

    def upload(self, array: NDArray[Any]) -> Array:
        """A host array as the network's, timed."""
        start = time.perf_counter()
        uploaded = self._network.upload(array)
        self.times_ms["upload"] += _since(start)
        return uploaded

    def download(self, array: Array) -> NDArray[Any]:
        """The network's array on the host, timed."""
        start = time.perf_counter()
        downloaded = self._network.download(array)
        taken = _since(start)
        self.times_ms["download"] += taken
        self.fetched_at_the_end_ms += taken
        return downloaded

    def select(
        self, probing: Probing, level: ProbeLevel, before: LevelOutputs, image_size: Array
    ) -> tuple[Array, Array]:
        """As the network does it, timed."""
        start = time.perf_counter()
        found = self._network.select(probing, level, before, image_size)
        self.times_ms["select"] += _since(start)
        return found


def split(timed: TimedNetwork, call_ms: Mapping[str, float]) -> dict[str, float]:
    """The phases of the call that has just ended, of which the detector reports `call_ms`; their sum is its
    total."""
    phases = {name: timed.times_ms.get(name, 0.0) for name in PHASES if name in timed.times_ms}
    phases["preprocess"] = call_ms["preprocess"]
    if "normalize" not in phases:  # done by a kernel, with upload, resizing and padding
        phases["normalize"] = call_ms["normalize"]
    phases["postprocess"] = max(call_ms["postprocess"] - timed.fetched_at_the_end_ms, 0.0)
    phases["loop"] = max(call_ms["total"] - sum(phases.values()), 0.0)
    return {name: phases[name] for name in PHASES if name in phases}


def _since(start: float) -> float:
    return (time.perf_counter() - start) * 1000
