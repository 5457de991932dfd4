"""The measurement: subjects in turn, round by round, until their medians agree or the time is up."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from asag_bench.samples import Stratum, batches, network_shape
from asag_bench.statistics import Latencies, ratio
from asag_bench.subjects import Run, Subject
from asag_deploy.images import RgbImage
from asag_deploy.manifest import Preprocessing

LEAST_CALLS_A_WINDOW = 4


@dataclass(kw_only=True)
class StratumResult:
    """One kind of image at one batch size."""

    stratum: Stratum
    batch: int
    latencies: dict[str, Latencies]
    """By subject, the first being the base of the ratios."""
    exits: dict[str, Counter[str]]
    """By subject, where it stopped."""
    pyramid_ms: list[float] = field(default_factory=list)
    """Backbone and neck alone, once a round; empty where it cannot be had."""

    @property
    def stable(self) -> bool:
        """Whether every subject was."""
        return all(latencies.stable for latencies in self.latencies.values())

    def ratios(self) -> dict[str, dict[str, float]]:
        """How many times as long as the first subject each took, round by round."""
        base = next(iter(self.latencies.values())).samples
        return {name: ratio(other.samples, base) for name, other in self.latencies.items()}

    def to_dict(self, percentiles: Sequence[float]) -> dict[str, Any]:
        """As plain JSON values."""
        pyramid = median(self.pyramid_ms) if self.pyramid_ms else None
        ratios = self.ratios()
        return {
            "images": self.stratum.name,
            "manual_stop": self.stratum.max_level,
            "batch": self.batch,
            "pictures": [picture.name for picture in self.stratum.pictures],
            "patches": [picture.patches for picture in self.stratum.pictures],
            "anchors": [picture.found.trace.anchor_count for picture in self.stratum.pictures],
            "stable": self.stable,
            "backbone_and_neck_ms": None if pyramid is None else round(pyramid, 3),
            "subjects": {
                name: {
                    **latencies.to_dict(percentiles),
                    "share_of_total": shares(latencies.median_phases()),
                    "share_of_backbone_and_neck": shares(latencies.median_phases(), pyramid),
                    "times_as_long_as_the_first": ratios[name],
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
    pyramid: Callable[[Sequence[RgbImage]], float] | None = None,
    on_round: Callable[[], object] = lambda: None,
) -> StratumResult:
    """Time every subject on the stratum's pictures, for `duration` seconds at most after the warm-up.

    Each round gives the same batch to every subject, beginning with another one each time, so that what
    slows the machine slows all of them.  A window is one pass over the pictures, or a few where they are
    few.  It ends early once the medians of each subject's last three windows agree within 5%.
    """
    sets = batches(stratum, batch, spec)
    warm_up(sets, subjects, stratum, spec, warmup)
    result = StratumResult(
        stratum=stratum,
        batch=batch,
        latencies={subject.name: Latencies(batch=batch) for subject in subjects},
        exits={subject.name: Counter() for subject in subjects},
    )
    a_window = len(sets) * -(-LEAST_CALLS_A_WINDOW // len(sets))
    end = time.perf_counter() + duration
    number = 0
    while time.perf_counter() < end and not (number % a_window == 0 and result.stable):
        if number % a_window == 0:
            for latencies in result.latencies.values():
                latencies.windows.append([])
        images = sets[number % len(sets)]
        if pyramid is not None:
            result.pyramid_ms.append(pyramid(images))
        for i in range(len(subjects)):
            subject = subjects[(number + i) % len(subjects)]
            _note(result, subject.name, subject(images, stratum.max_level))
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


def _note(result: StratumResult, name: str, run: Run) -> None:
    latencies = result.latencies[name]
    latencies.windows[-1].append(run.total_ms)
    if run.phases_ms:
        latencies.phases.append(run.phases_ms)
    result.exits[name].update(run.exits)
