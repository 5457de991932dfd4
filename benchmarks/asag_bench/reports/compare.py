"""Whether two runs of `asag-bench` agree within what they claim.

A run calls a row stable when its last three windows agree within 5%.  So two runs of the same command on the
same machine should give the same median for every row that both call stable, within those 5%, and the same
ratios.  Rows that either run calls unstable claim nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from asag_bench.reports.columns import Row, on_screen, rows_of
from asag_bench.result import Result
from asag_deploy.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One image group, batch and runner in both results."""

    images: str
    batch: int
    runner: str
    stable: bool
    """In both."""
    ms: tuple[float, float]
    """Medians."""
    speed: tuple[float, float]
    """Compared with the baseline."""

    def agrees(self, tolerance: float) -> bool | None:
        """Return whether medians and speeds agree; None where a run claims nothing."""
        return all(_apart(*pair) <= tolerance for pair in (self.ms, self.speed)) if self.stable else None


def compare(first: Result, second: Result, tolerance: float) -> tuple[str, bool]:
    """Compare two results; return the comparison row by row, and whether all stable rows agree.

    They do not if there are none.  Raises ConfigError for a tolerance that makes no sense, or for results
    that measured different things.
    """
    if not 0 <= tolerance < 1:
        raise ConfigError(f"--tolerance is {tolerance:g}; expected a share of at least 0 and less than 1")
    pairs = pairs_of(first, second)
    verdicts = [pair.agrees(tolerance) for pair in pairs]
    stable = [verdict for verdict in verdicts if verdict is not None]
    unstable = f"{len(pairs) - len(stable)} of all {len(pairs)} are not stable and"
    lines = [
        *on_screen(_table(pairs, verdicts)),
        "",
        f"{sum(stable)} of {len(stable)} stable rows agree within {tolerance:.0%}; {unstable} claim nothing",
    ]
    if None in _operators(first, second):
        lines.append(
            "not every result says whether operators were compiled, which earlier releases did not write"
        )
    return "\n".join(lines), bool(stable) and all(stable)


def pairs_of(first: Result, second: Result) -> list[Pair]:
    """Return the rows of two results, in the order of the first.

    Raises ConfigError if they measured different things, or on different machines.
    """
    rows = rows_of(first), rows_of(second)
    for what, one, two in (
        ("processors", first.machine.processor, second.machine.processor),
        ("versions of libraries", first.machine.packages, second.machine.packages),
        ("compiled operators", *_operators_if_both_say(first, second)),
        ("graphs", _graphs(first), _graphs(second)),
        ("options", first.options, second.options),
        ("baselines", first.baseline, second.baseline),
        ("rows", *([(row.group.images, row.group.batch, row.runner) for row in side] for side in rows)),
    ):
        if one != two:
            raise ConfigError(
                f"the two results are of different {what}, so that nothing says they should agree; "
                "compare two runs of one command on one machine"
            )
    return [_pair(one, other) for one, other in zip(*rows, strict=True)]


def _pair(one: Row, other: Row) -> Pair:
    both = one.figures, other.figures
    medians = [figures.ms.get("p50", figures.ms["mean"]) for figures in both]
    speeds = [figures.times_as_fast.median for figures in both]
    return Pair(
        images=one.group.images,
        batch=one.group.batch,
        runner=one.runner,
        stable=all(figures.stable for figures in both),
        ms=(medians[0], medians[1]),
        speed=(speeds[0], speeds[1]),
    )


def _table(pairs: Sequence[Pair], verdicts: Sequence[bool | None]) -> list[tuple[str, ...]]:
    words = {True: "yes", False: "NO", None: "not stable"}
    lines: list[tuple[str, ...]] = [
        ("images", "batch", "runner", "ms", "ms again", "apart", "speed", "again", "apart", "agrees")
    ]
    for pair, verdict in zip(pairs, verdicts, strict=True):
        ms = (f"{pair.ms[0]:.1f}", f"{pair.ms[1]:.1f}", f"{_apart(*pair.ms):.1%}")
        speed = (f"{pair.speed[0]:.2f}", f"{pair.speed[1]:.2f}", f"{_apart(*pair.speed):.1%}")
        lines.append((pair.images, str(pair.batch), pair.runner, *ms, *speed, words[verdict]))
    return lines


def _operators(*results: Result) -> tuple[str | None, ...]:
    return tuple(result.machine.compiled_operators for result in results)


def _operators_if_both_say(first: Result, second: Result) -> tuple[str | None, ...]:
    said = _operators(first, second)
    return (None, None) if None in said else said


def _graphs(result: Result) -> dict[str, dict[str, str]]:
    return {name: bundle.graphs for name, bundle in result.bundles.items()}


def _apart(one: float, other: float) -> float:
    """Return by how much the larger figure is above the smaller, as a fraction of that."""
    least, most = sorted((one, other))
    if least <= 0:  # a speed that is rounded to nothing
        return 0.0 if most <= 0 else math.inf
    return most / least - 1
