"""A picture of several seeds: what each part is worth, beside what the paper says of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from asag_bench.paper.figures.canvas import COLOURS, new_figure, save
from asag_bench.paper.tables import SETTINGS_ONLY

_ROW, _AROUND = 0.34, 1.1
"""Inches."""


class _Gain(NamedTuple):
    name: str
    here: Mapping[str, float]
    paper: float | None


def write_gains(path: Path, content: Mapping[str, Any]) -> Path | None:
    """Draw the AP of each row less that of its table's first one, of what `asag_bench.paper.seeds.as_file`
    made.

    A dot is the mean of the seeds, its line goes from the lowest to the highest, a diamond is the paper's.
    Rows of a network that has the settings of an ablation, but not its training, say so.
    Returns None where no table has such a row, and writes nothing.
    """
    gains = [
        _Gain(f"{table['number']}: {_name(table, row)}", row["gain"], row["paper_gain"])
        for table in content["seeds"]
        for row in table["rows"]
        if row.get("gain") is not None
    ]
    if not gains:
        return None
    figure = new_figure(8.0, _ROW * len(gains) + _AROUND)
    axes: Any = figure.subplots()
    axes.axvline(0.0, color="#999999", linewidth=1)
    for i, gain in enumerate(gains):
        axes.hlines(i, gain.here["low"], gain.here["high"], color=COLOURS[0], linewidth=2)
        axes.plot(gain.here["mean"], i, "o", color=COLOURS[0], label="here" if i == 0 else None)
    paper = [(gain.paper, i) for i, gain in enumerate(gains) if gain.paper is not None]
    if paper:
        axes.plot(*zip(*paper, strict=True), "D", color=COLOURS[1], linestyle="", label="the paper, COCO")
    axes.set_yticks(range(len(gains)), [gain.name for gain in gains], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("AP less that of the table's first row")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=8, loc="best")
    seeds = "one seed" if len(content["runs"]) == 1 else f"{len(content['runs'])} seeds"
    axes.set_title(f"{content['runs'][0]['of'][0]} ({seeds})", fontsize=8)
    return save(figure, path)


def _name(table: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    labels = [f"{head} {label}" for head, label in zip(table["heads"], row["labels"], strict=True)]
    name = ", ".join(label.removeprefix("detector ") for label in labels)
    return f"{name} (settings only)" if SETTINGS_ONLY in row["state"] else name
