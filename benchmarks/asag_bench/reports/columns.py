"""The columns of the bench's tables: what each is called, how it is measured, and how it is printed.

To add a column, add a `Column` to `COLUMNS`.  Every call of every runner is in the result, so that
most figures can be computed right there.  One that has to be measured first gets a field in
`asag_bench.result`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from asag_bench.result import GroupResult, Result, RunnerMemory, RunnerResult, Spread
from asag_bench.runners.runner import PHASES

TextRow = Sequence[str]
LEFT = ("images", "runner", "method")
"""Columns of words, which stand at the left."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One runner on one image group."""

    result: Result
    group: GroupResult
    runner: str

    @property
    def figures(self) -> RunnerResult:
        """What was timed."""
        return self.group.runners[self.runner]


def _always(result: Result) -> bool:
    return True


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of the table of latencies."""

    title: str
    """May name the `{baseline}`."""
    measured: str
    """How, in a few words."""
    cell: Callable[[Row], str]
    shown: Callable[[Result], bool] = _always
    """Whether a result has such figures."""


def _percentile(name: str) -> Column:
    return Column(
        title=f"{name} ms", measured="percentile of all calls", cell=lambda row: f"{row.figures.ms[name]:.1f}"
    )


def _memory(figure: Callable[[RunnerMemory], float | None], precision: str) -> Callable[[Row], str]:
    """Return cells with a figure of loading; a runner that was loaded as another one has none."""

    def cell(row: Row) -> str:
        found = row.result.memory.runners.get(row.runner)
        return _figure(None if found is None else figure(found), precision)

    return cell


def _parity(row: Row) -> str:
    """Return what the bundle of a runner says of its parity with PyTorch; nothing for references."""
    bundle = row.result.bundles.get(row.runner)
    return {True: "passed", False: "NOT PASSED", None: "-"}[bundle.parity_passed if bundle else None]


def _agreement(row: Row) -> str:
    found = row.result.agreement.runners.get(row.runner) if row.result.agreement else None
    return percent(found.detections if found else None)


_PERCENTILES = "percentiles"
"""The column in whose place stand those that `--percentile` asks for."""
COLUMNS = (
    Column(title="images", measured="by the level at which they stop", cell=lambda row: row.group.title),
    Column(title="batch", measured="images a call", cell=lambda row: str(row.group.batch)),
    Column(title="runner", measured="a bundle on a backend, or a reference", cell=lambda row: row.runner),
    Column(title="calls", measured="all that count", cell=lambda row: str(row.figures.calls)),
    Column(title=_PERCENTILES, measured="of all calls, in ms", cell=lambda row: ""),
    Column(title="max ms", measured="the longest call", cell=lambda row: f"{row.figures.ms['max']:.1f}"),
    Column(
        title="images/s",
        measured="throughput of calls that follow one another",
        cell=lambda row: f"{row.figures.images_per_second:.2f}",
    ),
    Column(
        title="ratio",
        measured="time over the first runner's in the same rounds, with the middle half",
        cell=lambda row: times(row.figures.times_as_long_as_the_first),
    ),
    Column(
        title="times as fast as {baseline}",
        measured="the baseline's time over the runner's, likewise",
        cell=lambda row: times(row.figures.times_as_fast),
    ),
    Column(
        title="AP",
        measured="of the untimed detector on --data, in percent",
        cell=lambda row: percent(row.result.ap(row.runner)),
        shown=lambda result: result.has_accuracy,
    ),
    Column(title="parity", measured="the exporter's own finding", cell=_parity),
    Column(
        title="agrees",
        measured="percent of what the float32 bundle finds in ONNX Runtime",
        cell=_agreement,
        shown=lambda result: result.agreement is not None and bool(result.agreement.runners),
    ),
    Column(
        title="load s",
        measured="seconds to open, verify and load",
        cell=_memory(lambda memory: memory.load_s, ".2f"),
        shown=lambda result: result.memory.has_load_times,
    ),
    Column(
        title="MiB",
        measured="resident memory added by loading and the first call",
        cell=_memory(lambda memory: memory.added_mib, ".0f"),
        shown=lambda result: result.memory.has_load_times,
    ),
    Column(
        title="growth MiB",
        measured="memory added by the pictures of --memory-images, after the first 20",
        cell=_memory(lambda memory: memory.growth_mib, ".1f"),
        shown=lambda result: result.options.memory_images > 0,
    ),
    Column(
        title="stable",
        measured="whether the last three windows' medians agree within 5%",
        cell=lambda row: "yes" if row.figures.stable else "NO",
    ),
)
"""The table of latencies, from left to right."""


def rows_of(result: Result) -> list[Row]:
    """Return one row for each kind of image, batch and runner."""
    return [
        Row(result=result, group=group, runner=runner) for group in result.groups for runner in group.runners
    ]


def latency_rows(result: Result) -> list[TextRow]:
    """Return the table of latencies, under its title."""
    percentiles = [_percentile(f"p{q:g}") for q in result.options.percentile]
    columns = [
        column
        for each in COLUMNS
        for column in (percentiles if each.title == _PERCENTILES else [each])
        if column.shown(result)
    ]
    cells = [[column.cell(row) for column in columns] for row in rows_of(result)]
    return [[column.title.format(baseline=result.baseline) for column in columns], *cells]


def phase_rows(result: Result) -> list[TextRow]:
    """Return the table of where the time goes, under its title.

    It gives the median milliseconds of each phase with its share of the whole, and of backbone and neck alone
    where these could be timed.
    """
    split = [row for row in rows_of(result) if row.figures.phases_ms]
    phases = [phase for phase in PHASES if any(phase in row.figures.phases_ms for row in split)]
    titles = ["images", "batch", "runner", "backbone + neck alone", *phases]
    return [
        titles,
        *(
            [
                row.group.title,
                str(row.group.batch),
                row.runner,
                _figure(row.figures.backbone_and_neck_ms, ".1f"),
                *(_phase(row.figures, phase) for phase in phases),
            ]
            for row in split
        ),
    ]


def _phase(figures: RunnerResult, phase: str) -> str:
    """Return `ms (share of the whole, share of backbone and neck)`."""
    if phase not in figures.phases_ms:
        return "-"
    shares = [figures.share_of_total[phase]]
    shares += [figures.share_of_backbone_and_neck[phase]] if figures.share_of_backbone_and_neck else []
    return f"{figures.phases_ms[phase]:.4g} ({', '.join(map(_share, shares))})"


def times(found: Spread) -> str:
    """Return a ratio with its middle half."""
    return f"{found.median:.2f} ({found.p25:.2f} to {found.p75:.2f})"


def percent(value: float | None) -> str:
    """Return a share in percent, or `-`."""
    return "-" if value is None else f"{100 * value:.1f}"


def _figure(value: float | None, precision: str) -> str:
    return "-" if value is None else format(value, precision)


def _share(share: float) -> str:
    return f"{share:.0%}" if share >= 0.1 else f"{share:.1%}"


def on_screen(rows: Sequence[TextRow]) -> list[str]:
    """Return the lines of a table under its title, for a screen; numbers stand at the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    left = {i for i, title in enumerate(rows[0]) if title in LEFT}
    return [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def in_markdown(rows: Sequence[TextRow]) -> list[str]:
    """Return the lines of a table under its title, for a page."""
    head, *body = rows
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body)]
