"""The measurement: subjects in turn, round by round, until their medians agree or the time is up."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from types import MappingProxyType
from typing import Any

from asag_bench.measuring.samples import Stratum, batches, network_shape
from asag_bench.measuring.statistics import Latencies, ratio, spread
from asag_bench.runners.subjects import Run, Subject
from asag_deploy.bundle.manifest import Preprocessing
from asag_deploy.images.reading import RgbImage

LEAST_CALLS_A_WINDOW = 4

Pyramid = Callable[[Sequence[RgbImage]], float]
"""Backbone and neck alone, run on a batch: the milliseconds it took."""
_BEFORE_THE_BACKBONE = ("preprocess", "upload", "normalize")


@dataclass(kw_only=True)
class StratumResult:
    """One kind of image at one batch size."""

    stratum: Stratum
    batch: int
    spec: Preprocessing
    latencies: dict[str, Latencies]
    """By subject, the first being the base of the ratios."""
    exits: dict[str, Counter[str]]
    """By subject, where it stopped."""
    pyramid_ms: dict[str, list[float]] = field(default_factory=dict)
    """By subject, backbone and neck alone, once a round; without those that have none of their own."""
    compared: Mapping[str, str] = field(default_factory=dict)
    """Subjects that do more than another one, by which: what probing costs."""

    @property
    def stable(self) -> bool:
        """Whether every subject was."""
        return all(latencies.stable for latencies in self.latencies.values())

    def ratios(self) -> dict[str, dict[str, float]]:
        """How many times as long as the first subject each took, round by round."""
        base = next(iter(self.latencies.values())).samples
        return {name: ratio(other.samples, base) for name, other in self.latencies.items()}

    def speeds(self, reference: str) -> dict[str, dict[str, float]]:
        """How many times as fast as the subject `reference` each was, round by round."""
        base = self.latencies[reference].samples
        return {name: ratio(base, other.samples) for name, other in self.latencies.items()}

    def after_the_neck(self, name: str) -> dict[str, float] | None:
        """What a subject takes beyond backbone and neck alone in the same round, from the normalised picture
        on, as a share of them; None where they were not timed."""
        alone = self.pyramid_ms.get(name)
        if alone is None:
            return None
        calls = self.latencies[name]
        shares_of_rounds = []
        for total, phases, pyramid in zip(calls.samples, calls.phases, alone, strict=True):
            before = sum(phases.get(phase, 0.0) for phase in _BEFORE_THE_BACKBONE)
            shares_of_rounds.append((total - before) / pyramid - 1)
        return spread(shares_of_rounds)

    def to_dict(self, percentiles: Sequence[float], reference: str | None = None) -> dict[str, Any]:
        """As plain JSON values; speeds are those over the subject `reference`, or the first."""
        ratios, speeds = self.ratios(), self.speeds(reference or next(iter(self.latencies)))
        pyramids = {name: median(times) for name, times in self.pyramid_ms.items()}
        return {
            "images": self.stratum.name,
            "manual_stop": self.stratum.max_level,
            "batch": self.batch,
            "network_shapes": shapes_of(self.stratum, self.spec),
            "pictures": [picture.name for picture in self.stratum.pictures],
            "patches": [picture.patches for picture in self.stratum.pictures],
            "anchors": [picture.found.trace.anchor_count for picture in self.stratum.pictures],
            "stable": self.stable,
            "compared": dict(self.compared),
            "probing_costs": {
                name: ratio(self.latencies[name].samples, self.latencies[other].samples)
                for name, other in self.compared.items()
            },
            "subjects": {
                name: {
                    **latencies.to_dict(percentiles),
                    "share_of_total": shares(latencies.median_phases()),
                    "backbone_and_neck_ms": None if name not in pyramids else round(pyramids[name], 3),
                    "share_of_backbone_and_neck": shares(latencies.median_phases(), pyramids.get(name)),
                    "after_the_neck": self.after_the_neck(name),
                    "times_as_long_as_the_first": ratios[name],
                    "times_as_fast_as_the_reference": speeds[name],
                    "exits": dict(self.exits[name]),
                }
                for name, latencies in self.latencies.items()
            },
        }


def shares(phases: dict[str, float], whole: float | None = 0.0) -> dict[str, float]:
    """Each phase as a share of `whole`, or of their sum; nothing if there is no whole."""
    if whole is None or not phases:
        return {}
    total = whole or sum(phases.values())
    return {name: round(value / total, 4) for name, value in phases.items()}


def measure(
    stratum: Stratum,
    subjects: Sequence[Subject],
    *,
    batch: int,
    spec: Preprocessing,
    warmup: int,
    duration: float,
    pyramids: Mapping[str, Pyramid] = MappingProxyType({}),
    compared: Mapping[str, str] = MappingProxyType({}),
    on_round: Callable[[], object] = lambda: None,
) -> StratumResult:
    """Time every subject on the stratum's pictures, for `duration` seconds at most after the warm-up.

    Each round gives the same batch to every subject, beginning with another one each time, so that what
    slows the machine slows all of them; a subject that has a pyramid has it timed beside it.  A window is
    one pass over the pictures, or a few where they are few.  It ends early once the medians of each subject's
    last three windows agree within 5%.
    """
    sets = batches(stratum, batch, spec)
    warm_up(sets, subjects, stratum, spec, warmup)
    result = StratumResult(
        stratum=stratum,
        batch=batch,
        spec=spec,
        latencies={subject.name: Latencies(batch=batch) for subject in subjects},
        exits={subject.name: Counter() for subject in subjects},
        pyramid_ms={name: [] for name in pyramids},
        compared=compared,
    )
    a_window = len(sets) * -(-LEAST_CALLS_A_WINDOW // len(sets))
    end = time.perf_counter() + duration
    number = 0
    while time.perf_counter() < end and not (number % a_window == 0 and result.stable):
        if number % a_window == 0:
            for latencies in result.latencies.values():
                latencies.windows.append([])
        images = sets[number % len(sets)]
        for i in range(len(subjects)):
            subject = subjects[(number + i) % len(subjects)]
            # Right beside the call, on either side in turn: close enough that the machine has not changed.
            if number % 2:
                _time_pyramid(result, pyramids, subject.name, images)
            _note(result, subject.name, subject(images, stratum.max_level))
            if not number % 2:
                _time_pyramid(result, pyramids, subject.name, images)
        number += 1
        on_round()
    return result


def warm_up(
    sets: Sequence[Sequence[RgbImage]],
    subjects: Sequence[Subject],
    stratum: Stratum,
    spec: Preprocessing,
    count: int,
) -> None:
    """Run each subject on each shape of batch `count` times; they are compiled and allocated for anew."""
    shapes = {tuple(sorted(network_shape(image, spec) for image in images)): images for images in sets}
    for images in shapes.values():
        for subject in subjects:
            for _ in range(count):
                subject(images, stratum.max_level)


def shapes_of(stratum: Stratum, spec: Preprocessing) -> list[str]:
    """The heights and widths at which the pictures reach the network, before padding, each once."""
    shapes = sorted({network_shape(picture.image, spec) for picture in stratum.pictures})
    return [f"{height}x{width}" for height, width in shapes]


def _time_pyramid(
    result: StratumResult, pyramids: Mapping[str, Pyramid], name: str, images: Sequence[RgbImage]
) -> None:
    if name in pyramids:
        result.pyramid_ms[name].append(pyramids[name](images))


def _note(result: StratumResult, name: str, run: Run) -> None:
    latencies = result.latencies[name]
    latencies.windows[-1].append(run.total_ms)
    if run.phases_ms:
        latencies.phases.append(run.phases_ms)
    result.exits[name].update(run.exits)
