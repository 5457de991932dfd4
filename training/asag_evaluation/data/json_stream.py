"""A large JSON object read member by member, and its lists piece by piece: it is never in memory whole.

Each piece is read by Python's own JSON reader, so that what is read is what `json.loads` reads.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

_SPACE = re.compile(r"[ \t\n\r]*")
_OPENING = re.compile(r'\{[ \t\n\r]*("[^"\\]*")?')
"""How an element begins that is an object."""
_MOST_TRIES = 8
"""Places to end a piece at that are looked at, before this gives up."""
_decode = json.JSONDecoder().raw_decode


class JsonMembers:
    """The members of the object in a text that comes block by block.

    Iterating gives name and value; of a list, the name again and again, each time with the next elements as a
    list, at least once.  Raises ValueError or RecursionError for what is no such text, for a member that is
    there twice, and where a list cannot be taken apart.
    """

    def __init__(
        self, blocks: Iterator[str], readers: Mapping[str, Callable[[str], Any]] | None = None
    ) -> None:
        """Take blocks of text.

        `readers` may read pieces of the lists of these names in another way: what they return comes instead
        of elements.  They are given the text of a list, and raise ValueError, TypeError or OverflowError for
        what is none, or not for them.
        """
        self._blocks, self._readers = blocks, readers or {}
        self._text, self._at = "", 0
        """What was read, and where in it what comes next begins."""

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        seen = set[str]()
        self._take("{")
        if self._peek() == "}":
            self._at += 1
        else:
            while True:
                name = self._name()
                if name in seen:
                    raise ValueError(f"'{name}' is there twice")
                seen.add(name)
                self._take(":")
                if self._peek() == "[":
                    self._at += 1
                    for elements in self._pieces(self._readers.get(name)):
                        yield name, elements
                else:
                    yield name, self._value()
                if self._take(",", "}") == "}":
                    break
        if self._peek():
            raise ValueError("something comes after the object")

    def _name(self) -> str:
        if self._peek() != '"':
            raise ValueError("a member has no name")
        return str(self._value())

    def _value(self) -> Any:
        while True:
            try:
                value, end = _decode(self._text, self._at)
            except ValueError:
                if not self._grow():
                    raise
                continue
            if end == len(self._text) and self._grow():
                continue  # a number may go on
            self._at = end
            return value

    def _pieces(self, reader: Callable[[str], Any] | None) -> Iterator[Any]:
        """Yield the elements of the list that was just begun, piece by piece, and pass its end."""
        self._peek()
        opening = _OPENING.match(self._text, self._at)
        begins = None if opening is None else opening[0]
        while True:
            piece = self._piece(begins, reader)
            if piece is not None:
                elements, end, is_last = piece
                self._at = end
                yield elements
                if is_last:
                    return
            elif not self._grow():
                raise ValueError("a list has no end")

    def _piece(self, begins: str | None, reader: Callable[[str], Any] | None) -> tuple[Any, int, bool] | None:
        """Return the next elements, where what follows begins, and whether these were the last; None if what
        was read is too little."""
        text, at = self._text, self._at
        start, tries = len(text), 0
        while begins is not None and (start := text.rfind(begins, at + 1, start)) > 0:
            cut = _end_before(text, at, start)
            if cut is None:
                continue
            # The reader takes it if the bracket that is added here is that of the list, or if the list had
            # one before.  Where this cuts an element, or a text, it does not.
            piece = f"[{text[at:cut]}]"
            if reader is not None:
                with contextlib.suppress(ValueError, TypeError, OverflowError):
                    return reader(piece), start, False
            found = _list_in(piece)
            if found is not None:
                elements, length = found
                is_last = length < len(piece)
                return elements, at + length - 1 if is_last else start, is_last
            tries += 1
            if tries == _MOST_TRIES:
                raise ValueError("elements of a list cannot be told apart")
        found = _list_in(f"[{text[at:]}")
        return None if found is None else (found[0], at + found[1] - 1, True)

    def _take(self, *signs: str) -> str:
        found = self._peek()
        if found not in signs:
            raise ValueError(f"there is '{found}' where {signs} is expected")
        self._at += 1
        return found

    def _peek(self) -> str:
        """Return the next sign that is no space, and go there; empty at the end."""
        while True:
            self._at = self._space_end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._grow():
                return ""

    def _space_end(self) -> int:
        found = _SPACE.match(self._text, self._at)
        return self._at if found is None else found.end()

    def _grow(self) -> bool:
        """Read on, as much as there is left; forget what was read before.  Return whether there was more."""
        parts = [self._text[self._at :]]
        wanted, length = 2 * len(parts[0]), len(parts[0])
        for block in self._blocks:
            parts.append(block)
            length += len(block)
            if length > wanted:
                break
        has_grown = length > len(parts[0])
        self._text, self._at = "".join(parts), 0
        return has_grown


def _end_before(text: str, low: int, start: int) -> int | None:
    """Return the end of the object before the one at `start`, if only a comma is between them."""
    comma = len(text[max(low, start - 64) : start].rstrip(" \t\n\r")) + max(low, start - 64)
    if text[comma - 1 : comma] != ",":
        return None
    before = text[max(low, comma - 65) : comma - 1].rstrip(" \t\n\r")
    end = max(low, comma - 65) + len(before)
    return end if before.endswith("}") else None


def _list_in(text: str) -> tuple[list[Any], int] | None:
    """Return the list that a text begins with, and how long it is; None if it has no end or is none."""
    try:
        elements, end = _decode(text)
    except ValueError:
        return None
    return elements, end
