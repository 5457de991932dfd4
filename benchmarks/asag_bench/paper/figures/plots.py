"""Figures of numbers: speed against AP (1), how anchors adapt (6), and the weight of a query (A-1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from asag_bench.paper.figures.canvas import COLOURS, new_figure, save
from asag_bench.paper.numbers import TABLES
from asag_evaluation.metrics.anchors import LEVELS
from asag_training.losses.query_weighting import norm

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LEVEL_TITLES = {"P5": "P5, P6", "P4": "P4 to P6", "P3": "P3 to P6"}
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


class Point(NamedTuple):
    """A network in figure 1."""

    name: str
    queries: float
    fps: float
    ap: float


def paper_points() -> list[Point]:
    """Return the rows of the paper's tables 3 and 4 that have a speed, once each; not those on ResNet-101."""
    found = dict.fromkeys(
        Point(row.labels[0], row.paper["#An"], row.paper["FPS"], row.paper["AP"])
        for number in ("3", "4")
        for row in TABLES[number].rows
        if "FPS" in row.paper and row.max_level is None and "101" not in row.labels[0]
    )
    return list(found)


def write_speed(path: Path, here: Sequence[Point]) -> Path:
    """Draw figure 1: images a second against AP, of what was measured here and of the paper."""
    figure = new_figure(10.0, 4.2)
    axes: Any = figure.subplots(1, 2)
    for place, points, title in (
        (axes[0], here, "here, PyTorch on this machine"),
        (axes[1], paper_points(), "the paper, COCO val2017, RTX 3090"),
    ):
        _speed_against_ap(place, points)
        place.set_title(title, fontsize=10)
    return save(figure, path)


def _speed_against_ap(axes: Axes, points: Sequence[Point]) -> None:
    by_name: dict[str, list[Point]] = {}
    for point in points:
        by_name.setdefault(point.name, []).append(point)
    for i, (name, group) in enumerate(by_name.items()):
        group = sorted(group, key=lambda point: point.queries)
        fps, ap = [point.fps for point in group], [point.ap for point in group]
        style = {"color": COLOURS[i % len(COLOURS)], "marker": _MARKERS[i % len(_MARKERS)]}
        axes.plot(fps, ap, linewidth=1, label=name, **style)  # type: ignore[arg-type]
        for point in group:
            axes.annotate(
                f"{point.queries:.0f}", (point.fps, point.ap), (4, 4), textcoords="offset points", fontsize=7
            )
    axes.set_xlabel("images a second (numbers: queries)")
    axes.set_ylabel("AP")
    axes.grid(alpha=0.3)
    axes.margins(0.12)
    axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncol=4)


def write_adaptation(path: Path, figures: Mapping[str, Any], name: str) -> Path:
    """Draw figure 6: anchors against objects of each image, and the images by the levels that they used.

    figures: `points` and `exits` of a network as it was measured.
    """
    figure = new_figure(10.0, 4.0)
    axes: Any = figure.subplots(1, 2)
    points = np.array(figures["points"], dtype=float).reshape(-1, 2)
    axes[0].scatter(points[:, 0], points[:, 1], s=16, color=COLOURS[0], alpha=0.5, linewidths=0)
    correlation = figures["correlation"]
    if correlation is not None:
        slope, offset = np.polyfit(points[:, 0], points[:, 1], 1)
        ends = np.array([points[:, 0].min(), points[:, 0].max()])
        axes[0].plot(ends, slope * ends + offset, color=COLOURS[1], label=f"correlation {correlation:.2f}")
        axes[0].legend(frameon=False)
    axes[0].set(xlabel="objects in an image", ylabel="anchors", ylim=(0, None))
    heights = [figures["exits"][level] for level in LEVELS]
    axes[1].bar([_LEVEL_TITLES[level] for level in LEVELS], heights, 0.6, color=COLOURS[0])
    for position, height in enumerate(heights):
        share = f"{height / max(sum(heights), 1):.0%}"
        axes[1].annotate(share, (position, height), ha="center", va="bottom")
    axes[1].set(xlabel="levels that were used", ylabel="images", ylim=(0, 1.12 * max(*heights, 1)))
    for place in axes:
        for side in ("top", "right"):
            place.spines[side].set_visible(False)
    figure.suptitle(name, fontsize=10)
    return save(figure, path)


def write_norm(path: Path) -> Path:
    """Draw figure A-1: the weight of Query Weighting over the product of score and IoU (equation 1)."""
    figure = new_figure(4.6, 3.6)
    axes = figure.subplots()
    x = torch.linspace(0, 1, 201)
    axes.plot(x.numpy(), norm(x).numpy(), color=COLOURS[0], label="NORM(x)")
    axes.plot([0, 1], [0, 1], color=COLOURS[-1], linewidth=0.8, linestyle="--", label="x")
    axes.set(xlabel="x, score times IoU", ylabel="weight", xlim=(0, 1), ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return save(figure, path)
