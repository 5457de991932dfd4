"""The page of a distribution on a package index: README.md, without the links that lead nowhere there."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_PICTURE = re.compile(r"^!\[([^\]]*)\]\(([^)\s]+)\)$", re.MULTILINE)
_LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")


class PageHook(MetadataHookInterface):
    """Gives the project's metadata its page."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Add README.md with links that work on their own."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        repository = metadata.get("urls", {}).get("Repository")
        metadata["readme"] = {"content-type": "text/markdown", "text": page(text, repository)}


def page(text: str, repository: str | None = None) -> str:
    """Return Markdown whose links into the repository lead there, or where none is named are plain text.

    repository: its address, whose files lie under blob/main and raw/main, as on GitHub.  Links within the
    page become plain text too, since indexes give headings no names; pictures that cannot be shown are left
    out, and the caption in italics below them.
    """
    if repository is None:
        caption = r"(\n\n\*(?:[^*]|\*[^*\n]+\*)*\*(?=\n\n))?"
        text = re.sub(rf"^!\[[^\]]*\]\((?!https?:)[^)\s]+\){caption}\n*", "", text, flags=re.MULTILINE)
        return _LINK.sub(_absolute(None, ""), text)
    base = repository.rstrip("/")
    text = _PICTURE.sub(_absolute(f"{base}/raw/main", "!"), text)
    return _LINK.sub(_absolute(f"{base}/blob/main", ""), text)


def _absolute(base: str | None, sign: str) -> Callable[[re.Match[str]], str]:
    def replaced(found: re.Match[str]) -> str:
        label, place = found.groups()
        if re.match(r"[a-z]+:", place):
            return found[0]
        if base is None or place.startswith("#"):
            return label
        return f"{sign}[{label}]({base}/{place})"

    return replaced
