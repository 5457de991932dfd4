"""How the page is made: its components, who waits for whom, and that it belongs to this machine alone."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from asag_deploy.errors import ConfigError
from asag_deploy.playground.server import silent_gradio
from support import playground_pages
from support.playground_pages import CROWD, GONE, REQUESTS

GRADIO = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None,
    reason="needs Gradio: pip install 'asag-deploy[playground]'",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `playground_pages` prints."""
    root = Path(__file__).parents[3]
    packages = (root, root / "training", root / "tests")
    done = subprocess.run(
        [sys.executable, playground_pages.__file__, str(tmp_path_factory.mktemp("pages"))],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, packages))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@GRADIO
@pytest.mark.slow
def test_no_change_goes_through_gradios_queue(made: dict[str, Any]) -> None:
    """Which loses results: see `asag_deploy.playground.turns`."""
    assert [one[0] for one in made["functions"]] == ["look", "compare", "take"]
    assert {one[1] for one in made["functions"]} == {False}
    assert [one[2] for one in made["functions"]][:2] == ["always_last"] * 2
    assert {one[3] for one in made["functions"]} == {"private"}


@GRADIO
@pytest.mark.slow
def test_all_that_detects_takes_turns(made: dict[str, Any]) -> None:
    """Of visitors who change something at once, so many are served at once, and those who have gone never."""
    assert made["crowd"] == {"most_at_once": REQUESTS, "done": CROWD - GONE}


@GRADIO
@pytest.mark.slow
def test_the_choices_are_the_bundles(made: dict[str, Any]) -> None:
    page = made["components"]
    assert page["threshold"]["value"] == 0.4
    assert page["level"]["value"] == "P5"
    assert [value for value, _ in page["level"]["choices"]] == ["P5", "P4", "P3"]
    assert page["cap"]["interactive"] is False
    assert page["most"]["maximum"] == 10
    assert page["deadline"]["value"] == 0
    assert page["examples"]["visible"] is True
    assert made["free"]["examples"]["visible"] is False
    cap = made["free"]["cap"]
    assert (cap["minimum"], cap["maximum"], cap["interactive"]) == (5, 24, True)


@GRADIO
@pytest.mark.slow
def test_one_anchor_and_one_detection_make_a_page_too(made: dict[str, Any]) -> None:
    for name in ("most", "cap"):
        assert made["one"][name]["minimum"] < made["one"][name]["maximum"]


@GRADIO
@pytest.mark.slow
def test_nothing_comes_from_another_machine(made: dict[str, Any]) -> None:
    answers = made["answers"]
    assert {name: status for name, (status, _) in answers.items()} == {
        "page": 200,
        "theme": 200,
        "example": 200,
        "other": 403,  # a file that lies beside what may be seen
    }
    page, theme = answers["page"][1], answers["theme"][1]
    elements = re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", page)
    assert elements
    assert [element for element in elements if re.search(r"(?:src|href)=[\"']?(?:https?:)?//", element)] == []
    assert "url(http" not in theme
    assert "@import" not in theme
    assert made["footer"] == []


def test_without_gradio_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)  # what cannot be imported
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "True")
    monkeypatch.delenv("GRADIO_SHARE", raising=False)
    with pytest.raises(
        ConfigError, match=r"the playground needs the package gradio.*asag-deploy\[playground\]"
    ):
        silent_gradio(tmp_path).__enter__()
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "True"
    assert "GRADIO_SHARE" not in os.environ
