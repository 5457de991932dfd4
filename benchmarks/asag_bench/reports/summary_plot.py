"""The README's plot: how many times as fast by exit level, and speed against accuracy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asag_bench.reports.plots import colour, draw_speed_accuracy
from asag_bench.reports.report import title

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH = 0.8
"""Of the bars of one exit level together."""


def draw_summary(
    speed: Mapping[str, Any], accuracy: Mapping[str, Any] | None, path: Path, fingerprint: str
) -> None:
    """Draw a result's speeds, and beside it another's speed against accuracy, as PNG to `path`.

    The file carries `fingerprint` as its description.
    """
    from matplotlib.figure import Figure

    bars = max(6.4, 1.0 + 0.9 * len(speed["headline"]["subjects"]))
    widths = [bars] if accuracy is None else [bars, 5.0]
    figure = Figure(figsize=(sum(widths), 4.6), layout="constrained")
    axes = figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
    _speeds(axes[0], speed)
    if accuracy is not None:
        draw_speed_accuracy(axes[1], accuracy)
        axes[1].set_title(title(accuracy), fontsize=10)
    for one in axes:
        for side in ("top", "right"):
            one.spines[side].set_visible(False)
    figure.savefig(path, dpi=130, format="png", metadata={"Description": fingerprint, "Software": None})


def _speeds(axes: Axes, result: Mapping[str, Any]) -> None:
    """Bars by exit level and subject, with the middle half of the rounds."""
    found = result["headline"]
    reference = found["reference"]
    subjects = {name: s["times_as_fast"] for name, s in found["subjects"].items() if name != reference}
    levels = [level for level in next(iter(found["subjects"].values()))["times_as_fast"] if level != "worst"]
    width = _WIDTH / max(len(subjects), 1)
    for i, (name, speeds) in enumerate(subjects.items()):
        places = [x - _WIDTH / 2 + (i + 0.5) * width for x in range(len(levels))]
        heights = [speeds[level]["median"] for level in levels]
        below = [max(speeds[level]["median"] - speeds[level]["p25"], 0.0) for level in levels]
        above = [max(speeds[level]["p75"] - speeds[level]["median"], 0.0) for level in levels]
        axes.bar(
            places, heights, 0.9 * width, yerr=[below, above], color=colour(i), ecolor="#444", label=name
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
    axes.axhline(1.0, color="#444", linewidth=0.8, linestyle="--", label=_called(reference), zorder=0)
    axes.set_xticks(range(len(levels)), [f"stops at {level}" for level in levels])
    axes.set_ylabel(f"times as fast as {_called(reference)}")
    axes.set_title(title(result), fontsize=10)
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.1))


def _called(reference: str) -> str:
    return "PyTorch" if reference == "torch" else reference
