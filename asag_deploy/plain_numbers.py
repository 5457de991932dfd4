"""Numbers as people write them, read from text.

Python's own `int` and `float` also take `1_0`, the digits of other scripts, spaces around, `nan` and `inf`.
Nobody who gives an option means any of them.
"""

from __future__ import annotations

import math
import re

WHOLE = "[+-]?[0-9]+"
"""What is read as a whole number; a regular expression that JSON schemas understand too."""
REAL = r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?"
"""What is read as a number."""

LARGEST = 2**31 - 1
"""Of all whole numbers that options take."""
_LONGEST = 40
"""Signs of a whole number; no option takes as many, and thousands are more than Python reads."""


def whole(text: str) -> int | None:
    """Return the whole number that a text is; None if it is none, or too long for any option."""
    return int(text) if len(text) <= _LONGEST and re.fullmatch(WHOLE, text) else None


def real(text: str) -> float | None:
    """Return the number that a text is; None if it is none, or not finite."""
    number = float(text) if re.fullmatch(REAL, text) else math.inf
    return number + 0.0 if math.isfinite(number) else None  # -0, which nobody means, becomes 0


def unsigned(text: str) -> int | None:
    """Return the whole number that a text of digits alone is; None for any other, also with a sign."""
    return whole(text) if text[:1].isdecimal() else None
