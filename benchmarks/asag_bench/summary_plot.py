"""The README's plot: how many times as fast by exit level, and speed against accuracy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asag_bench.plots import colour
from asag_bench.report import title

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

    panels = 1 if accuracy is None else 2
    figure = Figure(figsize=(6.4 * panels, 4.6), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    _speeds(axes[0], speed)
    if accuracy is not None:
        _speed_accuracy(axes[1], accuracy)
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
                f"{height:.1f}", (x, height + up), (0, 2), textcoords="offset points", ha="center", fontsize=7
            )
    axes.axhline(1.0, color="#444", linewidth=0.8, linestyle="--", label=_called(reference))
    axes.set_xticks(range(len(levels)), [f"stops at {level}" for level in levels])
    axes.set_ylabel(f"times as fast as {_called(reference)}")
    axes.set_title(title(result), fontsize=10)
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.1))


def _speed_accuracy(axes: Axes, result: Mapping[str, Any]) -> None:
    """AP over throughput on all of the pictures, a dot for each subject whose accuracy was measured."""
    measured = {name: found["ap"] for name, found in result["accuracy"].items() if found["ap"] is not None}
    for i, (name, ap) in enumerate(measured.items()):
        axes.scatter([images_per_second(result, name)], [100 * ap], s=70, color=colour(i), label=name)
    axes.set(xlabel="images a second", ylabel="AP", xlim=(0, None))
    axes.margins(x=0.15, y=0.3)
    axes.set_xlim(left=0)
    axes.set_title(title(result), fontsize=10)
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.14))


def images_per_second(result: Mapping[str, Any], subject: str) -> float:
    """Of a subject, one by one: each exit level counts as often as pictures stopped there by themselves."""
    seconds = pictures = 0.0
    least = min(stratum["batch"] for stratum in result["strata"])
    for stratum in result["strata"]:
        count = result["input"]["exit_levels"].get(stratum["images"], 0)
        if stratum["batch"] == least and not stratum["manual_stop"]:
            seconds += count / stratum["subjects"][subject]["images_per_second"]
            pictures += count
    return pictures / seconds


def _called(reference: str) -> str:
    return "PyTorch" if reference == "torch" else reference
