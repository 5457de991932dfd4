"""Plots of a run, drawn from the JSON that is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from asag_bench.measuring.phases import PHASES
from asag_deploy.atomic import atomic_write
from asag_deploy.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = (
    *("#2a6f97", "#e07a5f", "#81b29a", "#f2cc8f", "#6d597a"),
    *("#b56576", "#355070", "#a3b18a", "#bc6c25", "#8d99ae"),
    *("#4d908e", "#9c6644", "#d4a5c9", "#5c5c5c", "#c9184a"),
)


def check_plots() -> None:
    """Raise ConfigError if plots cannot be drawn."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise ConfigError(
            "plots need matplotlib: install it with `pip install 'asag-deploy[bench]'`"
        ) from None


def write_plots(result: Mapping[str, Any], output_dir: Path) -> list[Path]:
    """Write `latency.png`, `stages.png` and, where accuracy was measured, `speed_accuracy.png`.

    Raises OutputError if a file cannot be written.
    """
    from matplotlib.figure import Figure

    drawings: dict[str, Callable[[Axes, Mapping[str, Any]], None]] = {
        "latency.png": _latency,
        "stages.png": _stages,
    }
    if any(values["ap"] is not None for values in result["accuracy"].values()):
        drawings["speed_accuracy.png"] = draw_speed_accuracy
    paths = []
    for file, draw in drawings.items():
        height = 2 + 0.22 * _bars(result) if draw is _stages else 4.5
        figure = Figure(figsize=(9, height), layout="constrained")
        axes = figure.subplots()
        draw(axes, result)
        axes.set_title(f"{result['bundle']['variant']}, {result['machine']['processor']}", fontsize=9)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        with atomic_write(output_dir / file) as temporary:
            figure.savefig(temporary, dpi=140)
        paths.append(output_dir / file)
    return paths


def _latency(axes: Axes, result: Mapping[str, Any]) -> None:
    """Every call as a dot, and the median, by exit level and subject; batch 1, or the smallest."""
    strata = _smallest_batch(result)
    subjects = list(strata[0]["subjects"])
    dash = min(220.0, (80.0 / len(subjects)) ** 2)  # square points, so that neighbours stay apart
    for i, name in enumerate(subjects):
        positions, middles = [], []
        for x, stratum in enumerate(strata):
            calls = [ms for window in stratum["subjects"][name]["windows_ms"] for ms in window]
            position = x + (i - (len(subjects) - 1) / 2) * 0.8 / len(subjects)
            axes.scatter([position] * len(calls), calls, s=8, color=colour(i), alpha=0.3, linewidths=0)
            positions.append(position)
            middles.append(median(calls))
        axes.scatter(positions, middles, marker="_", s=dash, color=colour(i), label=name)
    axes.set_xticks(range(len(strata)), [stratum["images"] for stratum in strata])
    axes.set(xlabel="exit level", ylabel="ms a call", ylim=(0, None))
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def _stages(axes: Axes, result: Mapping[str, Any]) -> None:
    """Median milliseconds of each phase, stacked, for each subject whose calls can be split."""
    bars = [
        (f"{stratum['images']}  {name}", subject["phases_ms"])
        for stratum in _smallest_batch(result)
        for name, subject in stratum["subjects"].items()
        if subject["phases_ms"]
    ]
    left = [0.0] * len(bars)
    for i, phase in enumerate(PHASES):
        widths = [phases.get(phase, 0.0) for _, phases in bars]
        if any(widths):
            axes.barh(range(len(bars)), widths, 0.7, left, color=colour(i), label=phase)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(bars)), [label for label, _ in bars], fontsize=8)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set(xlabel="ms a call (median of each phase)")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def _bars(result: Mapping[str, Any]) -> int:
    """How many bars `_stages` draws."""
    return sum(bool(s["phases_ms"]) for block in _smallest_batch(result) for s in block["subjects"].values())


def draw_speed_accuracy(axes: Axes, result: Mapping[str, Any]) -> None:
    """AP over throughput on all of the pictures, a dot for each subject whose accuracy was measured."""
    measured = {name: found["ap"] for name, found in result["accuracy"].items() if found["ap"] is not None}
    speeds = [images_per_second(result, name) for name in measured]
    for i, (name, ap) in enumerate(measured.items()):
        label = f"{name}: AP {100 * ap:.1f}"
        axes.scatter([speeds[i]], [100 * ap], s=70, color=colour(i), alpha=0.85, label=label)
    least, most = (100 * pick(measured.values()) for pick in (min, max))
    axes.set(xlabel="images a second, one at a time", ylabel="AP")
    axes.set(xlim=(0, 1.15 * max(speeds)), ylim=(max(least - 3, 0), min(most + 3, 100)))
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14))


def images_per_second(result: Mapping[str, Any], subject: str) -> float:
    """Of a subject, one by one: each exit level counts as often as pictures stopped there by themselves."""
    seconds = pictures = 0.0
    for stratum in _smallest_batch(result):
        if not stratum["manual_stop"]:
            count = result["input"]["exit_levels"].get(stratum["images"], 0)
            seconds += count / stratum["subjects"][subject]["images_per_second"]
            pictures += count
    return pictures / seconds


def _smallest_batch(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    least = min(stratum["batch"] for stratum in result["strata"])
    return [stratum for stratum in result["strata"] if stratum["batch"] == least]


def colour(index: int) -> str:
    """Of the subject or phase with that number."""
    return _COLOURS[index % len(_COLOURS)]
