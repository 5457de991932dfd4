"""Timing: runners in turn, round by round, until their medians agree or the time is up.

No sample is ever left out.
"""

from __future__ import annotations

import gc
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import fmean, median
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from asag_bench.measuring.image_groups import ImageGroup, batches, network_shape, network_shapes
from asag_bench.result import GroupResult, RunnerResult, Spread
from asag_bench.runners.runner import Run, Runner
from asag_deploy.bundle.manifest import Preprocessing
from asag_deploy.images.reading import RgbImage

WINDOWS_TO_AGREE = 3
AGREEMENT = 0.05
LEAST_CALLS_A_WINDOW = 4

Pyramid = Callable[[Sequence[RgbImage]], float]
"""Backbone and neck alone, run on a batch: the milliseconds it took."""
_BEFORE_THE_BACKBONE = ("preprocess", "upload", "normalize")


@dataclass(kw_only=True)
class Timings:
    """Milliseconds of every call of one runner on one image group, in windows."""

    batch: int
    windows: list[list[float]] = field(default_factory=list)
    phases: list[dict[str, float]] = field(default_factory=list)
    """Per call, milliseconds by phase; empty for what cannot be split."""
    exits: Counter[str] = field(default_factory=Counter)
    """Pictures by the level at which they stopped."""
    pyramid_ms: list[float] | None = None
    """Backbone and neck alone, once a round; None for a runner that has none of its own."""

    @property
    def samples(self) -> list[float]:
        """Of all windows, in order."""
        return [sample for window in self.windows for sample in window]

    @property
    def stable(self) -> bool:
        """Whether the medians of the last windows agree; one that the time cut short has no say."""
        return agree([median(window) for window in self.windows if len(window) == len(self.windows[0])])

    def images_per_second(self) -> float:
        """Return the throughput of calls that follow one another."""
        return 1000 * self.batch / fmean(self.samples)

    def median_phases(self) -> dict[str, float]:
        """Return the median milliseconds of each phase; a phase that a call did not have counts as 0."""
        names = dict.fromkeys(name for call in self.phases for name in call)
        return {name: median(call.get(name, 0.0) for call in self.phases) for name in names}

    def after_the_neck(self) -> Spread | None:
        """Return the time beyond backbone and neck alone in the same round, as a share of theirs.

        It begins with the normalised picture; None where backbone and neck were not timed.
        """
        if self.pyramid_ms is None:
            return None
        shares_of_rounds = []
        for total, phases, pyramid in zip(self.samples, self.phases, self.pyramid_ms, strict=True):
            before = sum(phases.get(phase, 0.0) for phase in _BEFORE_THE_BACKBONE)
            shares_of_rounds.append((total - before) / pyramid - 1)
        return spread(shares_of_rounds)

    def figures(self, percentiles: Sequence[float], *, first: Timings, baseline: Timings) -> RunnerResult:
        """Return the figures of the runner, compared round by round with the first and the baseline."""
        samples, phases = self.samples, self.median_phases()
        pyramid = None if self.pyramid_ms is None else median(self.pyramid_ms)
        values = np.percentile(samples, list(percentiles))
        return RunnerResult(
            calls=len(samples),
            stable=self.stable,
            ms={
                **{f"p{q:g}": round(float(ms), 3) for q, ms in zip(percentiles, values, strict=True)},
                "mean": round(fmean(samples), 3),
                "min": round(min(samples), 3),
                "max": round(max(samples), 3),
            },
            images_per_second=round(self.images_per_second(), 3),
            phases_ms={name: round(value, 4) for name, value in phases.items()},
            windows_ms=tuple(tuple(round(sample, 3) for sample in window) for window in self.windows),
            share_of_total=shares(phases),
            backbone_and_neck_ms=None if pyramid is None else round(pyramid, 3),
            share_of_backbone_and_neck=shares(phases, pyramid),
            after_the_neck=self.after_the_neck(),
            times_as_long_as_the_first=ratio(samples, first.samples),
            times_as_fast=ratio(baseline.samples, samples),
            exits=dict(self.exits),
        )


def agree(medians: Sequence[float]) -> bool:
    """Return whether the last three of these lie within 5% of the least of them."""
    last = medians[-WINDOWS_TO_AGREE:]
    return len(last) == WINDOWS_TO_AGREE and max(last) <= (1 + AGREEMENT) * min(last)


def ratio(times: Sequence[float], base: Sequence[float]) -> Spread:
    """Return how many times as long as `base` something took, round by round."""
    return spread(np.array(times) / np.array(base))


def spread(values: Sequence[float] | NDArray[np.float64]) -> Spread:
    """Return the median, and the middle half."""
    low, middle, high = (round(float(value), 3) for value in np.percentile(values, [25, 50, 75]))
    return Spread(median=middle, p25=low, p75=high)


def shares(phases: Mapping[str, float], whole: float | None = 0.0) -> dict[str, float]:
    """Return each phase as a share of `whole`, or of their sum; nothing if there is no whole."""
    if whole is None or not phases:
        return {}
    total = whole or sum(phases.values())
    return {name: round(value / total, 4) for name, value in phases.items()}


def measure(
    group: ImageGroup,
    runners: Sequence[Runner],
    *,
    batch: int,
    spec: Preprocessing,
    warmup: int,
    duration: float,
    pyramids: Mapping[str, Pyramid] = MappingProxyType({}),
    on_round: Callable[[], object] = lambda: None,
) -> dict[str, Timings]:
    """Time every runner on the group's pictures, for `duration` seconds at most after the warm-up.

    Each round gives the same batch to every runner, beginning with another one each time, so that what slows
    the machine slows all of them; a runner that has a pyramid has it timed beside it.  A window is one pass
    over the pictures, or a few where they are few.  It ends early once the medians of each runner's last
    three windows agree within 5%.
    """
    sets = batches(group, batch, spec)
    _warm_up(sets, runners, pyramids, group, spec, warmup)
    timings = {
        runner.name: Timings(batch=batch, pyramid_ms=[] if runner.name in pyramids else None)
        for runner in runners
    }
    a_window = len(sets) * -(-LEAST_CALLS_A_WINDOW // len(sets))
    number = 0
    with nothing_old_collected():
        end = time.perf_counter() + duration
        while time.perf_counter() < end and not (number % a_window == 0 and are_stable(timings)):
            if number % a_window == 0:
                for each in timings.values():
                    each.windows.append([])
            images = sets[number % len(sets)]
            for i in range(len(runners)):
                runner = runners[(number + i) % len(runners)]
                of_runner, pyramid = timings[runner.name], pyramids.get(runner.name)
                # Right beside the call, on either side in turn: so close that the machine has not changed.
                if number % 2:
                    _time_pyramid(of_runner, pyramid, images)
                _note(of_runner, runner(images, group.max_level))
                if not number % 2:
                    _time_pyramid(of_runner, pyramid, images)
            number += 1
            on_round()
    return timings


@contextmanager
def nothing_old_collected() -> Iterator[None]:
    """Let Python's collector pass over all that is there already, until the body ends.

    Of a program with PyTorch and several networks one collection takes a third of a second, in the middle of
    whatever is timed then.  What the body itself makes is collected as ever, which is what a call costs.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def are_stable(timings: Mapping[str, Timings]) -> bool:
    """Return whether every runner's medians agree."""
    return all(each.stable for each in timings.values())


def group_result(
    group: ImageGroup,
    timings: Mapping[str, Timings],
    *,
    batch: int,
    spec: Preprocessing,
    percentiles: Sequence[float],
    baseline: str,
    compared: Mapping[str, str] = MappingProxyType({}),
) -> GroupResult:
    """Return the figures of all runners on one image group.

    compared: runners that go deeper than another one, by which.
    """
    first = next(iter(timings.values()))
    pictures = group.pictures
    return GroupResult(
        images=group.name,
        manual_stop=group.max_level,
        batch=batch,
        network_shapes=network_shapes((picture.image for picture in pictures), spec),
        pictures=tuple(picture.name for picture in pictures),
        patches=tuple(picture.patches for picture in pictures),
        anchors=tuple(picture.found.trace.anchor_count for picture in pictures),
        stable=are_stable(timings),
        compared=dict(compared),
        probing_costs={
            name: ratio(timings[name].samples, timings[other].samples) for name, other in compared.items()
        },
        runners={
            name: each.figures(percentiles, first=first, baseline=timings[baseline])
            for name, each in timings.items()
        },
    )


def _warm_up(
    sets: Sequence[Sequence[RgbImage]],
    runners: Sequence[Runner],
    pyramids: Mapping[str, Pyramid],
    group: ImageGroup,
    spec: Preprocessing,
    count: int,
) -> None:
    """Run each runner on every batch, and at least `count` times on each shape; never if `count` is 0.

    A new shape is compiled and allocated for anew, and what compiles as it goes (torch.compile) does so for
    other numbers of patches and anchors as well, which any picture may bring.  Pyramids, which have the shape
    alone to go by, run `count` times on each.
    """
    by_shape = defaultdict(list)
    for images in sets:
        by_shape[tuple(sorted(network_shape(image, spec) for image in images))].append(images)
    for alike in by_shape.values():
        calls = max(count, len(alike)) if count else 0
        for runner in runners:
            for number in range(calls):
                runner(alike[number % len(alike)], group.max_level)
        for pyramid in pyramids.values():
            for _ in range(count):
                pyramid(alike[0])


def _time_pyramid(timings: Timings, pyramid: Pyramid | None, images: Sequence[RgbImage]) -> None:
    if pyramid is not None and timings.pyramid_ms is not None:
        timings.pyramid_ms.append(pyramid(images))


def _note(timings: Timings, run: Run) -> None:
    timings.windows[-1].append(run.total_ms)
    if run.phases_ms:
        timings.phases.append(run.phases_ms)
    timings.exits.update(run.exits)
