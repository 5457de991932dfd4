"""What the loop on the GPU costs beside the host's, and what deciding itself costs, over PyTorch's stages.

    python -m asag_bench.measuring.torch_cuda_loop [--variant NAME | --checkpoint FILE] [--output FILE.json]

One image stops at each level in turn.  `asks` is the graph that decides on the GPU, `never_asks` the same
graph up to that level without conditional nodes, so that every level always runs: their difference is what
deciding costs.  `device` times lie between two events, `wall` times end when the GPU is done; all are
medians.  `parts` are the stages one by one, each replayed as a graph of its own; `after_the_neck` is what the
graph takes beyond backbone and neck, as a share of these.  Loops that do not find the same are not timed.

Rows are printed, and the file is written, as they come.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asag_bench.measuring.machine import describe_machine
from asag_bench.runners.torch_cuda_graphs import (
    AskingGraph,
    NeverAskingGraph,
    SameShapes,
    Stopwatch,
    open_graph,
)
from asag_bench.runners.torch_cuda_peers import DEVICE_LOOP, check_cuda_peer, open_plain, open_with_kernels
from asag_deploy.atomic import atomic_write
from asag_deploy.backends.hooked_network import WrappedNetwork
from asag_deploy.backends.network import Network
from asag_deploy.backends.tensorrt.backend import EngineNetwork
from asag_deploy.bundle.manifest import FIRST_LEVEL, Level, ProbeLevel, Probing
from asag_deploy.command_line import OneSentenceParser, exit_code
from asag_deploy.cuda import DeviceArray
from asag_deploy.engines.shapes import MOST_SLOTS
from asag_deploy.errors import ConfigError, ParityError
from asag_deploy.loop.probing import Probed, detect
from asag_deploy.loop.stages import Array, LevelOutputs, Stage
from asag_deploy.loop.stopping import FAST_MAX_PATCHES, FAST_MIN_SELECTED, StopRule

PROGRAM = "torch_cuda_loop"
OUTPUTS = ("logits", "boxes", "anchors")
WARM_UPS = 20
FAST = "fast"
_NOBODY = 1 << 20
"""So many anchors never ask."""
_ALL = StopRule(max_patches=MOST_SLOTS)

Note = Callable[[str, Any], None]


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write; returns 0, or 2 with the reason in one sentence on stderr."""
    return exit_code(PROGRAM, lambda: _run(_parser().parse_args(argv)))


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = OneSentenceParser(prog=PROGRAM, description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add(
        "--variant",
        default="asag-a-r50-100",
        metavar="NAME",
        help="with random weights (default: %(default)s)",
    )
    add("--checkpoint", type=Path, metavar="FILE", help="trained weights instead")
    add("--precision", choices=("fp16", "fp32"), default="fp16", help="default: %(default)s")
    add("--shape", default="800x1088", metavar="HxW", help="of the image (default: %(default)s)")
    add("--repeats", type=int, default=100, metavar="N", help="that count (default: %(default)s)")
    add("--output", type=Path, metavar="FILE", help="write the figures there as JSON")
    return parser


def _run(options: argparse.Namespace) -> int:
    shape = _shape(options.shape)
    if options.repeats < 1:
        raise ConfigError(f"--repeats is {options.repeats}; it must be at least 1")
    check_cuda_peer(DEVICE_LOOP)
    import torch

    from asag_training.checkpoints import load_checkpoint, untrained_checkpoint
    from asag_training.network.stage_plan import probing_plan

    path = options.checkpoint
    checkpoint = untrained_checkpoint(options.variant) if path is None else load_checkpoint(path)
    probing = probing_plan(checkpoint.config)
    result: dict[str, Any] = {
        "machine": describe_machine() | {"gpu": torch.cuda.get_device_name()},
        "network": checkpoint.config.variant,
        "trained": checkpoint.trained,
        "precision": options.precision,
        "shape": list(shape),
        "repeats": options.repeats,
    }

    def note(name: str, value: Any) -> None:
        result[name] = value
        print(f"{name}: {json.dumps(value)}", flush=True)
        if options.output is not None:
            with atomic_write(options.output) as temporary:
                temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    plain = open_plain(checkpoint, probing, options.precision)
    network = open_with_kernels(checkpoint, probing, options.precision)
    measure(plain, network, probing, *picture(shape), repeats=options.repeats, note=note)
    network.close()
    return 0


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
    """Every figure, given to `note` by name as soon as it is there.

    image: float32 (1, 3, H, W), normalised; size: (1, 2).  Raises ParityError where the loops differ,
    BackendError if there is no loop on the device here.
    """
    clock, given, beside = Stopwatch(network.device), network.upload(image), plain.upload(image)
    loop = network.open_device_loop()
    parts = stage_parts(network, probing, given, size)
    part_ms = {name: _device_ms(clock, part, repeats) for name, part in parts.items()}
    note("parts", part_ms)
    alike: Network = SameShapes(network, probing, _ALL)
    for exit_level, rule in exit_rules(alike, probing, given, size).items():
        alike, redone = SameShapes(network, probing, rule), loop.redone
        expected = detect(alike, probing, rule, given, size)
        for _ in range(2):  # the one that captures, and one that replays
            apart = difference(network, exit_level, expected, loop(alike, probing, rule, given, size))

        def eager(rule: StopRule = rule) -> object:
            return plain.download(detect(plain, probing, rule, beside, size).outputs["anchor_count"])

        def host(rule: StopRule = rule) -> object:
            return network.download(detect(network, probing, rule, given, size).outputs["anchor_count"])

        def device(rule: StopRule = rule) -> object:
            return network.download(loop(network, probing, rule, given, size).outputs["anchor_count"])

        wall = {
            name: _wall_ms(run, repeats)
            for name, run in (("eager", eager), ("host", host), ("device", device))
        }
        reached: Level = expected.levels[-1].level
        asks = _graph_ms(AskingGraph, network, probing, rule, given, size, clock, repeats)
        flat = StopRule(max_patches=rule.max_patches, max_level=reached)
        never = _graph_ms(NeverAskingGraph, network, probing, flat, given, size, clock, repeats)
        note(
            exit_level,
            {
                "levels": [run.level for run in expected.levels],
                "largest_difference": apart,
                "detected_again": loop.redone - redone,
                "loops_wall_ms": wall,
                "times_as_fast_as_eager": round(wall["eager"] / wall["device"], 2),
                "asks_ms": asks,
                "never_asks_ms": never,
                "deciding_us": {side: round(1000 * (asks[side] - never[side]), 1) for side in asks},
                "after_the_neck": round(asks["device"] / part_ms["pyramid"] - 1, 4)
                if part_ms["pyramid"]
                else None,
            },
        )
    clock.close()


def exit_rules(
    network: Network, probing: Probing, image: Array, size: NDArray[np.int64]
) -> dict[str, StopRule]:
    """By the level at which this image then stops; without a manual stop wherever its counts allow that, so
    that the graph asks and is told no.  And fast mode.

    No rule lets an image have more patches than the graph has room for, or it would be detected twice.
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
    """The stages, and `select` between them, each on what it is given on the way to the deepest level."""
    noted = _Noting(network)
    detect(noted, probing, _ALL, image, size)
    pyramid = network.stage("pyramid")
    given = {"image": image, "image_size": network.upload(size)}
    return {"pyramid": lambda: pyramid(given), **noted.calls}


class _Noting(WrappedNetwork):
    """A network that notes what the loop asks of it, to be asked again."""

    def __init__(self, network: Network) -> None:
        super().__init__(network)
        self.calls: dict[str, Callable[[], object]] = {}

    def stage(self, name: str) -> Stage:
        """The stage called `name`, which notes its inputs."""
        run = self._network.stage(name)

        def noted(inputs: Mapping[str, Array]) -> dict[str, Array]:
            self.calls[name] = lambda: run(inputs)
            return run(inputs)

        return noted

    def select(
        self, probing: Probing, level: ProbeLevel, before: LevelOutputs, image_size: Array
    ) -> tuple[Array, Array]:
        """As the network does, noted."""

        def again() -> tuple[Array, Array]:
            return self._network.select(probing, level, before, image_size)

        self.calls[f"select_{level.level.lower()}"] = again
        return again()


def difference(network: Network, where: str, expected: Probed, found: Probed) -> float:
    """The largest one between real queries of two runs.  Raises ParityError if they decided otherwise."""
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


def _graph_ms(
    kind: type[AskingGraph],
    network: EngineNetwork,
    probing: Probing,
    rule: StopRule,
    image: DeviceArray,
    size: NDArray[np.int64],
    clock: Stopwatch,
    repeats: int,
) -> dict[str, float]:
    """Medians of the graph alone, launched again on the same image."""
    with network.device.lock:
        graph = open_graph(kind, network, probing, rule, image)
        try:
            _, fetch = graph.launch(image, size)
            fetch()

            def run() -> None:
                graph.again()
                network.device.synchronize()

            return {"device": _device_ms(clock, graph.again, repeats), "wall": _wall_ms(run, repeats)}
        finally:
            network.device.synchronize()
            graph.close()


def _device_ms(clock: Stopwatch, work: Callable[[], object], repeats: int) -> float:
    times = [clock.device_ms(work) for _ in range(WARM_UPS + repeats)]
    return round(median(times[WARM_UPS:]), 4)


def _wall_ms(work: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(WARM_UPS + repeats):
        start = time.perf_counter()
        work()
        times.append((time.perf_counter() - start) * 1000)
    return round(median(times[WARM_UPS:]), 4)


def _shape(text: str) -> tuple[int, int]:
    """`800x1088` as height and width, multiples of 32.  Raises ConfigError for anything else."""
    sides = text.lower().split("x")
    if len(sides) != 2 or not all(side.isdigit() and int(side) and int(side) % 32 == 0 for side in sides):
        raise ConfigError(f"--shape is '{text}'; expected HxW in multiples of 32, such as 800x1088")
    return int(sides[0]), int(sides[1])


def picture(shape: tuple[int, int]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Soft noise as a normalised image, float32 (1, 3, H, W), and its size (1, 2)."""
    rng = np.random.default_rng(0)
    coarse = rng.normal(size=(1, 3, shape[0] // 32, shape[1] // 32)).astype(np.float32)
    return coarse.repeat(32, axis=2).repeat(32, axis=3), np.array([shape], dtype=np.int64)


if __name__ == "__main__":
    sys.exit(main())
