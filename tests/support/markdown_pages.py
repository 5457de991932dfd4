"""The Markdown pages of the repository: their links and headings, and what two renderers make of them."""

from __future__ import annotations

import itertools
import json
import re
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[2]
_PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])
"""Markdown as GitHub has it."""
_IN_HTML = re.compile(r"""<[a-z][^>]*\s(?:href|src)=["']([^"']+)["']""")
_COUNTED = (
    *("table", "tr", "th", "td", "ul", "ol", "li", "pre", "blockquote", "hr", "br"),
    *("h1", "h2", "h3", "h4", "img", "em", "strong", "del"),
)


def texts(page: Path) -> list[str]:
    """Return the Markdown of a page, or of each cell of a notebook."""
    text = page.read_text(encoding="utf-8")
    if page.suffix != ".ipynb":
        return [text]
    cells = json.loads(text)["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]


def links(page: Path) -> list[str]:
    """Return where links and pictures lead, but for addresses of the web."""
    found = [link for text in texts(page) for link in _links(_PARSER.parse(text))]
    return [link for link in found if not re.match(r"[a-z]+:|//", link)]


def _links(tokens: list[Token]) -> Iterator[str]:
    for token in tokens:
        for name in ("href", "src"):
            if name in token.attrs:
                yield str(token.attrs[name])
        if token.type in ("html_block", "html_inline"):
            yield from _IN_HTML.findall(token.content)
        yield from _links(token.children or [])


def anchors(page: Path) -> set[str]:
    """Return the headings of a page, as a link to them has them on GitHub."""
    seen: Counter[str] = Counter()
    found = set()
    for text in texts(page):
        tokens = _PARSER.parse(text)
        for opening, inline in itertools.pairwise(tokens):
            if opening.type == "heading_open":
                plain = "".join(t.content for t in inline.children or [] if t.type in ("text", "code_inline"))
                name = re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")
                found.add(f"{name}-{seen[name]}" if seen[name] else name)
                seen[name] += 1
    return found


def leads_somewhere(page: Path, link: str) -> bool:
    """Tell whether the file that a page links to is there, and the heading in it."""
    path, _, heading = link.partition("#")
    target = page.parent / unquote(path) if path else page
    if not heading:
        return target.exists()
    return target.is_file() and heading in anchors(target)


def elements_on_github(text: str) -> Counter[str]:
    """Count the elements of the page that GitHub makes of Markdown."""
    return _elements(_PARSER.render(text))


def elements_in_the_site(text: str) -> Counter[str]:
    """Count the elements of the page that the site makes of it: Python-Markdown, as zensical.toml has it."""
    import markdown

    config = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))
    settings: dict[str, dict[str, Any]] = {}
    for name, value in config["project"]["markdown_extensions"].items():
        parts = {f"{name}.{part}": v for part, v in value.items()}
        settings |= parts if name == "pymdownx" else {name: value}
    settings["toc"] = {}
    html = markdown.Markdown(extensions=list(settings), extension_configs=settings).convert(text)
    return _elements(html)


def _elements(html: str) -> Counter[str]:
    found = Counter(re.findall(r"<(\w+)", html))
    return Counter({name: found[name] for name in _COUNTED if found[name]})
