"""The report: one JSON file, one page and one log, complete at any time."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

from asag_bench.gpu_machine.steps import Result
from asag_deploy.atomic import atomic_write

NAME = "gpu_machine"
MOST_BYTES = 15 * 2**20
"""Of each file."""
_PAGE = "page"
"""What of a step's data is Markdown for the page."""
_CODE_OR_MARK = re.compile(r"(`[^`]+`)|([<\[*])")
"""Code, which stays as it is, or what begins something else in Markdown."""


def write_report(
    folder: Path,
    machine: Mapping[str, Any],
    results: Sequence[Result],
    logs: Sequence[str],
    places: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write `gpu_machine.json`, `gpu_machine.md` and `gpu_machine.log`.

    places: folders of this machine, and what stands in the report in their stead.

    Raises OutputError.
    """
    report = {"machine": machine, "steps": [asdict(result) for result in results]}
    for suffix, text in (
        ("json", json.dumps(report, indent=1, default=str) + "\n"),
        ("md", page(machine, results)),
        ("log", "\n".join(logs)),
    ):
        for place, name in places.items():
            text = text.replace(place, name)
        with atomic_write(folder / f"{NAME}.{suffix}") as file:
            file.write_bytes(_cut(text, suffix))


def page(machine: Mapping[str, Any], results: Sequence[Result]) -> str:
    """Return the report for people: a table of the steps, and the tables of those that measured."""
    lines = ["# What a GPU machine says", "", str(machine.get("gpu", "no GPU")), ""]
    lines += [f"- {name}: {value}" for name, value in _flat(machine) if name != "gpu"]
    lines += ["", "| step | state | seconds | |", "|---|---|---|---|"]
    lines += [f"| {r.name} | {r.state} | {r.seconds} | {_cell(r.detail)} |" for r in results]
    for result in results:
        if _PAGE in result.data:
            lines += ["", f"## {result.name}", "", str(result.data[_PAGE]).strip()]
    return "\n".join(lines) + "\n"


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield name, ", ".join(f"{key} {held}" for key, held in value.items())
        else:
            yield name, str(value)


def _cell(text: str) -> str:
    """Return what a step says as a cell; what other programs have written in it is no HTML and no link."""
    line = " ".join(text.split()).replace("|", "/")
    return _CODE_OR_MARK.sub(lambda found: found[1] or f"\\{found[2]}", line)


def _cut(text: str, suffix: str) -> bytes:
    """Cut what is too long to what says most.

    That is the end of a log, the beginning of a page, and JSON without the steps' data.
    """
    whole = text.encode()
    if len(whole) <= MOST_BYTES:
        return whole
    if suffix == "json":
        report = json.loads(text)
        for step in report["steps"]:
            step["data"] = {"left out": "the report would have been too large"}
        return json.dumps(report, indent=1).encode()
    return whole[-MOST_BYTES:] if suffix == "log" else whole[:MOST_BYTES]
