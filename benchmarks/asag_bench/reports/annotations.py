"""What opening a large data set took, as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TITLE = "Opening a large data set"
_ROWS = (
    ("first", "a file that is read for the first time"),
    ("without_msgspec", "the same without msgspec"),
    ("of_another_kind", "the same, with one number written as text: read whole"),
    ("four_at_once_first", "four processes at once, for the first time"),
    ("again", "a file that was read before"),
    ("worker", "a worker that is handed the data set"),
    ("evaluation", "AP of 5000 images with 100 detections each"),
)


def is_opening(data: Mapping[str, Any]) -> bool:
    """Tell whether a recorded result is one of `asag-bench annotations`."""
    return all(name in data for name, _ in _ROWS)


def section(data: Mapping[str, Any]) -> list[str]:
    """Return what a result of `asag-bench annotations` says, in lines of Markdown."""
    processor, cores = data["machine"]["processor"], data["machine"]["cores"]
    what = (
        f"{data['images']:,} images with {data['objects']:,} objects, {data['file_mb']:g} MB with outlines; "
        f"{processor}, {cores} cores, load average before it {data['load_average']:g}. Memory is above that "
        "of the imports; of a worker, what it does not share."
    )
    return [
        f"## {TITLE}",
        "",
        what,
        "",
        "| what | seconds | of the processor | MiB at the most |",
        "| --- | --- | --- | --- |",
        *(f"| {what} | {' | '.join(_figures(data[name]))} |" for name, what in _ROWS),
        "",
    ]


def _figures(found: Mapping[str, Any]) -> list[str]:
    return [
        _text(found["seconds"], "g"),
        _text(found.get("cpu_seconds"), "g"),
        _text(found.get("peak_mib", found.get("own_mib")), ".0f"),
    ]


def _text(value: Any, form: str) -> str:
    """Return a figure, the largest of several; `-` for none."""
    if value is None:
        return "-"
    return format(max(value) if isinstance(value, list) else value, form)
