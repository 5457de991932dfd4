"""Values as annotation tools write them, read as they are meant where that is unmistakable.

Numbers stand in quotes or end in `.0`, flags are 0, "0", false or absent, boxes are missing where there is an
outline.  Whatever is none of these is refused by who reads it, with the record named.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, TypeGuard

_NUMBERS = {int, float}
_FLAGS = {
    **dict.fromkeys(("", "0", "0.0", "false", "no", "none", "null"), False),
    **dict.fromkeys(("1", "1.0", "true", "yes"), True),
}
_WHOLE = re.compile(r"[+-]?\d{1,18}(\.0*)?")


LARGEST = 1e12
"""Beyond this no measure is meant, and products of two are still numbers in float32."""
_LARGEST_WHOLE = 2**63
"""Where what counts in 64 bits ends."""


def is_plain_number(value: Any) -> TypeGuard[float]:
    """Tell whether a JSON value is a finite number, or a whole one that 64 bits hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return -_LARGEST_WHOLE < value < _LARGEST_WHOLE


def whole_number(value: Any) -> int | None:
    """Return 12 for 12, 12.0, "12" and "12.0"; None for what is no whole number."""
    if type(value) is int:  # nearly all of them, in files with millions
        return value if -_LARGEST_WHOLE < value < _LARGEST_WHOLE else None
    if isinstance(value, str):
        text = value.strip()
        return int(text.partition(".")[0]) if _WHOLE.fullmatch(text) else None
    return int(value) if is_plain_number(value) and value == int(value) else None


def number(value: Any) -> float | None:
    """Return a measure, written as a number or as text; None for what is none, or beyond all measure."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    return float(value) if is_plain_number(value) and abs(value) <= LARGEST else None


def flag(value: Any) -> bool | None:
    """Return whether a flag is set; one that is absent, null or empty is not.  None for what is no flag."""
    if value is None or value is False or (type(value) is int and value == 0):
        return False
    if value is True:
        return True
    if isinstance(value, str):
        return _FLAGS.get(value.strip().lower())
    return bool(value) if is_plain_number(value) and value in (0, 1) else None


def box_of(value: Any) -> tuple[float, float, float, float] | None:
    """Return x, y, width, height, of a list or its text; None for what is no list of four finite numbers."""
    if isinstance(value, str):
        value = value.strip("[]() \t\n").split(",")
    if not isinstance(value, list) or len(value) != 4:
        return None
    # A sum that is not itself holds a NaN, which no comparison finds.
    if {*map(type, value)} <= _NUMBERS and max(map(abs, value)) <= LARGEST and sum(value) == sum(value):
        return float(value[0]), float(value[1]), float(value[2]), float(value[3])
    x, y, w, h = (number(part) for part in value)
    return None if x is None or y is None or w is None or h is None else (x, y, w, h)


def box_around(outline: Any, height: int, width: int) -> tuple[float, float, float, float] | None:
    """Return x, y, width, height of a `segmentation`: polygons or run lengths; None if it is neither."""
    if isinstance(outline, dict):
        return _box_around_mask(outline, height, width)
    if not isinstance(outline, list) or not outline:
        return None
    polygons = outline if isinstance(outline[0], list) else [outline]
    points = [number(value) for polygon in polygons if isinstance(polygon, list) for value in polygon]
    known = [value for value in points if value is not None]
    if len(known) != len(points) or len(points) < 6 or any(len(polygon) % 2 for polygon in polygons):
        return None
    xs, ys = known[::2], known[1::2]
    return min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)


def _box_around_mask(
    mask: dict[str, Any], height: int, width: int
) -> tuple[float, float, float, float] | None:
    """Return the box around COCO's run lengths, which go down the columns and begin with zeros."""
    runs = mask.get("counts")
    if isinstance(runs, str):
        return _box_around_packed(mask, runs)
    if not isinstance(runs, list) or not all(isinstance(run, int) and run >= 0 for run in runs):
        return None
    rows = whole_number(_first(mask.get("size"))) or height
    if rows < 1 or sum(runs) > rows * max(width, 1):
        return None
    return _box_around_runs(runs, rows)


def _box_around_packed(mask: dict[str, Any], runs: str) -> tuple[float, float, float, float] | None:
    """Return the box around run lengths that are packed into text, where faster-coco-eval is installed."""
    try:
        from faster_coco_eval import mask as masks
    except ImportError:
        return None
    size = mask.get("size")
    if (
        not isinstance(size, list)
        or len(size) != 2
        or not all(isinstance(side, int) and side > 0 for side in size)
    ):
        return None
    x, y, w, h = (float(value) for value in masks.toBbox({"size": size, "counts": runs}))
    return x, y, w, h


def _box_around_runs(runs: Sequence[int], rows: int) -> tuple[float, float, float, float]:
    left, top, right, bottom = math.inf, math.inf, -math.inf, -math.inf
    position = 0
    for i, run in enumerate(runs):
        if i % 2 and run:
            last = position + run - 1
            first_column, last_column = position // rows, last // rows
            left, right = min(left, first_column), max(right, last_column + 1)
            whole = first_column != last_column
            top = min(top, 0 if whole else position % rows)
            bottom = max(bottom, rows if whole else last % rows + 1)
        position += run
    return (left, top, right - left, bottom - top) if right > left else (0.0, 0.0, 0.0, 0.0)


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list) and value else None
