"""How docstrings become the API reference: an extension of Griffe, which reads them for mkdocstrings.

A docstring is plain sentences.  What it says of a parameter (`levels: the manual stop; mode: ...`) becomes an
item of a list, and what is indented below a colon stays as it is written, as code.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import griffe

_SAID_OF_ONE = r"(?:^|(?<=[;.])\s+)({}):\s+"
"""How a sentence about a parameter begins: with its name, first of all or after another sentence."""
_SAID_OF_ALL = re.compile(r"(?<=[;.])\s+(?=(?:Raises|Returns)\s)")
"""Where a sentence begins that is of the whole again."""
_INDENTED = re.compile(r"(:\n)(?= {2,}\S)")


def as_markdown(text: str, names: Collection[str]) -> str:
    """Return a docstring as Markdown; names: the parameters that it may speak of."""
    paragraphs = _INDENTED.sub(r"\1\n", text).split("\n\n")
    return "\n\n".join(_with_items(paragraph, names) for paragraph in paragraphs)


def _with_items(paragraph: str, names: Collection[str]) -> str:
    """Return a paragraph with what it says of each parameter as an item of a list."""
    if not names or paragraph.startswith((" ", "- ", "* ", "|")):
        return paragraph
    choice = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    before, *said = re.split(_SAID_OF_ONE.format(choice), paragraph)
    items, after = [], []
    for name, sentences in zip(said[::2], said[1::2], strict=True):
        what, *of_all = _SAID_OF_ALL.split(sentences)
        items.append(f"- `{name}`: {' '.join(what.split()).rstrip(';')}")
        after += [" ".join(sentence.split()) for sentence in of_all]
    return "\n\n".join(part for part in (before, "\n".join(items), " ".join(after)) if part)


class PlainSentences(griffe.Extension):
    """Makes Markdown of every docstring once its module has been read."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """Make lists of what a function or method says of its parameters."""
        self._change(func, [parameter.name.lstrip("*") for parameter in func.parameters])

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        """Make lists of what a class says of its fields."""
        self._change(cls, [name for name, member in cls.members.items() if member.is_attribute])

    def on_attribute(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Keep an attribute's sentences; where it is kept, which its labels say, helps no reader."""
        attr.labels -= {"class-attribute", "instance-attribute"}
        self._change(attr, ())

    @staticmethod
    def _change(thing: griffe.Object, names: Collection[str]) -> None:
        if thing.docstring is not None:
            thing.docstring.value = as_markdown(thing.docstring.value, names)
