"""Adaptive probing: the early-stop loop of ASAG over the stages of a network (paper, section 4.2).

The first level (P5 and P6) is always predicted.  Its anchors that are neither clearly objects nor clearly
noise, and small, ask for a closer look: patches around them are cropped from the next larger map (P4, then
P3) and predicted anew, and the new anchors *replace* the ones that asked.  When no anchor asks, the loop
stops.  Which maps are looked at, and where, is therefore decided by the image.

The host reads four numbers per image between levels and nothing else; features and anchors stay on the
device.  This function is the only implementation of the loop: every backend, the PyTorch network, its
evaluation and the exporter's parity gate run it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from asag_deploy.manifest import FIRST_LEVEL, Level, Probing
from asag_deploy.stages import Array, Network
from asag_deploy.trace import StopReason

FEATURES = ("p2", "p3", "p4", "p5")
FAST_MIN_SELECTED = 3
FAST_MAX_PATCHES = 15
_DEPTH: dict[Level, int] = {"P5": 0, "P4": 1, "P3": 2}

Ints = NDArray[np.int64]


class Counts(NamedTuple):
    """What a level reports to the host, each (B,): the columns of the stages' `counts`."""

    selected: Ints
    """Anchors that ask for a closer look on the next level."""
    patches: Ints
    """Patches left of them after NMS, which may exceed the next level's capacity."""
    passing: Ints
    """Anchors the level passes on if probing stops here."""
    passing_if_probed: Ints
    """Anchors it passes on if the next level replaces the selected ones."""


@dataclass(frozen=True, kw_only=True)
class StopRule:
    """When to stop (paper, section 5.1: fast inference stops below 3 selected, 15 patches a level)."""

    min_selected: int = 1
    max_patches: int | None = None
    max_level: Level = "P3"
    deadline: float | None = None
    """A `time.perf_counter()` value after which no further level is begun."""

    def allows(self, level: Level) -> bool:
        """Whether the manual stop lets `level` be probed."""
        return _DEPTH[level] <= _DEPTH[self.max_level]


@dataclass(frozen=True, kw_only=True)
class LevelRun:
    """One level as it was run for a batch."""

    level: Level
    patches: Ints
    """(B,) patches predicted on."""
    patches_dropped: Ints
    """(B,) patches lost to a limit or to the capacity."""
    origins: Array | None
    """(B, K, 2) x, y of the patches in cells of this level's map, on the device; None on the first level."""
    anchors: Array
    """(B, N, 5) on the device."""
    selected: Array | None
    """(B, N) on the device; None on the last level the network can probe, which has no next one to ask for."""
    counts: Counts


@dataclass(kw_only=True)
class Probed:
    """What the loop leaves behind."""

    outputs: dict[str, Array]
    """The decoder's outputs, on the device."""
    levels: list[LevelRun]
    probed: NDArray[np.bool_]
    """(B, levels) which image was probed on which level."""
    stop: list[StopReason]
    """(B,) why each image went no further."""
    times_ms: dict[str, float] = field(default_factory=dict)
    """Wall time per stage in milliseconds."""


def detect(
    network: Network, probing: Probing, rule: StopRule, image: Array, image_size: NDArray[np.int64]
) -> Probed:
    """Run backbone, adaptive probing and decoder on a batch.

    `image` is the normalised batch on the device, float32 (B, 3, H, W); `image_size` (B, 2) holds the valid
    heights and widths in pixels.  The batch goes on while any of its images has patches; images that have
    stopped get none, so that each is treated as it would be alone.
    """
    clock = _Stopwatch()
    size = network.upload(image_size)
    outputs = network.stage("backbone")({"image": image, "image_size": size})
    features = {name: outputs[name] for name in FEATURES}
    clock.lap("backbone")

    levels = [_first_level(network, outputs)]
    probed = np.zeros((len(image_size), len(probing.levels)), dtype=np.bool_)
    stop: list[StopReason | None] = [None] * len(image_size)

    for i, next_level in enumerate(probing.levels):
        counts = levels[-1].counts
        _note_natural_stops(stop, counts, rule)
        running = np.array([reason is None for reason in stop])
        if not running.any():
            break
        if not rule.allows(next_level.level):
            _note(stop, StopReason.MAX_LEVEL)
            break
        if rule.deadline is not None and time.perf_counter() > rule.deadline:
            _note(stop, StopReason.DEADLINE)
            break

        limit = min(next_level.capacity, rule.max_patches or next_level.capacity)
        wanted = np.where(running, counts.patches, 0)
        patches = np.minimum(wanted, limit)
        probed[:, i] = running
        origins = outputs["origins"]
        slots = _round_up(int(patches.max()), network.patch_bucket, next_level.capacity)
        outputs = network.stage(f"probe_{next_level.level.lower()}")(
            {
                "feature": features[next_level.level.lower()],
                "image_size": size,
                "patches": origins,
                "patch_count": network.upload(patches),
                "slots": network.upload(np.arange(slots, dtype=np.int64)),
            }
        )
        levels.append(
            LevelRun(
                level=next_level.level,
                patches=patches,
                patches_dropped=wanted - patches,
                origins=origins,
                anchors=outputs["anchors"],
                selected=outputs.get("selected"),
                counts=_read_counts(network, outputs),
            )
        )
        clock.lap(f"probe_{next_level.level.lower()}")

    at_the_end = StopReason.LAST_LEVEL if levels[-1].level == "P3" else StopReason.MAX_LEVEL
    _note(stop, at_the_end)

    passing = sum(passed_on(levels, probed))
    queries = _round_up(
        int(min(np.max(passing), probing.anchor_cap)), network.query_bucket, probing.anchor_cap
    )
    decoded = network.stage("decoder")(
        {
            **features,
            **_decoder_anchors(network, probing, levels, len(image_size)),
            "probed": network.upload(probed),
            "image_size": size,
            "query_slots": network.upload(np.arange(queries, dtype=np.int64)),
        }
    )
    clock.lap("decoder")
    return Probed(
        outputs=decoded,
        levels=levels,
        probed=probed,
        stop=[reason or at_the_end for reason in stop],
        times_ms=clock.times_ms,
    )


def passed_on(levels: list[LevelRun], probed: NDArray[np.bool_]) -> list[Ints]:
    """(B,) for each level that was run: how many anchors it passed on, before the cap."""
    result = []
    for i, level in enumerate(levels):
        went_on = probed[:, i] if i < probed.shape[1] else np.zeros(len(probed), dtype=np.bool_)
        result.append(np.where(went_on, level.counts.passing_if_probed, level.counts.passing))
    return result


def _first_level(network: Network, outputs: dict[str, Array]) -> LevelRun:
    counts = _read_counts(network, outputs)
    return LevelRun(
        level=FIRST_LEVEL,
        patches=np.full_like(counts.selected, 5),
        patches_dropped=np.zeros_like(counts.selected),
        origins=None,
        anchors=outputs["anchors"],
        selected=outputs.get("selected"),
        counts=counts,
    )


def _read_counts(network: Network, outputs: dict[str, Array]) -> Counts:
    return Counts(*network.download(outputs["counts"]).T)


def _decoder_anchors(
    network: Network, probing: Probing, levels: list[LevelRun], batch: int
) -> dict[str, Array]:
    """The anchor inputs of the decoder; a level that was not run is one patch of zeros, which never pass."""
    inputs = {"anchors_p5": levels[0].anchors, "selected_p5": levels[0].selected}
    run = {level.level: level for level in levels}
    for level in probing.levels:
        name = level.level.lower()
        if level.level in run:
            inputs[f"anchors_{name}"] = run[level.level].anchors
            inputs[f"selected_{name}"] = run[level.level].selected
        else:
            empty = (batch, level.anchors_per_patch)
            inputs[f"anchors_{name}"] = network.upload(np.zeros((*empty, 5), dtype=np.float32))
            inputs[f"selected_{name}"] = network.upload(np.zeros(empty, dtype=np.bool_))
    return {name: array for name, array in inputs.items() if array is not None}


def _note_natural_stops(stop: list[StopReason | None], counts: Counts, rule: StopRule) -> None:
    for i, selected in enumerate(counts.selected):
        if stop[i] is None and selected < rule.min_selected:
            stop[i] = StopReason.FEW_SELECTED if selected else StopReason.NOTHING_SELECTED


def _note(stop: list[StopReason | None], reason: StopReason) -> None:
    stop[:] = [reason if known is None else known for known in stop]


def _round_up(count: int, bucket: int, most: int) -> int:
    return min(max(-(-count // bucket), 1) * bucket, most)


class _Stopwatch:
    """Wall times between laps, in milliseconds."""

    def __init__(self) -> None:
        self.times_ms: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.times_ms[name] = (now - self._last) * 1000
        self._last = now
