"""Adaptive probing: the early-stop loop of ASAG over the stages of a network (paper, section 4.2).

The first level (P5 and P6) is always predicted.  Its anchors that are neither clearly objects nor clearly
noise, and small, ask for a closer look: patches around them are cropped from the next larger map (P4, then
P3) and predicted anew, and the new anchors *replace* the ones that asked.  When no anchor asks, the loop
stops.  Which maps are looked at, and where, is therefore decided by the image.

The host reads four numbers per image between levels and nothing else; features and anchors stay on the
device.  `detect` is what every backend, the PyTorch network, its evaluation and the exporter's parity gate
run; `asag_deploy.backends.tensorrt.device_loop` has a GPU decide, and holds that against
`asag_deploy.loop.stopping.Decisions`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from asag_deploy.bundle.manifest import FIRST_LEVEL, Level, ProbeLevel, Probing
from asag_deploy.loop.stages import Array, Counts, Ints, LevelOutputs, Stages, features_among
from asag_deploy.loop.stopping import Decisions, StopRule
from asag_deploy.loop.trace import StopReason
from asag_deploy.timing import Stopwatch

FIRST_PATCHES = 5
"""Patches of the first level, which is always predicted whole: four of P5 and the one of P6."""


@dataclass(frozen=True, kw_only=True)
class LevelRun:
    """One level as it was run for a batch."""

    level: Level
    patches: Ints
    """(B,) patches predicted on."""
    patches_dropped: Ints
    """(B,) patches lost to a limit or the capacity; an anchor patch NMS had no room for counts as one."""
    origins: Array | None
    """(B, K, 2) x, y of the patches in cells of this level's map, on the device; None on the first level."""
    anchors: Array
    """(B, N, 5) on the device."""
    selected: Array | None
    """(B, N) on the device; None on the last level that the network can probe."""
    next_origins: Array | None
    """(B, K, 2) where it asks the next level to look, on the device; None on the last level that may be
    probed."""
    counts: Counts

    @classmethod
    def of(
        cls,
        level: Level,
        patches: tuple[Ints, Ints],
        origins: tuple[Array | None, Array | None],
        counts: Counts,
        outputs: Mapping[str, Array],
    ) -> LevelRun:
        """Describe a level by the outputs of its stage.

        patches: predicted on, and lost; origins: where it looked, and where it asks the next level to look.
        """
        return cls(
            level=level,
            patches=patches[0],
            patches_dropped=patches[1],
            origins=origins[0],
            anchors=outputs["anchors"],
            selected=outputs.get("selected"),
            next_origins=origins[1],
            counts=counts,
        )


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
    network: Stages, probing: Probing, rule: StopRule, image: Array, image_size: NDArray[np.int64]
) -> Probed:
    """Run backbone, adaptive probing and decoder on a batch.

    `image` is the normalised batch on the device, float32 (B, 3, H, W); `image_size` (B, 2) holds the valid
    heights and widths in pixels.  The batch goes on while any of its images has patches; images that have
    stopped get none, so that each is treated as it would be alone.
    """
    clock = Stopwatch()
    size = network.upload(image_size)
    outputs = network.stage("backbone")({"image": image, "image_size": size})
    features = {name: outputs[name] for name in features_among(outputs)}
    counts, asked = _report(network, probing, rule, 0, outputs, size)
    zeros = np.zeros_like(counts.selected)
    levels = [LevelRun.of(FIRST_LEVEL, (zeros + FIRST_PATCHES, zeros), (None, asked), counts, outputs)]
    clock.lap("backbone")

    decisions = Decisions(len(image_size))
    for number, next_level in enumerate(probing.levels, start=1):
        running = decisions.who_goes_on(rule, next_level.level, counts)
        if not running.any():
            break
        patches = patches_of(probing, rule, next_level, counts, running)
        looked = asked
        outputs = _probe(network, next_level, features, looked, patches[0], size)
        counts, asked = _report(network, probing, rule, number, outputs, size)
        levels.append(LevelRun.of(next_level.level, patches, (looked, asked), counts, outputs))
        clock.lap(stage_name(next_level))

    probed = decisions.probed(len(probing.levels))
    outputs = _decode(network, probing, features, levels, probed, size)
    clock.lap("decoder")
    return Probed(
        outputs=outputs,
        levels=levels,
        probed=probed,
        stop=decisions.reasons(levels[-1].level),
        times_ms=clock.times_ms,
    )


def passed_on(levels: list[LevelRun], probed: NDArray[np.bool_]) -> list[Ints]:
    """Return (B,) for each level that was run: how many anchors it passed on, before the cap."""
    result = []
    for i, level in enumerate(levels):
        went_on = probed[:, i] if i < probed.shape[1] else np.zeros(len(probed), dtype=np.bool_)
        result.append(np.where(went_on, level.counts.passing_if_probed, level.counts.passing))
    return result


def _report(
    network: Stages, probing: Probing, rule: StopRule, number: int, outputs: dict[str, Array], size: Array
) -> tuple[Counts, Array | None]:
    """Find the patches for level `number` of those that can be probed, if it may be; then read the counts."""
    counts, origins = outputs["counts"], None
    if number < len(probing.levels) and rule.allows(probing.levels[number].level):
        origins, counts = network.select(probing, probing.levels[number], LevelOutputs.of(outputs), size)
    return Counts(*network.download(counts).T), origins


def _probe(
    network: Stages,
    level: ProbeLevel,
    features: dict[str, Array],
    origins: Array | None,
    patches: Ints,
    size: Array,
) -> dict[str, Array]:
    """Look closer: predict anchors on the patches of `level` that the level before it asked for."""
    slots = round_up(int(patches.max()), network.patch_bucket, level.capacity)
    feature = features[level.level.lower()]
    return network.stage(stage_name(level))(
        {
            "feature": feature,
            "feature_size": network.upload(np.array(network.shape(feature)[1:3], dtype=np.int64)),
            "image_size": size,
            "patches": origins,
            "patch_count": network.upload(patches),
            "slots": network.upload(np.arange(slots, dtype=np.int64)),
        }
    )


def stage_name(level: ProbeLevel) -> str:
    """Return the name of the stage that probes a level."""
    return f"probe_{level.level.lower()}"


def patch_limit(rule: StopRule, level: ProbeLevel) -> int:
    """Return how many patches of an image are predicted on at most."""
    return min(level.capacity, rule.max_patches or level.capacity)


def patches_of(
    probing: Probing, rule: StopRule, level: ProbeLevel, before: Counts, running: NDArray[np.bool_]
) -> tuple[Ints, Ints]:
    """Return (B,) how many patches are predicted on and how many are lost, by the level before's counts."""
    unseen = np.maximum(before.selected - probing.max_candidates, 0)
    wanted = np.where(running, before.patches + unseen, 0)
    patches = np.where(running, np.minimum(before.patches, patch_limit(rule, level)), 0)
    return patches, wanted - patches


def _decode(
    network: Stages,
    probing: Probing,
    features: dict[str, Array],
    levels: list[LevelRun],
    probed: NDArray[np.bool_],
    size: Array,
) -> dict[str, Array]:
    """Gather what every level passed on, as many queries as the fullest image needs, and decode them."""
    passing = int(np.max(sum(passed_on(levels, probed))))
    queries = round_up(min(passing, probing.anchor_cap), network.query_bucket, probing.anchor_cap)
    return network.stage("decoder")(
        {
            **features,
            **_decoder_anchors(network, probing, levels, len(probed)),
            "probed": network.upload(probed),
            "image_size": size,
            "query_slots": network.upload(np.arange(queries, dtype=np.int64)),
        }
    )


def _decoder_anchors(
    network: Stages, probing: Probing, levels: list[LevelRun], batch: int
) -> dict[str, Array]:
    """Return the decoder's anchor inputs; a level that was not run is a patch of zeros, which never pass."""
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


def round_up(count: int, bucket: int, most: int) -> int:
    """Return the multiple of `bucket` that holds `count`, at least one and at most `most`."""
    return min(max(-(-count // bucket), 1) * bucket, most)
