"""A sweep as a table like the paper's, on a screen and as files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asag_deploy.atomic import atomic_write_text, check_writable
from asag_deploy.errors import plural
from asag_deploy.replacing import check_own_folder, is_json_with
from asag_evaluation.evaluate import Evaluation
from asag_evaluation.metrics.coco import CocoMetrics
from asag_training.evaluation.sweep import Way

_JSON, _CSV, _MARKDOWN = "sweep.json", "sweep.csv", "sweep.md"
_IN_PERCENT = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_OF_PERSONS = ("CrowdHuman AP", "mMR", "R")
_COUNTED = ("#An", "N_P4", "N_P3")


@dataclass(frozen=True, kw_only=True)
class SweepRow:
    """One combination of settings, and what was measured under it."""

    settings: Mapping[str, Any]
    figures: Mapping[str, float | None]
    """By the paper's titles, shares in percent; None for what there was nothing to measure of."""


def figures_of(evaluation: Evaluation) -> dict[str, float | None]:
    """Return the columns of the paper's tables 2 to 6 by their titles: shares in percent, and counts."""
    anchors, people = evaluation.anchors, evaluation.crowdhuman
    found = precision_figures(evaluation.coco)
    if people is not None:
        of_persons = map(percent, (people.ap, people.mmr, people.recall))
        found.update(zip(_OF_PERSONS, of_persons, strict=True))
    counts = (anchors.anchors, anchors.patches_p4, anchors.patches_p3)
    return found | dict(zip(_COUNTED, (round(count, 2) for count in counts), strict=True))


def precision_figures(coco: CocoMetrics) -> dict[str, float | None]:
    """Return average precision by the paper's titles, in percent."""
    shares = (coco.ap, coco.ap50, coco.ap75, coco.ap_small, coco.ap_medium, coco.ap_large)
    return dict(zip(_IN_PERCENT, map(percent, shares), strict=True))


def percent(share: float | None) -> float | None:
    """Turn a share into a figure of two digits; None stays None."""
    return None if share is None else round(100 * share, 2)


def sweep_row(way: Way, evaluation: Evaluation) -> SweepRow:
    """Make a row of what was measured."""
    return SweepRow(settings=dict(way.changes), figures=figures_of(evaluation))


def on_screen(rows: Sequence[SweepRow]) -> list[str]:
    """Return the lines of the table, numbers at the right."""
    cells = _cells(rows)
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]


def check_sweep(output_dir: Path | None) -> None:
    """Raise OutputError now if `write_sweep` could not write, or would replace what it has not written."""
    if output_dir is not None:
        files = (_JSON, _CSV, _MARKDOWN)
        check_own_folder(output_dir, files, is_json_with("sweep_of", "rows"), "a sweep")
        check_writable(output_dir)


def write_sweep(rows: Sequence[SweepRow], output_dir: Path, *, name: str, images: int) -> list[Path]:
    """Write `sweep.json`, `sweep.csv` and `sweep.md`, each whole or not at all, and return their paths.

    name: what was measured, on what; images: how many.  Raises OutputError if a file cannot be written.
    """
    cells = _cells(rows)
    content = {"sweep_of": name, "images": images, "rows": [vars(row) for row in rows]}
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows(cells)
    head, *body = cells
    lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body)]
    files = {
        _JSON: json.dumps(content, allow_nan=False, indent=1) + "\n",
        _CSV: table.getvalue(),
        _MARKDOWN: "\n".join([f"{name}, {plural(images, 'image')}", "", *lines]) + "\n",
    }
    for file, text in files.items():
        atomic_write_text(output_dir / file, text)
    return [output_dir / file for file in files]


def _cells(rows: Sequence[SweepRow]) -> list[list[str]]:
    """Return titles and rows as text."""
    settings, figures = list(rows[0].settings), list(rows[0].figures)
    return [
        [*settings, *figures],
        *(
            [
                *(json.dumps(row.settings[name]) for name in settings),
                *("-" if row.figures[name] is None else f"{row.figures[name]:.1f}" for name in figures),
            ]
            for row in rows
        ),
    ]
