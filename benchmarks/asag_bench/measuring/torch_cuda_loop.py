"""What the loop on the GPU costs beside the host's, and what deciding itself costs, over PyTorch's stages.

One image stops at each level in turn.  `asks` is the graph that decides on the GPU, `never_asks` the same
graph up to that level without conditional nodes, so that every level always runs: their difference is what
deciding costs.  `device` times lie between two events, `wall` times end when the GPU is done; all are
medians.  `parts` are the stages one by one, each replayed as a graph of its own; `after_the_neck` is what the
graph takes beyond backbone and neck, as a share of these.  Loops that do not find the same are not timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asag_bench.measuring.machine import describe_machine
from asag_bench.result import to_json
from asag_bench.runners.references import (
    DEVICE_LOOP,
    check_cuda_reference,
    open_plain,
    open_with_kernels,
)
from asag_bench.runners.torch_cuda_graphs import (
    AskingGraph,
    NeverAskingGraph,
    SameShapes,
    Stopwatch,
    open_graph,
)
from asag_deploy.backends.hooked_network import HookedNetwork
from asag_deploy.backends.network import Network
from asag_deploy.backends.tensorrt.backend import EngineNetwork
from asag_deploy.backends.tensorrt.device_loop import DeviceLoop
from asag_deploy.bundle.manifest import FIRST_LEVEL, Precision, ProbeLevel, Probing
from asag_deploy.cuda import DeviceArray
from asag_deploy.engines.shapes import MOST_SLOTS
from asag_deploy.errors import ConfigError, ParityError
from asag_deploy.loop.loop import Loop
from asag_deploy.loop.probing import Probed, detect
from asag_deploy.loop.stages import Array, LevelOutputs
from asag_deploy.loop.stopping import FAST_MAX_PATCHES, FAST_MIN_SELECTED, StopRule
from asag_deploy.timing import since
from asag_training.settings import WeightsChoice

OUTPUTS = ("logits", "boxes", "anchors")
WARM_UPS = 20
FAST = "fast"
_NOBODY = 1 << 20
"""So many anchors never ask."""
_ALL = StopRule(max_patches=MOST_SLOTS)

Note = Callable[[str, Any], None]


@dataclass(frozen=True, kw_only=True)
class LoopPlan:
    """What to measure.  Raises ConfigError when it makes no sense."""

    variant: str = "asag-a-r50-100"
    """With random weights, unless there is a checkpoint."""
    checkpoint: Path | None = None
    weights: WeightsChoice = "model"
    """Which of the checkpoint's."""
    precision: Precision = "fp16"
    shape: tuple[int, int] = (800, 1088)
    repeats: int = 100
    """That count."""

    def __post_init__(self) -> None:
        if any(side % 32 for side in self.shape):
            height, width = self.shape
            raise ConfigError(f"--shape is '{height}x{width}'; expected multiples of 32, such as 800x1088")
        if self.repeats < 1:
            raise ConfigError(f"--repeats is {self.repeats}; it must be at least 1")


def measure_plan(plan: LoopPlan, note: Note) -> None:
    """Measure on this machine's GPU; `note` is given machine and network, then each figure as it comes.

    Raises BackendError if there is no GPU, CheckpointError for weights that cannot be read.
    """
    check_cuda_reference(DEVICE_LOOP)
    import torch

    from asag_training.checkpoints import load_checkpoint, untrained_checkpoint
    from asag_training.network.stage_plan import probing_plan

    checkpoint = (
        untrained_checkpoint(plan.variant)
        if plan.checkpoint is None
        else load_checkpoint(plan.checkpoint, weights=plan.weights)
    )
    probing = probing_plan(checkpoint.config)
    for name, value in {
        "machine": to_json(describe_machine()) | {"gpu": torch.cuda.get_device_name()},
        "network": checkpoint.config.variant,
        "trained": checkpoint.trained,
        "precision": plan.precision,
        "shape": list(plan.shape),
        "repeats": plan.repeats,
    }.items():
        note(name, value)
    plain = open_plain(checkpoint, probing, plan.precision)
    network = open_with_kernels(checkpoint, probing, plan.precision)
    measure(plain, network, probing, *picture(plan.shape), repeats=plan.repeats, note=note)
    network.close()


def measure(
    plain: Network,
    network: EngineNetwork,
    probing: Probing,
    image: NDArray[np.float32],
    size: NDArray[np.int64],
    *,
    repeats: int,
    note: Note,
) -> None:
    """Measure every figure, and give it to `note` by name as soon as it is there.

    image: float32 (1, 3, H, W), normalised; size: (1, 2).  Raises ParityError where the loops differ,
    BackendError if there is no loop on the device here.
    """
    clock, given = Stopwatch(network.device), network.upload(image)
    timer = _LoopTimer(
        plain=plain,
        beside=plain.upload(image),
        network=network,
        given=given,
        loop=network.open_device_loop(),
        probing=probing,
        size=size,
        clock=clock,
        repeats=repeats,
    )
    parts = stage_parts(network, probing, given, size)
    part_ms = {name: _device_ms(clock, part, repeats) for name, part in parts.items()}
    note("parts", part_ms)
    alike: Network = SameShapes(network, probing, _ALL)
    for exit_level, rule in exit_rules(alike, probing, given, size).items():
        note(exit_level, timer.row(exit_level, rule, part_ms["pyramid"]))
    clock.close()


@dataclass(frozen=True, kw_only=True)
class _LoopTimer:
    """Times all loops on one image, rule by rule."""

    plain: Network
    beside: Array
    """The image, as `plain` takes it."""
    network: EngineNetwork
    given: DeviceArray
    """The image, as `network` takes it."""
    loop: DeviceLoop
    probing: Probing
    size: NDArray[np.int64]
    clock: Stopwatch
    repeats: int

    def row(self, exit_level: str, rule: StopRule, pyramid_ms: float) -> dict[str, Any]:
        """Measure everything for one rule; returns plain JSON values."""
        redone = self.loop.redone
        expected, apart = self._compared(exit_level, rule)
        plain, network = (self.plain, self.beside), (self.network, self.given)
        wall = {
            "eager": self._wall(detect, *plain, rule),
            "host": self._wall(detect, *network, rule),
            "device": self._wall(self.loop, *network, rule),
        }
        flat = StopRule(max_patches=rule.max_patches, max_level=expected.levels[-1].level)
        asks, never = self._graph(AskingGraph, rule), self._graph(NeverAskingGraph, flat)
        return {
            "levels": [run.level for run in expected.levels],
            "largest_difference": apart,
            "detected_again": self.loop.redone - redone,
            "loops_wall_ms": wall,
            "times_as_fast_as_eager": round(wall["eager"] / wall["device"], 2),
            "asks_ms": asks,
            "never_asks_ms": never,
            "deciding_us": {side: round(1000 * (asks[side] - never[side]), 1) for side in asks},
            "after_the_neck": round(asks["device"] / pyramid_ms - 1, 4) if pyramid_ms else None,
        }

    def _compared(self, exit_level: str, rule: StopRule) -> tuple[Probed, float]:
        """Run both loops; return the host's run, and the largest difference of the device's."""
        alike = SameShapes(self.network, self.probing, rule)
        given = (alike, self.probing, rule, self.given, self.size)
        expected = detect(*given)
        apart = 0.0
        for _ in range(2):  # the one that captures, and one that replays
            apart = difference(self.network, exit_level, expected, self.loop(*given))
        return expected, apart

    def _wall(
        self, loop: Loop | Callable[..., Probed], network: Network, image: Array, rule: StopRule
    ) -> float:
        """Return the median milliseconds of a loop, up to the count that it gives on the host."""

        def run() -> object:
            probed = loop(network, self.probing, rule, image, self.size)
            return network.download(probed.outputs["anchor_count"])

        return _wall_ms(run, self.repeats)

    def _graph(self, kind: type[AskingGraph], rule: StopRule) -> dict[str, float]:
        """Return medians of the graph alone, launched again on the same image."""
        device = self.network.device
        with device.lock:
            graph = open_graph(kind, self.network, self.probing, rule, self.given)
            try:
                _, fetch = graph.launch(self.given, self.size)
                fetch()

                def run() -> None:
                    graph.again()
                    device.synchronize()

                on_device = _device_ms(self.clock, graph.again, self.repeats)
                return {"device": on_device, "wall": _wall_ms(run, self.repeats)}
            finally:
                device.synchronize()
                graph.close()


def exit_rules(
    network: Network, probing: Probing, image: Array, size: NDArray[np.int64]
) -> dict[str, StopRule]:
    """Return rules by the level at which this image then stops, and that of fast mode.

    There is no manual stop wherever the image's counts allow that, so that the graph asks and is told no.  No
    rule lets an image have more patches than the graph has room for, or it would be detected twice.
    """
    counts = [int(run.counts.selected[0]) for run in detect(network, probing, _ALL, image, size).levels]
    rules: dict[str, StopRule] = {FIRST_LEVEL: replace(_ALL, min_selected=_NOBODY)}
    for i, level in enumerate(probing.levels):
        stops_by_itself = i + 1 < len(counts) and counts[i] > counts[i + 1] and level != probing.levels[-1]
        rules[level.level] = (
            replace(_ALL, min_selected=counts[i + 1] + 1)
            if stops_by_itself
            else replace(_ALL, max_level=level.level)
        )
    return {**rules, FAST: StopRule(min_selected=FAST_MIN_SELECTED, max_patches=FAST_MAX_PATCHES)}


def stage_parts(
    network: Network, probing: Probing, image: Array, size: NDArray[np.int64]
) -> dict[str, Callable[[], object]]:
    """Return the stages, and `select` between them, each to be called on what a full detection gives it."""
    noting = _NotingNetwork(network)
    detect(noting, probing, _ALL, image, size)
    given = {"image": image, "image_size": network.upload(size)}
    return {"pyramid": partial(network.stage("pyramid"), given), **noting.calls}


class _NotingNetwork(HookedNetwork):
    """A network that notes what the loop asks of it, to be asked again."""

    def __init__(self, network: Network) -> None:
        super().__init__(network, before=self._note)
        self.calls: dict[str, Callable[[], object]] = {}

    def _note(self, name: str, inputs: Mapping[str, Array]) -> None:
        self.calls[name] = partial(self._network.stage(name), inputs)

    def select(
        self, probing: Probing, level: ProbeLevel, before: LevelOutputs, image_size: Array
    ) -> tuple[Array, Array]:
        """Find where the next level looks, noted."""
        again = partial(self._network.select, probing, level, before, image_size)
        self.calls[f"select_{level.level.lower()}"] = again
        return again()


def difference(network: Network, where: str, expected: Probed, found: Probed) -> float:
    """Return the largest difference between real queries of two runs.

    Raises ParityError if they decided otherwise.
    """
    counts = [network.download(side.outputs["anchor_count"]) for side in (expected, found)]
    same = (
        expected.stop == found.stop
        and np.array_equal(expected.probed, found.probed)
        and [run.patches.tolist() for run in expected.levels]
        == [run.patches.tolist() for run in found.levels]
        and np.array_equal(counts[0], counts[1])
    )
    if not same:
        raise ParityError(f"{where}: the loop on the device decided otherwise than the host's")
    return max(
        float(np.abs(one.astype(np.float64) - other.astype(np.float64)).max(initial=0))
        for one, other in (
            [network.download(side.outputs[name])[:, : counts[0].max()] for side in (expected, found)]
            for name in OUTPUTS
        )
    )


def _device_ms(clock: Stopwatch, work: Callable[[], object], repeats: int) -> float:
    times = [clock.device_ms(work) for _ in range(WARM_UPS + repeats)]
    return round(median(times[WARM_UPS:]), 4)


def _wall_ms(work: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(WARM_UPS + repeats):
        start = time.perf_counter()
        work()
        times.append(since(start))
    return round(median(times[WARM_UPS:]), 4)


def picture(shape: tuple[int, int]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Draw soft noise as a normalised image, float32 (1, 3, H, W); return it and its size (1, 2)."""
    rng = np.random.default_rng(0)
    coarse = rng.normal(size=(1, 3, shape[0] // 32, shape[1] // 32)).astype(np.float32)
    return coarse.repeat(32, axis=2).repeat(32, axis=3), np.array([shape], dtype=np.int64)
