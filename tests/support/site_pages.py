"""The pages of the built site: what they link to, what they load, and which anchors they have."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

_LOADING = {
    "audio": "src",
    "embed": "src",
    "iframe": "src",
    "image": "href",
    "img": "src",
    "input": "src",
    "link": "href",
    "object": "data",
    "script": "src",
    "source": "src",
    "use": "href",
    "video": "src",
}
"""By element, the attribute whose address a browser fetches by itself."""
_IN_CSS = re.compile(r"""url\(\s*["']?([^"')]+)|@import\s+["']([^"']+)""")
_FETCHED_BY = ("mermaid", "pyodide", "arithmatex", "glightbox", "md-exec", "md-source")
"""Classes of elements for which the theme's script fetches something from another host."""


@dataclass
class SitePage(HTMLParser):
    """One page of the site; `of` reads it."""

    path: Path
    anchors: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    """Where its links lead."""
    loaded: list[str] = field(default_factory=list)
    """What a browser fetches to show it."""
    fetching: list[str] = field(default_factory=list)
    """Classes of elements for which the theme's script asks another host."""

    def __post_init__(self) -> None:
        super().__init__()

    @classmethod
    def of(cls, path: Path) -> SitePage:
        """Read a page."""
        page = cls(path)
        text = path.read_text(encoding="utf-8")
        page.feed(text)
        for style in re.findall(r"<style[^>]*>(.*?)</style>|style=\"([^\"]*)\"", text, re.DOTALL):
            page.loaded += in_css("".join(style))
        return page

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Take what an element links to, loads and is called."""
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag in _LOADING and _LOADING[tag] in given:
            self.loaded.append(given[_LOADING[tag]])
        self.loaded += [part.split()[0] for part in given.get("srcset", "").split(",") if part.strip()]
        self.fetching += [name for name in given.get("class", "").split() if name in _FETCHED_BY]


def in_css(text: str) -> list[str]:
    """Return the addresses that a style sheet loads; pictures within it are none."""
    found = [first or second for first, second in _IN_CSS.findall(text)]
    return [address.strip() for address in found if not address.strip().startswith(("data:", "#"))]


def is_of_another_host(address: str) -> bool:
    """Tell whether an address names a host."""
    return bool(urlsplit(address).netloc)


def broken(site: Path) -> list[tuple[str, str]]:
    """Return each page of a site with what it links to, shows or loads that is not there."""
    pages = {path.resolve(): SitePage.of(path) for path in sorted(site.rglob("*.html"))}
    found = []
    for page in pages.values():
        if page.path.name == "404.html":  # shown at any depth, so its addresses begin at the root
            continue
        for address in (*page.links, *page.loaded):
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            target = (page.path.parent / unquote(parts.path)).resolve() if parts.path else page.path.resolve()
            anchor = unquote(parts.fragment)
            is_there = target.is_file() and (
                not anchor or target not in pages or anchor in pages[target].anchors
            )
            if not is_there:
                found.append((str(page.path.relative_to(site)), address))
    return found


def from_other_hosts(site: Path) -> list[tuple[str, str]]:
    """Return each file of a site with what it loads from another host; ordinary links are none of it."""
    found = []
    for path in sorted(site.rglob("*.html")):
        page = SitePage.of(path)
        found += [(path, address) for address in page.loaded if is_of_another_host(address)]
        found += [(path, name) for name in page.fetching]
    for path in sorted(site.rglob("*.css")):
        text = path.read_text(encoding="utf-8")
        found += [(path, address) for address in in_css(text) if is_of_another_host(address)]
    return [(str(path.relative_to(site)), address) for path, address in found]
