"""The built site: whole, of this machine alone, and to be searched; and the notebooks, executed."""

from __future__ import annotations

import functools
import http.server
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from asag_deploy.errors import ConfigError
from support.playground_browser import CHROMIUM, MILLISECONDS, browser
from support.site_pages import SitePage, broken, from_other_hosts

pytest.importorskip("zensical", reason="needs what builds the site: pip install 'asag-deploy[docs]'")
pytest.importorskip("nbconvert", reason="needs what builds the site: pip install 'asag-deploy[docs]'")

import nbformat

import site_build

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.slow

NOTEBOOKS = sorted((site_build.ROOT / "docs" / "notebooks").glob("*.ipynb"))
_NAMES_IN_SCRIPTS = {"www.w3.org", "unpkg.com", "cdn.jsdelivr.net", "api.github.com"}
"""Hosts that the theme's script knows; it asks the last three for what no page has (`SitePage.fetching`)."""


@pytest.fixture(scope="module")
def site(shared_folder: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """The site with notebooks as they are stored."""

    def make(folder: Path) -> None:
        script = [sys.executable, site_build.__file__, "--no-notebooks", "--output-dir", str(folder)]
        done = subprocess.run(script, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.strip() == str(folder / "site" / "index.html")

    return shared_folder("documentation", make) / "site"


def test_every_link_picture_and_anchor_is_there(site: Path) -> None:
    pages = [SitePage.of(page) for page in site.rglob("*.html")]
    assert len(pages) > 30
    assert sum(len(page.links) for page in pages) > 1000
    assert broken(site) == []


def test_every_page_has_its_place(site: Path) -> None:
    text = (site / "index.html").read_text(encoding="utf-8")
    (sidebar,) = re.findall(r'<nav class="md-nav md-nav--primary.*?</nav>\s*</div>', text, re.DOTALL)
    led = set(re.findall(r'href="(?:\./)?([^"#]*\.html)"', sidebar))
    pages = {page.relative_to(site).as_posix() for page in site.rglob("*.html")}
    assert led | {"404.html"} == pages


def test_search_leads_to_pages(site: Path) -> None:
    found = json.loads((site / "search.json").read_text(encoding="utf-8"))["items"]
    assert len(found) > 100
    locations = {item["location"] for item in found}
    pages = {path: SitePage.of(site / path) for path in {place.partition("#")[0] for place in locations}}
    led = [(place.partition("#")[0], place.partition("#")[2]) for place in locations]
    assert [place for place in led if place[1] and place[1] not in pages[place[0]].anchors] == []


def test_nothing_is_loaded_from_another_host(site: Path) -> None:
    assert from_other_hosts(site) == []
    scripts = [path for path in site.rglob("*.js") if path.name != "search.js"]
    texts = [path.read_text(encoding="utf-8") for path in scripts]
    named = {host for text in texts for host in re.findall(r"https?://([\w.-]+)", text)}
    assert named - {"localhost"} == _NAMES_IN_SCRIPTS


def test_the_reference_says_what_the_docstrings_say(site: Path) -> None:
    text = (site / "reference" / "detector.html").read_text(encoding="utf-8")
    assert {"asag_deploy.Detector.load", "asag_deploy.CallOptions.threshold"} <= SitePage.of(
        site / "reference" / "detector.html"
    ).anchors
    assert "<li><code>deadline_ms</code>: no further level is begun" in text
    assert "<p>Raises BundleError if the bundle cannot be used" in text
    assert "<li><code>bundle</code>: its folder" in text
    assert "__reduce__" not in text
    assert (
        not {"asag_deploy.Detector.requests", "asag_deploy.Detector.__init__"}
        & SitePage.of(site / "reference" / "detector.html").anchors
    )
    assert "for</span> <span" not in text  # how `BACKENDS` is made


def test_what_is_broken_or_foreign_is_found(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "a.html").write_text(
        '<h1 id="x"></h1><a href="b/c.html#y"></a><a href="#x"></a><a href="#z"></a><img src="no.png">'
        '<a href="https://h/"></a><script src="//h/s.js"></script><img srcset="https://h/a.png 2x">'
        '<p style="background: url(https://h/p.png)"><pre class="mermaid"></pre>'
    )
    (tmp_path / "b" / "c.html").write_text(
        '<a href="../a.html#x"></a><a href="../a.html#w"></a><style>@import "https://h/i.css";</style>'
    )
    (tmp_path / "s.css").write_text("a { b: url(data:x); c: url('https://h/f.woff') } d { e: url(f.png) }")
    assert broken(tmp_path) == [
        ("a.html", "b/c.html#y"),
        ("a.html", "#z"),
        ("a.html", "no.png"),
        ("b/c.html", "../a.html#w"),
    ]
    assert from_other_hosts(tmp_path) == [
        ("a.html", "//h/s.js"),
        ("a.html", "https://h/a.png"),
        ("a.html", "https://h/p.png"),
        ("a.html", "mermaid"),
        ("b/c.html", "https://h/i.css"),
        ("s.css", "https://h/f.woff"),
    ]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_becomes_a_page(notebook: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in notebook.parent.iterdir()}
    content = nbformat.read(notebook, as_version=4)
    site_build.execute(content, notebook)
    text = site_build.notebook_page(content, tmp_path / "output")
    shown = re.findall(r"!\[[^\]]*\]\(output/([^)]+)\)", text)
    assert {path.name for path in (tmp_path / "output").iterdir()} == set(shown)
    assert shown
    assert notebook.stem != "read-the-trace" or f"{tempfile.gettempdir()}/" not in text
    assert before == {path: path.stat().st_mtime_ns for path in notebook.parent.iterdir()}


def test_a_notebook_that_fails_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    content = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")])
    with pytest.raises(ConfigError, match=r"the notebook n\.ipynb fails"):
        site_build.execute(content, tmp_path / "n.ipynb")
    assert "ZeroDivisionError" in capfd.readouterr().err


_ENDED = """
import os, pathlib, sys, time
import nbformat, site_build
from asag_deploy.command_line import exit_code
cell = nbformat.v4.new_code_cell("import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(100)")
book = nbformat.v4.new_notebook(cells=[cell])
sys.exit(exit_code("docs", lambda: site_build.execute(book, pathlib.Path("n.ipynb").absolute()) or 0))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_build_is_ended_while_a_notebook_runs(tmp_path: Path, number: int, code: int) -> None:
    program = [sys.executable, "-c", _ENDED]
    places = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen(program, cwd=tmp_path, env=places, stderr=subprocess.PIPE, text=True) as process:
        pid = tmp_path / "pid"
        until = time.monotonic() + 60
        while not (pid.exists() and pid.read_text()) and process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        process.send_signal(number)
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert process.returncode == code
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


@contextmanager
def _served(folder: Path) -> Iterator[str]:
    """Serve a folder on this machine until the block ends; gives its address."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=folder)
    ) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


NEEDS_CHROMIUM = pytest.mark.skipif(
    not Path(CHROMIUM).exists(), reason="needs Chromium: apt-get install chromium"
)


@NEEDS_CHROMIUM
def test_names_in_tables_are_whole_and_pages_no_wider_than_the_window(site: Path) -> None:
    pytest.importorskip("playwright", reason="needs Playwright, which drives the browser")
    with browser() as running:
        for width in (1400, 390):
            page = running.new_page(viewport={"width": width, "height": 1000})
            for name in ("decide", "errors", "run", "export"):
                page.goto((site / f"{name}.html").as_uri())
                codes = "[...document.querySelectorAll('td code, th code')]"
                assert page.evaluate(f"{codes}.length") > 5
                broken_up = f"{codes}.filter(c => c.getClientRects().length > 1).map(c => c.innerText)"
                assert page.evaluate(broken_up) == [], (name, width)
                assert page.evaluate("document.documentElement.scrollWidth") <= width, (name, width)


@NEEDS_CHROMIUM
def test_search_finds_a_page_and_asks_no_other_host(site: Path) -> None:
    pytest.importorskip("playwright", reason="needs Playwright, which drives the browser")
    with browser() as running, _served(site) as address:
        for start in (address, site.as_uri()):
            _search(running.new_page(), start)


def _search(page: Page, start: str) -> None:
    asked: list[str] = []
    wrong: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(f"{start}/serve.html", wait_until="networkidle")
    page.keyboard.press("Control+k")
    typed = page.locator("input[role=combobox]")
    for word in ("Grafana", "ResNet", "anchor_cap"):
        typed.fill("", timeout=MILLISECONDS)
        typed.press_sequentially(word, delay=20, timeout=MILLISECONDS)
        said = page.locator("[role=option]").filter(has_text=re.compile(word, re.IGNORECASE))
        said.first.wait_for(timeout=MILLISECONDS)
        assert typed.input_value() == word
    found = page.locator("[role=option]").filter(has_text="that reach the decoder, best-scored first")
    found.first.click(timeout=MILLISECONDS)
    page.wait_for_url("**/reference/detector.html*", timeout=MILLISECONDS)
    assert page.locator("h1").inner_text().startswith("Detector")
    page.close()
    assert wrong == []
    assert {urlsplit(url).netloc for url in asked} <= {urlsplit(start).netloc, ""}
