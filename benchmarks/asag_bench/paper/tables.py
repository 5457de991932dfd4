"""The tables: each cell what was measured here, beside the paper's number, and what a row lacks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from asag_bench.paper.measuring import Measurer
from asag_bench.paper.numbers import TABLES, Row, Table
from asag_bench.paper.roles import REFERENCE, ROLES, how_to_make
from asag_bench.reports.columns import in_markdown, on_screen
from asag_deploy.errors import ConfigError
from asag_training.evaluation.sweep import Way
from asag_training.recipes import AT, RECIPES, fixed_queries

COST, SPEED, _COUNT = "F", "FPS", "#An"
_PRECISIONS = {COST: "g", _COUNT[:2]: "g", "AR": ".2f"}
"""How the paper prints a number, by the first two letters of its column; else with one digit."""
SETTINGS_ONLY = "with these settings, and not trained with them"
"""What the note says of a row that another network than its own stands in for."""
OTHERS_STAR = "*"
_STARRED = "of the paper's own network and image (0.907 Mpx), not of a network that was given"


@dataclass(frozen=True, kw_only=True)
class FilledRow:
    """A row with what was measured."""

    labels: tuple[str, ...]
    here: Mapping[str, float | None]
    paper: Mapping[str, float]
    state: str
    """What is missing and how to get it, or what is to be known of the row; empty: nothing."""
    of_paper: frozenset[str] = frozenset()
    """Columns that are of the paper's own network."""
    paper_gain: float | None = None
    """AP less that of the first row, where the paper says it in words only."""

    def to_dict(self) -> dict[str, Any]:
        """Return the values as plain JSON."""
        return {**vars(self), "of_paper": sorted(self.of_paper)}


@dataclass(frozen=True, kw_only=True)
class FilledTable:
    """A table with what was measured."""

    number: str
    about: str
    heads: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[FilledRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the values as plain JSON."""
        return {**vars(self), "rows": [row.to_dict() for row in self.rows]}


def chosen_tables(only: Sequence[str]) -> list[Table]:
    """Return the tables of these numbers, `5` being all its parts; none: all (ConfigError for others)."""
    numbers: list[str] = []
    for name in only:
        found = [number for number in TABLES if name in (number, number.rstrip("abcde"))]
        if not found:
            raise ConfigError(f"the paper has no table '{name}' of results; those are {', '.join(TABLES)}")
        numbers += found
    return [table for number, table in TABLES.items() if not only or number in numbers]


def fill(tables: Sequence[Table], measurer: Measurer) -> list[FilledTable]:
    """Measure all that the tables need, and fill them in."""
    needed: dict[str, list[Way]] = {}
    for table in tables:
        for row in table.rows:
            for source in _sources(row, measurer).values():
                ways = needed.setdefault(source.role, [])
                if source.way not in ways:
                    ways.append(source.way)
    measurer.measure(needed)
    return [
        FilledTable(
            number=table.number,
            about=table.about,
            heads=table.heads,
            columns=table.columns,
            rows=tuple(_filled(table, row, measurer) for row in table.rows),
        )
        for table in tables
    ]


@dataclass(frozen=True, kw_only=True)
class _Source:
    """Where the figures of a row come from."""

    role: str
    """Of the network that is measured."""
    way: Way
    untrained_for: bool = False
    """Whether it has the settings of an ablation, but not its training."""


def _sources(row: Row, measurer: Measurer) -> dict[str, _Source]:
    """Return by asked role what is measured for it; roles for which there is nothing are left out."""
    found = {}
    for role in dict.fromkeys((row.role, *row.roles.values())):
        if role is None:
            continue
        who = measurer.who(role)
        if who is not None:
            found[role] = _Source(role=who, way=Way(changes=row.changes, max_level=row.max_level))
        elif row.changes and measurer.reference is not None:  # a sweep, which any network can be put through
            found[role] = _Source(role=measurer.reference[0], way=Way(changes=row.changes))
        elif row.instead and measurer.who(REFERENCE) is not None:
            who = measurer.who(REFERENCE) or REFERENCE
            config = measurer.networks[who].config
            keeps: dict[str, Any] = {"replace_anchors": False}
            changes = fixed_queries(config) if row.instead == "fixed-queries" else keeps
            found[role] = _Source(role=who, way=Way(changes=changes), untrained_for=True)
    return found


@dataclass
class _Cells:
    """The cells of a row while it is filled in."""

    here: dict[str, float | None] = field(default_factory=dict)
    states: list[str] = field(default_factory=list)
    of_paper: set[str] = field(default_factory=set)


def _filled(table: Table, row: Row, measurer: Measurer) -> FilledRow:
    sources, cells = _sources(row, measurer), _Cells()
    for column in table.columns:
        role = row.roles.get(column, row.role)
        source = None if role is None else sources.get(role)
        if source is None:
            _fill_without(cells, row, column, measurer)
        else:
            _fill_measured(cells, row, column, source, measurer)
    for role in dict.fromkeys((row.role, *row.roles.values())):
        cells.states += _state_of(role, sources, row, measurer)
    if row.missing:
        cells.states.append(row.missing)
    if table.number == "6" and row.role and sources and len(measurer.dataset.categories) > 1:
        cells.states.append("AP is AP50 of all classes: mMR and R are measured where there is one class")
    if row.gains:
        cells.states.append(f"the paper's text: {row.gains}")
    return FilledRow(
        labels=row.labels,
        here=cells.here,
        paper=row.paper,
        state="; ".join(dict.fromkeys(cells.states)),
        of_paper=frozenset(cells.of_paper),
        paper_gain=row.gain,
    )


def _fill_measured(cells: _Cells, row: Row, column: str, source: _Source, measurer: Measurer) -> None:
    figures = measurer.figures(source.role, source.way) or {}
    if column == SPEED:
        cells.here[column] = measurer.speed(source.role, source.way.max_level)
    elif column == COST:
        cells.here[column] = measurer.gmacs(source.role, figures)
    elif row.role == "asag-s-crowdhuman" and column == "AP":
        cells.here[column] = figures.get("CrowdHuman AP", figures["AP50"])
    else:
        cells.here[column] = figures.get(row.figure or column)


def _fill_without(cells: _Cells, row: Row, column: str, measurer: Measurer) -> None:
    """Fill in what needs no trained network: what it costs, and with random weights how fast it is."""
    cells.here[column] = None
    if row.compared is not None and column in (SPEED, COST):
        try:
            _fill_compared(cells, row.compared, column, measurer)
        except ConfigError as error:
            cells.states.append(str(error))
    elif column == COST and row.role is not None and ROLES[row.role].recipe in RECIPES:
        cells.here[column] = measurer.published_gmacs(ROLES[row.role], row.paper[_COUNT])
        cells.of_paper.add(column)


def _fill_compared(cells: _Cells, compared: tuple[str, int], column: str, measurer: Measurer) -> None:
    if column == SPEED:
        cells.here[column] = measurer.compared_speed(*compared)
        if cells.here[column] is not None and measurer.reference is not None:
            cells.states.append(f"speed only: random weights beside {measurer.reference[0]}")
        return
    cells.here[column], is_the_papers = measurer.compared_gmacs(*compared)
    if is_the_papers:
        cells.of_paper.add(column)


def _state_of(
    role: str | None, sources: Mapping[str, _Source], row: Row, measurer: Measurer
) -> Iterable[str]:
    if role is None:
        return
    source = sources.get(role)
    if source is None or source.untrained_for:
        if source is not None:
            yield f"{source.role} {SETTINGS_ONLY}"
        yield _how(role, measurer)
        return
    if source.role != role:
        yield f"{source.role} stands in for {role}"
    if source.role in measurer.networks and not measurer.networks[source.role].trained:
        yield "random weights: AP means nothing"


def _how(role: str, measurer: Measurer) -> str:
    base = measurer.base
    if role == "5a.no-auxiliary-heads" and RECIPES[base]().network.heads == 1:
        return (
            f"`{base}` has no auxiliary heads, so that this row is the first one: for that train "
            f"`asag-train --recipe {base}{AT}auxiliary-heads` and give it as --network {REFERENCE}=FILE"
        )
    if role == "a-1.denoising" and RECIPES[base]().patches.denoising_queries:
        return (
            f"`{base}` itself trains with denoising, so that the row above is of it, too: for that train "
            f"`asag-train --recipe {base}{AT}no-denoising` and give it as --network {REFERENCE}=FILE; for "
            f"this row give the network of `{base}` as --network {role}=FILE"
        )
    return how_to_make(ROLES[role], base)


def rows_of(table: FilledTable) -> tuple[list[tuple[str, ...]], list[str]]:
    """Return a table's rows as text under its titles, and the notes that the numbers in its last column
    mean."""
    numbers, notes = numbered_notes(
        [row.state for row in table.rows], starred=any(row.of_paper for row in table.rows)
    )
    rows: list[tuple[str, ...]] = [(*table.heads, *table.columns, "note")]
    for row, number in zip(table.rows, numbers, strict=True):
        rows.append((*row.labels, *(_cell(row, column) for column in table.columns), number))
    return rows, notes


def numbered_notes(states: Sequence[str], *, starred: bool) -> tuple[list[str], list[str]]:
    """Return the number of each row's note, empty for none, and all notes; first what a star means."""
    notes = list(dict.fromkeys(state for state in states if state))
    numbers = [str(notes.index(state) + 1) if state else "" for state in states]
    numbered = [f"{number}. {note}" for number, note in enumerate(notes, start=1)]
    return numbers, [*([f"{OTHERS_STAR} {_STARRED}"] if starred else []), *numbered]


def _cell(row: FilledRow, column: str) -> str:
    here, paper = row.here.get(column), row.paper.get(column)
    measured = "-" if here is None else f"{here:.0f}" if abs(here) >= 1000 else f"{here:.1f}"
    mark = OTHERS_STAR if column in row.of_paper else ""
    return f"{measured}{mark} ({of_paper(column, paper)})"


def of_paper(column: str, number: float | None) -> str:
    """Write a number as the paper does; `-` for none."""
    return "-" if number is None else format(number, _PRECISIONS.get(column[:2], ".1f"))


def title(number: str, about: str) -> str:
    """Return what stands over a table."""
    return f"Table {number}: {about}"


def screen_lines(table: FilledTable) -> list[str]:
    """Return a table with its notes for a screen."""
    return lines_on_screen(title(table.number, table.about), *rows_of(table))


def lines_on_screen(heading: str, rows: Sequence[tuple[str, ...]], notes: Sequence[str]) -> list[str]:
    """Return rows under their titles, with a heading and notes, for a screen."""
    return [heading, "", *on_screen(rows), *notes, ""]


def markdown_lines(table: FilledTable) -> list[str]:
    """Return a table with its notes for a page."""
    return lines_in_markdown(title(table.number, table.about), *rows_of(table))


def lines_in_markdown(heading: str, rows: Sequence[tuple[str, ...]], notes: Sequence[str]) -> list[str]:
    """Return rows under their titles, with a heading and notes, for a page."""
    marks = [f"\\{note}" for note in notes if note.startswith(OTHERS_STAR)]
    numbered = [note for note in notes if not note.startswith(OTHERS_STAR)]
    below = [*marks, *([""] if marks and numbered else []), *numbered]
    return [f"## {heading}", "", *in_markdown(rows), "", *below, ""]


def as_json(tables: Sequence[FilledTable]) -> list[dict[str, Any]]:
    """Return the tables as plain JSON values."""
    return [table.to_dict() for table in tables]
