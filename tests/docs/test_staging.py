"""How pages are staged, and docstrings read: links, notebooks, and what is refused."""

from __future__ import annotations

import base64
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from asag_deploy.errors import ConfigError

pytest.importorskip("nbconvert", reason="needs what builds the site: pip install 'asag-deploy[docs]'")
pytest.importorskip("griffe", reason="needs what builds the site: pip install 'asag-deploy[docs]'")

import nbformat

import site_build
from site_docstrings import as_markdown

PIXEL = base64.b64encode(b"picture").decode()


@pytest.fixture
def tree(tmp_path: Path) -> site_build.Tree:
    """A small repository of four pages."""
    files = (
        *("docs/index.md", "docs/a.md", "docs/a.png", "docs/b/c.ipynb", "docs/d/e.yaml", "docs/theme/x.css"),
        *("kit/README.md", "kit/result.json", "kit/code.py", "README.md"),
    )
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("# Page\n")
    return _tree(tmp_path)


def _tree(root: Path, *names: object) -> site_build.Tree:
    nav = [{"A": "index.md"}, {"B": [{"C": "a.md"}, "b/c.md"]}, "kit/README.md", *names]
    return site_build.Tree.of(root, {"project": {"nav": nav}})


def test_every_page_has_its_file(tree: site_build.Tree) -> None:
    assert tree.staged == {
        "docs/index.md": "index.md",
        "docs/a.md": "a.md",
        "docs/b/c.ipynb": "b/c.md",
        "kit/README.md": "kit/README.md",
    }


def test_nav_and_pages_agree(tree: site_build.Tree) -> None:
    with pytest.raises(ConfigError, match=r"neither docs/z\.md nor docs/z\.ipynb nor z\.md"):
        _tree(tree.root, "z.md")
    with pytest.raises(ConfigError, match=r"has a\.md more than once"):
        _tree(tree.root, "a.md")
    (tree.root / "docs/b/f.md").write_text("# F\n")
    with pytest.raises(ConfigError, match=r"no reader would find docs/b/f\.md"):
        _tree(tree.root)


@pytest.mark.parametrize(
    ("file", "before", "after"),
    [
        ("docs/a.md", "[x](../kit/README.md#y)", "[x](kit/README.md#y)"),
        ("docs/a.md", "[x](../kit)", "[x](kit/README.md)"),
        ("docs/a.md", "[x](b/c.ipynb)", "[x](b/c.md)"),
        ("docs/a.md", "[x](../README.md)", "[x](index.md)"),
        ("docs/a.md", "[x](#y) [z](https://x.y/z)", "[x](#y) [z](https://x.y/z)"),
        ("docs/a.md", '![x](a.png "y")', '![x](a.png "y")'),
        ("docs/a.md", "[the `x`](../kit/code.py)", "the `x` (`kit/code.py`)"),
        ("docs/a.md", "[`kit/code.py`](../kit/code.py)", "`kit/code.py`"),
        ("docs/a.md", "[x](d/)", "x (`docs/d`)"),
        ("docs/a.md", "[[x]](index.md)", "[[x]](index.md)"),
        ("docs/a.md", "[![x](a.png)](../kit/result.json)", "[![x](a.png)](kit/result.json)"),
        ("docs/a.md", "`[x](y)` ``[x](y) ` ``", "`[x](y)` ``[x](y) ` ``"),
        ("docs/a.md", "```\n[x](y)\n```\n[x](../kit)", "```\n[x](y)\n```\n[x](kit/README.md)"),
        ("docs/a.md", "- a\n\n    ```\n    [x](y)\n    ```\n", "- a\n\n    ```\n    [x](y)\n    ```\n"),
        ("docs/a.md", "` [x](../kit)\n\n`", "` [x](kit/README.md)\n\n`"),
        ("docs/a.md", "[E:a] [b] c", "[E:a\\] [b] c"),
        ("docs/b/c.ipynb", "[x](../a.md) [y](../../kit/README.md)", "[x](../a.md) [y](../kit/README.md)"),
        ("kit/README.md", "[x](../docs/a.md) [y](result.json)", "[x](../a.md) [y](result.json)"),
        ("kit/README.md", "[x](../docs/d/e.yaml)", "[x](../d/e.yaml)"),
    ],
)
def test_links_lead_to_what_is_staged(tree: site_build.Tree, file: str, before: str, after: str) -> None:
    assert tree.markdown(before, file) == after


def test_what_is_linked_is_copied_and_nothing_else(tree: site_build.Tree) -> None:
    tree.markdown("[x](../kit/result.json) ![y](a.png) [z](d/e.yaml) [c](../kit/code.py)", "docs/a.md")
    assert tree.copied == {
        "kit/result.json": "kit/result.json",
        "docs/a.png": "a.png",
        "docs/d/e.yaml": "d/e.yaml",
    }


@pytest.mark.parametrize("target", ["nowhere.md", "../nowhere.py", "../../outside.md"])
def test_a_link_that_leads_nowhere_is_refused(tree: site_build.Tree, target: str) -> None:
    with pytest.raises(ConfigError, match=rf"docs/a\.md has a link to '{target}', and there is no such file"):
        tree.markdown(f"[x]({target})", "docs/a.md")


def test_a_link_to_what_is_no_page_is_refused(tree: site_build.Tree) -> None:
    (tree.root / "kit/other.md").write_text("# Other\n")
    with pytest.raises(ConfigError, match="which is no page: add it to `nav`"):
        tree.markdown("[x](../kit/other.md)", "docs/a.md")


def test_a_notebook_becomes_a_page_with_its_outputs(tmp_path: Path) -> None:
    cell = nbformat.v4.new_code_cell("f()")
    cell.outputs = [
        nbformat.v4.new_output("stream", text="said\n"),
        nbformat.v4.new_output("stream", text="and\n"),
        nbformat.v4.new_output("display_data", {"image/png": PIXEL, "text/plain": "<Image>"}),
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Title"), cell])
    text = site_build.notebook_page(notebook, tmp_path / "n-output")
    (picture,) = (tmp_path / "n-output").iterdir()
    assert picture.read_bytes() == b"picture"
    assert text.startswith("# Title")
    assert "```python\nf()\n```" in text
    assert "    said\n    and\n" in text
    assert f"(n-output/{picture.name})" in text
    assert "<Image>" not in text


def test_a_folder_that_no_build_has_made_stays(tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "mine.html").write_text("mine")
    (tmp_path / "zensical.toml").write_text("# of a site of their own")
    for _ in range(2):
        with pytest.raises(ConfigError, match="is of no earlier build: remove it, or give another"):
            site_build.build(tmp_path, notebooks=False)
    assert (tmp_path / "site" / "mine.html").exists()
    (tmp_path / "site" / "mine.html").unlink()
    (tmp_path / "site").rmdir()
    with pytest.raises(ConfigError, match=r"zensical\.toml' is of no earlier build"):
        site_build.build(tmp_path, notebooks=False)


@pytest.mark.parametrize("place", [".", "docs", "docs/b", "kit/../docs"])
def test_the_site_is_not_built_into_what_it_is_made_of(tree: site_build.Tree, place: str) -> None:
    _configured(tree.root)
    with pytest.raises(ConfigError, match="holds what the site is made of: give another --output-dir"):
        site_build.build(tree.root / place, root=tree.root, notebooks=False)


def _configured(root: Path) -> None:
    pages = '["index.md", "a.md", "b/c.md", "kit/README.md"]'
    (root / "zensical.toml").write_text(f"[project]\nnav = {pages}\n")


def test_a_build_that_failed_can_be_repeated(tree: site_build.Tree) -> None:
    _configured(tree.root)
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"docs/b/c\.ipynb is no notebook: .*JSON"):
            site_build.build(tree.root / "build", root=tree.root, notebooks=False)
        assert (tree.root / "build" / "pages" / "index.md").exists()


@pytest.mark.parametrize(
    ("gave_up", "shown"), [("Aborted because --strict", False), ("KeyError: 'nav'", True)]
)
def test_where_zensical_gave_up_is_shown_unless_the_pages_are_at_fault(
    tree: site_build.Tree,
    gave_up: str,
    shown: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _configured(tree.root)
    (tree.root / "docs/b/c.ipynb").write_text(
        '{"nbformat": 4, "nbformat_minor": 5, "cells": [], "metadata": {}}'
    )
    said = f"a.md: page 'z.md' does not exist\nTraceback (most recent call last):\n  File main\n{gave_up}\n"
    done = subprocess.CompletedProcess([], returncode=1, stdout=said)
    stand_in = SimpleNamespace(run=lambda *_, **__: done, PIPE=subprocess.PIPE, STDOUT=subprocess.STDOUT)
    monkeypatch.setattr(site_build, "subprocess", stand_in)
    monkeypatch.setattr(site_build, "import_module", lambda name: None)
    with pytest.raises(ConfigError, match="the site cannot be built; what Zensical says stands above"):
        site_build.build(tree.root / "build", root=tree.root, notebooks=False)
    err = capsys.readouterr().err
    assert "page 'z.md' does not exist" in err
    assert ("Traceback" in err, gave_up in err) == (shown, shown)


@pytest.mark.parametrize("text", ["nope", "[]", "{}", '{"nbformat": 4, "cells": 3, "metadata": {}}'])
def test_what_is_no_notebook_is_refused(tree: site_build.Tree, tmp_path: Path, text: str) -> None:
    (tree.root / "docs/b/c.ipynb").write_text(text)
    with pytest.raises(ConfigError, match=r"docs/b/c\.ipynb is no notebook: "):
        site_build.stage(tree, tmp_path / "pages", notebooks=False)


@pytest.mark.parametrize("name", ["docs/a.md", "docs/b/c.ipynb"])
def test_a_page_that_is_not_utf8_is_refused(tree: site_build.Tree, tmp_path: Path, name: str) -> None:
    (tree.root / "docs/b/c.ipynb").write_text(
        '{"nbformat": 4, "nbformat_minor": 5, "cells": [], "metadata": {}}'
    )
    (tree.root / name).write_bytes(b"# Caf\xe9\n")
    with pytest.raises(ConfigError, match=rf"{name} is no UTF-8 text: .* at byte 5"):
        site_build.stage(tree, tmp_path / "pages", notebooks=False)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"[project\n", r"zensical\.toml is no TOML: .*line 1"),
        (b"# \xe9", r"zensical\.toml is no UTF-8 text"),
        (b"project = 1", r"zensical\.toml has no list `nav`"),
        (b"[project]\nnav = 1", r"zensical\.toml has no list `nav`"),
    ],
)
def test_what_is_no_configuration_is_refused(tmp_path: Path, text: bytes, said: str) -> None:
    (tmp_path / "zensical.toml").write_bytes(text)
    with pytest.raises(ConfigError, match=said):
        site_build.build(tmp_path / "build", root=tmp_path, notebooks=False)


def test_docstrings_become_lists_of_what_they_say() -> None:
    text = (
        "Do it.\n\nfirst: what\nit is; or not.  second: of `first: x`; third: more.\n\n"
        "Raises Oops: never.\n\n- `first`: stays\n\nLike so:\n    code(first: 1)"
    )
    assert as_markdown(text, ["first", "second", "third"]) == (
        "Do it.\n\n- `first`: what it is; or not.\n- `second`: of `first: x`\n- `third`: more.\n\n"
        "Raises Oops: never.\n\n- `first`: stays\n\nLike so:\n\n    code(first: 1)"
    )


def test_what_is_raised_or_returned_is_said_of_no_parameter() -> None:
    text = "first: what; second: more,\nif any.  Raises Oops if\nfirst is none.  Returns it."
    assert as_markdown(text, ["first", "second"]) == (
        "- `first`: what\n- `second`: more, if any.\n\nRaises Oops if first is none. Returns it."
    )
