"""The pages' sources: links lead somewhere, they read the same on GitHub and in the site, all is in order."""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections import Counter
from pathlib import Path

import pytest

import asag_deploy

pytest.importorskip("markdown_it", reason="markdown-it-py reads Markdown as GitHub does")

from support.markdown_pages import (
    ROOT,
    anchors,
    elements_in_the_site,
    elements_on_github,
    leads_somewhere,
    links,
    texts,
)

_SKIPPED = {
    *(".git", ".hypothesis", ".ipynb_checkpoints", "__pycache__", "build", "dist", "runs"),
    ".pytest_cache",
    *("demo-output", "bench-output", "gpu-report"),
}


def _pages() -> list[Path]:
    """Every page of Markdown and every notebook of the repository."""
    found = []
    for folder, subfolders, names in os.walk(ROOT):
        subfolders[:] = [
            n for n in subfolders if n not in _SKIPPED and not n.startswith((".venv", ".pytest"))
        ]
        found += [Path(folder, name) for name in names if name.endswith((".md", ".ipynb"))]
    return sorted(found)


PAGES = _pages()
NOTEBOOKS = [page for page in PAGES if page.suffix == ".ipynb"]


def _named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def test_links_between_files_lead_somewhere() -> None:
    found = [(page, link) for page in PAGES for link in links(page)]
    assert len(found) > 50
    assert [(_named(page), link) for page, link in found if not leads_somewhere(page, link)] == []


def test_what_a_link_is_and_where_it_leads(tmp_path: Path) -> None:
    page = tmp_path / "a.md"
    page.write_text(
        "# A `--b` & [c](d.md)\n\n```\n# no heading\n[no](link.md)\n```\n\n`[no](link)` [web](https://x.y/z)\n\n"
        "## Twice\n\n![p](p.png) <img src='q.png'>\n\n## Twice\n\n[x](b%20c.md#e)\n"
    )
    assert links(page) == ["d.md", "p.png", "q.png", "b%20c.md#e"]
    assert anchors(page) == {"a---b--c", "twice", "twice-1"}
    (tmp_path / "b c.md").write_text("# E\n")
    led = {
        link: leads_somewhere(page, link)
        for link in ("b%20c.md#e", "b%20c.md#f", "#twice-1", "#no-heading", ".")
    }
    assert led == {"b%20c.md#e": True, "b%20c.md#f": False, "#twice-1": True, "#no-heading": False, ".": True}


@pytest.mark.parametrize("page", [page for page in PAGES if page != ROOT / "README.md"], ids=_named)
def test_a_page_reads_the_same_on_github_and_in_the_site(page: Path) -> None:
    pytest.importorskip("markdown", reason="needs Python-Markdown: pip install 'asag-deploy[docs]'")
    for text in texts(page):
        assert elements_in_the_site(text) == elements_on_github(text)


def test_what_reads_differently_is_noticed() -> None:
    pytest.importorskip("markdown", reason="needs Python-Markdown: pip install 'asag-deploy[docs]'")
    for text in ("a\n- b\n- c\n", "- a\n  - b\n"):
        assert elements_in_the_site(text) != elements_on_github(text)
    same = "a\n\n- b\n    - c\n\n| d |\n|---|\n| `e` |\n\n```\nf\n```\n"
    assert (
        elements_in_the_site(same)
        == elements_on_github(same)
        == Counter({"ul": 2, "li": 2, "table": 1, "tr": 2, "th": 1, "td": 1, "pre": 1})
    )


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=_named)
def test_a_notebook_is_stored_as_it_was_written(notebook: Path) -> None:
    content = json.loads(notebook.read_text(encoding="utf-8"))
    code = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert code
    assert [cell for cell in code if cell["outputs"] or cell["execution_count"] is not None] == []
    assert content["metadata"]["kernelspec"]["name"] == "python3"
    assert (content["nbformat"], texts(notebook)[0].startswith("# ")) == (4, True)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=_named)
def test_a_notebook_says_first_what_it_needs(notebook: Path) -> None:
    command = re.search(r"`pip install -e '\.\[([\w,-]+)\]' jupyter`", texts(notebook)[0])
    assert command is not None
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(command[1].split(",")) <= extras.keys() - {"dev", "test", "docs"}


def test_diagrams_fit_beside_the_sites_navigation() -> None:
    lines = [
        (page.name, line)
        for page in sorted((ROOT / "docs").glob("*.md"))
        for line in page.read_text(encoding="utf-8").splitlines()
        if re.search(r"^[^|`]*->[^|`]*->", line) or line.strip().startswith("+--")
    ]
    assert ("index.md", "+--Detector--> detections + trace") in [(page, line.strip()) for page, line in lines]
    assert {page for page, _ in lines} >= {"decide.md", "export.md"}
    assert [(page, line) for page, line in lines if len(line) > 80] == []


def test_the_reference_has_every_public_name() -> None:
    pages = "".join(page.read_text() for page in sorted((ROOT / "docs" / "reference").glob("*.md")))
    described = re.findall(r"^::: asag_deploy\.(\w+)$", pages, re.MULTILINE)
    assert sorted(described) == sorted(set(asag_deploy.__all__) - {"__version__"})
    assert "`asag_deploy.__version__`" in pages
    rooms = (ROOT / "training" / "asag_evaluation" / "data").glob("*.py")
    converters = {
        f"asag_evaluation.data.{room.stem}.{name}"
        for room in rooms
        for name in re.findall(r"^def ((?:convert|write)_\w+)\(", room.read_text(), re.MULTILINE)
    }
    assert "asag_evaluation.data.voc.convert_voc" in converters
    assert converters <= set(re.findall(r"^::: (\S+)$", pages, re.MULTILINE))
