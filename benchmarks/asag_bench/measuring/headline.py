"""The few figures that a run is looked at for, taken from its image groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from asag_bench.result import Accuracy, GroupResult, Headline, RunnerHeadline, Spread
from asag_bench.runners.compared.published import is_compared


def headline(
    groups: Sequence[GroupResult],
    *,
    baseline: str,
    references: Sequence[str],
    accuracy: Mapping[str, Accuracy],
) -> Headline:
    """Return what a run found in few figures: those of its smallest batch."""
    least = min(group.batch for group in groups)
    chosen = [group for group in groups if group.batch == least]
    names = dict.fromkeys(name for group in chosen for name in group.runners)
    stopped = {other for group in chosen for other in group.compared.values()}
    return Headline(
        batch=least,
        baseline=baseline,
        runners={name: _of_runner(name, chosen, accuracy) for name in names if name not in stopped},
        compared={
            name: {group.images: group.runners[name].times_as_long_as_the_first for group in chosen}
            for name in filter(is_compared, references)
        },
    )


def _of_runner(name: str, groups: Sequence[GroupResult], accuracy: Mapping[str, Accuracy]) -> RunnerHeadline:
    found = {group.images: group.runners[name] for group in groups if name in group.runners}
    phases = [figures.phases_ms for figures in found.values()]
    # Where the stages are not among the phases, the GPU runs them by itself, and `loop` is all of them.
    loops = [of_each["loop"] for of_each in phases if {"backbone", "loop"} <= of_each.keys()]
    ratio = next((group.probing_costs[name] for group in groups if name in group.probing_costs), None)
    return RunnerHeadline(
        times_as_fast={level: figures.times_as_fast for level, figures in found.items()},
        after_the_neck={
            level: figures.after_the_neck
            for level, figures in found.items()
            if figures.after_the_neck is not None
        },
        loop_ms=max(loops) if loops else None,
        probing_costs=None if ratio is None else _beyond_one(ratio),
        ap=accuracy[name].ap if name in accuracy else None,
    )


def _beyond_one(ratio: Spread) -> Spread:
    low, middle, high = (round(value - 1, 4) for value in (ratio.p25, ratio.median, ratio.p75))
    return Spread(median=middle, p25=low, p75=high)
