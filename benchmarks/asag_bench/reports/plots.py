"""Plots of a run, and that of docs/speed.md: how many times as fast by exit level, speed against accuracy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from asag_bench.measuring.image_groups import WORST
from asag_bench.result import Result
from asag_bench.runners.runner import PHASES
from asag_deploy.atomic import atomic_write
from asag_evaluation.plots import check_plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = (
    *("#2a6f97", "#e07a5f", "#81b29a", "#f2cc8f", "#6d597a"),
    *("#b56576", "#355070", "#a3b18a", "#bc6c25", "#8d99ae"),
    *("#4d908e", "#9c6644", "#d4a5c9", "#5c5c5c", "#c9184a"),
)
_WIDTH = 0.8
"""Of the bars of one exit level together."""


def write_plots(result: Result, output_dir: Path) -> list[Path]:
    """Write the `PLOTS`, without that of accuracy where none was measured, and return their paths.

    Raises OutputError if a file cannot be written.
    """
    figure_type = check_plots("asag-bench")
    paths = []
    for file, draw in PLOTS.items():
        if draw is draw_speed_accuracy and not result.has_accuracy:
            continue
        height = 2 + 0.22 * len(_bars(result)) if draw is _stages else 4.5
        figure = figure_type(figsize=(9, height), layout="constrained")
        axes = figure.subplots()
        draw(axes, result)
        axes.set_title(f"{result.bundle.variant}, {result.machine.processor}", fontsize=9)
        _open_box(axes)
        with atomic_write(output_dir / file) as temporary:
            figure.savefig(temporary, dpi=140)
        paths.append(output_dir / file)
    return paths


def draw_summary(speed: Result, accuracy: Result | None, path: Path, fingerprint: str) -> None:
    """Draw a result's speeds, and beside it another's speed against accuracy, as PNG to `path`.

    The file carries `fingerprint` as its description.
    """
    figure_type = check_plots("asag-bench")
    bars = max(6.4, 1.0 + 0.9 * len(speed.headline.runners))
    widths = [bars] if accuracy is None else [bars, 5.0]
    figure = figure_type(figsize=(sum(widths), 4.6), layout="constrained")
    axes = figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
    _speeds(axes[0], speed)
    if accuracy is not None:
        draw_speed_accuracy(axes[1], accuracy)
        axes[1].set_title(accuracy.title, fontsize=10)
    for one in axes:
        _open_box(one)
    figure.savefig(path, dpi=130, format="png", metadata={"Description": fingerprint, "Software": None})


def _latency(axes: Axes, result: Result) -> None:
    """Draw every call as a dot, and the median, by exit level and runner; batch 1, or the smallest."""
    groups = result.smallest_batch
    runners = list(groups[0].runners)
    dash = min(220.0, (80.0 / len(runners)) ** 2)  # square points, so that neighbours stay apart
    for i, name in enumerate(runners):
        positions, middles = [], []
        for x, group in enumerate(groups):
            calls = [ms for window in group.runners[name].windows_ms for ms in window]
            position = x + (i - (len(runners) - 1) / 2) * 0.8 / len(runners)
            axes.scatter([position] * len(calls), calls, s=8, color=_colour(i), alpha=0.3, linewidths=0)
            positions.append(position)
            middles.append(median(calls))
        axes.scatter(positions, middles, marker="_", s=dash, color=_colour(i), label=name)
    axes.set_xticks(range(len(groups)), [group.images for group in groups])
    axes.set(xlabel="exit level", ylabel="ms a call", ylim=(0, None))
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def _stages(axes: Axes, result: Result) -> None:
    """Draw the median milliseconds of each phase, stacked, for each runner whose calls can be split."""
    bars = _bars(result)
    left = [0.0] * len(bars)
    for i, phase in enumerate(PHASES):
        widths = [phases.get(phase, 0.0) for _, phases in bars]
        if any(widths):
            axes.barh(range(len(bars)), widths, 0.7, left, color=_colour(i), label=phase)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(bars)), [label for label, _ in bars], fontsize=8)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set(xlabel="ms a call (median of each phase)")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def _bars(result: Result) -> list[tuple[str, dict[str, float]]]:
    """Return the labels and phases of what `_stages` draws."""
    return [
        (f"{group.images}  {name}", figures.phases_ms)
        for group in result.smallest_batch
        for name, figures in group.runners.items()
        if figures.phases_ms
    ]


def _speeds(axes: Axes, result: Result) -> None:
    """Draw bars by exit level and runner, with the middle half of the rounds."""
    headline = result.headline
    baseline = headline.baseline
    speeds = {name: found.times_as_fast for name, found in headline.runners.items() if name != baseline}
    levels = [level for level in next(iter(headline.runners.values())).times_as_fast if level != WORST]
    width = _WIDTH / max(len(speeds), 1)
    for i, (name, by_level) in enumerate(speeds.items()):
        places = [x - _WIDTH / 2 + (i + 0.5) * width for x in range(len(levels))]
        found = [by_level[level] for level in levels]
        heights = [speed.median for speed in found]
        below = [max(speed.median - speed.p25, 0.0) for speed in found]
        above = [max(speed.p75 - speed.median, 0.0) for speed in found]
        axes.bar(
            places, heights, 0.9 * width, yerr=[below, above], color=_colour(i), ecolor="#444", label=name
        )
        for x, height, up in zip(places, heights, above, strict=True):
            axes.annotate(
                f"{height:.1f}",
                (x, height + up),
                (0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=7,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.4},
            )
    called = "PyTorch" if baseline == "torch" else baseline
    axes.axhline(1.0, color="#444", linewidth=0.8, linestyle="--", label=called, zorder=0)
    axes.set_xticks(range(len(levels)), [f"stops at {level}" for level in levels])
    axes.set_ylabel(f"times as fast as {called}")
    axes.set_title(result.title, fontsize=10)
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.1))


def draw_speed_accuracy(axes: Axes, result: Result) -> None:
    """Draw AP over throughput on all of the pictures, a dot for each runner whose accuracy was measured."""
    measured = {name: found.ap for name, found in result.accuracy.items() if found.ap is not None}
    speeds = [images_per_second(result, name) for name in measured]
    for i, (name, ap) in enumerate(measured.items()):
        label = f"{name}: AP {100 * ap:.1f}"
        axes.scatter([speeds[i]], [100 * ap], s=70, color=_colour(i), alpha=0.85, label=label)
    least, most = (100 * pick(measured.values()) for pick in (min, max))
    axes.set(xlabel="images a second, one at a time", ylabel="AP")
    axes.set(xlim=(0, 1.15 * max(speeds)), ylim=(max(least - 3, 0), min(most + 3, 100)))
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14))


def images_per_second(result: Result, runner: str) -> float:
    """Return a runner's throughput over all pictures, one by one.

    Each exit level counts as often as pictures stopped there by themselves.
    """
    seconds = pictures = 0.0
    for group in result.smallest_batch:
        if not group.manual_stop:
            count = result.input.exit_levels.get(group.images, 0)
            speed = group.runners[runner].images_per_second
            if speed <= 0:  # rounded to nothing
                return 0.0
            seconds += count / speed
            pictures += count
    return pictures / seconds


def _open_box(axes: Axes) -> None:
    """Leave the box open above and at the right."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _colour(index: int) -> str:
    """Return the colour of the runner or phase with that number."""
    return _COLOURS[index % len(_COLOURS)]


PLOTS: dict[str, Callable[[Axes, Result], None]] = {
    "latency.png": _latency,
    "stages.png": _stages,
    "speed_accuracy.png": draw_speed_accuracy,
}
"""Each plot's file, and what draws it."""
