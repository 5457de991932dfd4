"""The same networks trained again with other seeds: the tables' means, and how far the seeds lie apart."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from asag_bench.paper.store import RESULT
from asag_bench.paper.tables import (
    COST,
    OTHERS_STAR,
    SPEED,
    lines_in_markdown,
    lines_on_screen,
    numbered_notes,
    of_paper,
    title,
)
from asag_bench.result import Machine, parse_machine, to_json
from asag_deploy.errors import ConfigError, FieldError

SEEDS, PAGE_OF_SEEDS, PICTURE = "seeds.json", "seeds.md", "seeds.png"
_GAIN_OF = "AP"
_TRAINED = ("5a", "5c", "7", "8", "A-1")
"""The tables whose rows are of networks that differ in one thing: what it is worth is their difference."""
_HEADER_OF_RUN = 2
"""Lines of a run's header that tell data and networks; the rest is of the machine."""

Rows = list[tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class Run:
    """What `asag-paper tables` has measured of the networks of one seed."""

    name: str
    header: tuple[str, ...]
    tables: Mapping[str, Mapping[str, Any]]
    """By number, as they were written."""
    machine: Machine


def read_run(folder: Path) -> Run:
    """Read a folder of `asag-paper tables`.  Raises ConfigError for another one."""
    path = folder / RESULT
    try:
        content = json.loads(path.read_bytes())
        tables = {str(table["number"]): table for table in content["tables"]}
        header = tuple(str(line) for line in content["header"])
        return Run(name=folder.name, header=header, tables=tables, machine=parse_machine(content["machine"]))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, FieldError):
        raise ConfigError(
            f"'{path}' holds no tables: measure each seed with `asag-paper tables --output-dir "
            f"{shlex.quote(str(folder))}`"
        ) from None


def over_seeds(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Put the tables that all runs have together, as plain JSON.

    A cell has the mean, the lowest and the highest.  In the tables of trained networks a row also has its AP
    less that of the first row, taken within each run.  A row for which some of the runs have no network is of
    the others.  Raises ConfigError for other data or tables, and for a run that is given twice.
    """
    first = runs[0]
    for i, run in enumerate(runs):
        if run.header[:1] != first.header[:1]:
            raise ConfigError(
                f"'{run.name}' was measured on other data than '{first.name}': give runs on the same data"
            )
        for earlier in runs[:i]:
            if run.tables == earlier.tables:
                raise ConfigError(f"'{run.name}' has the figures of '{earlier.name}': give each seed once")
    shared = [number for number in first.tables if all(number in run.tables for run in runs)]
    if not shared:
        raise ConfigError("the runs have no table in common: measure the same tables of each seed")
    return [_together(number, [run.tables[number] for run in runs]) for number in shared]


def _together(number: str, tables: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first = tables[0]
    labels = [[row["labels"] for row in table["rows"]] for table in tables]
    if any(of_run != labels[0] for of_run in labels):
        raise ConfigError(f"the runs have other rows in table {number}: measure all with the same version")
    return {
        **{name: first[name] for name in ("number", "about", "heads", "columns")},
        "rows": [_row(number, [table["rows"] for table in tables], i) for i in range(len(labels[0]))],
    }


def _row(number: str, tables: Sequence[Sequence[Mapping[str, Any]]], i: int) -> dict[str, Any]:
    # What was measured of a network of its own has a shorter note than what stands in for it.
    state = min((str(rows[i]["state"]) for rows in tables), key=len)
    of = [rows for rows in tables if rows[i]["state"] == state]
    row: dict[str, Any] = {"labels": of[0][i]["labels"], "paper": of[0][i]["paper"], "state": state}
    row["of_paper"] = of[0][i]["of_paper"]
    row["here"] = {
        column: _spread([rows[i]["here"].get(column) for rows in of]) for column in of[0][i]["here"]
    }
    row["runs"] = sum(_is_measured(rows[i]["here"]) for rows in of)
    if number in _TRAINED and i > 0:
        gains = [_less(rows[i]["here"], rows[0]["here"]) for rows in of]
        row["gain"] = _spread(gains)
        theirs = of[0][i].get("paper_gain")
        if theirs is None:
            theirs = _less(of[0][i]["paper"], of[0][0]["paper"])
        row["paper_gain"] = None if theirs is None else round(theirs, 2)
    return row


def _is_measured(here: Mapping[str, Any]) -> bool:
    """Tell whether a row has more than what it costs, which is counted without any training."""
    return any(value is not None for column, value in here.items() if column not in (COST, SPEED))


def _less(here: Mapping[str, Any], first: Mapping[str, Any]) -> float | None:
    values = here.get(_GAIN_OF), first.get(_GAIN_OF)
    return None if None in values else float(values[0]) - float(values[1])  # type: ignore[arg-type]


def _spread(values: Sequence[float | None]) -> dict[str, float] | None:
    there = [float(value) for value in values if value is not None]
    if not there:
        return None
    found = {"mean": fmean(there), "low": min(there), "high": max(there)}
    return {name: round(value, 3) for name, value in found.items()}


def as_file(runs: Sequence[Run], tables: Sequence[Mapping[str, Any]], command: str) -> dict[str, Any]:
    """Return what is written: the tables, what each run is of, and the machine of the first."""
    of_runs = [{"name": run.name, "of": list(run.header[:_HEADER_OF_RUN])} for run in runs]
    machine = to_json(runs[0].machine)
    return {"command": command, "machine": machine, "runs": of_runs, "seeds": list(tables)}


def page(content: Mapping[str, Any]) -> str:
    """Return what `as_file` made as a page, in Markdown."""
    lines = ["# The paper's tables, here, over seeds", "", *(f"- {line}" for line in _about(content)), ""]
    for table in content["seeds"]:
        lines += lines_in_markdown(title(table["number"], table["about"]), *_rows_of(table))
    return "\n".join(lines)


def screen_lines(content: Mapping[str, Any]) -> list[str]:
    """Return the same for a screen."""
    lines = [*_about(content), ""]
    for table in content["seeds"]:
        lines += lines_on_screen(title(table["number"], table["about"]), *_rows_of(table))
    return lines


def _about(content: Mapping[str, Any]) -> list[str]:
    runs, machine = content["runs"], content["machine"]
    return [
        runs[0]["of"][0],
        *(f"{run['name']}: {line}" for run in runs for line in run["of"][1:]),
        f"Measured on {machine['date']}, {machine['processor']}, {machine['cores']} cores.",
        "Of one seed: how far others would lie from it is not known."
        if len(runs) == 1
        else f"Means of {len(runs)} seeds; ± is half of the way from the lowest to the highest.",
        "In brackets: the paper's numbers, of COCO val2017.",
    ]


def _rows_of(table: Mapping[str, Any]) -> tuple[Rows, list[str]]:
    compares = table["number"] in _TRAINED
    gains = [f"{_GAIN_OF} less the first row's"] if compares else []
    rows: Rows = [(*table["heads"], *table["columns"], *gains, "runs", "note")]
    numbers, notes = numbered_notes(
        [row["state"] for row in table["rows"]], starred=any(row["of_paper"] for row in table["rows"])
    )
    for row, number in zip(table["rows"], numbers, strict=True):
        cells = [
            _cell(
                row,
                row["here"].get(column),
                of_paper(column, row["paper"].get(column)),
                mark=OTHERS_STAR if column in row["of_paper"] else "",
            )
            for column in table["columns"]
        ]
        if compares:
            of_first = row is table["rows"][0]
            gain, theirs = row.get("gain"), row.get("paper_gain")
            paper = "-" if theirs is None else f"{theirs:+.1f}"
            cells.append("" if of_first else _cell(row, gain, paper, "+.1f"))
        rows.append((*row["labels"], *cells, str(row["runs"]), number))
    return rows, notes


def _cell(
    row: Mapping[str, Any],
    here: Mapping[str, float] | None,
    paper: str,
    precision: str = ".1f",
    mark: str = "",
) -> str:
    if here is None:
        return f"- ({paper})"
    half = f" ±{(here['high'] - here['low']) / 2:.1f}" if row["runs"] > 1 else ""
    return f"{here['mean']:{precision}}{half}{mark} ({paper})"
