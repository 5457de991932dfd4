"""The playground as a visitor meets it: in Chromium, on a page that no other machine is asked for."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from support.playground_browser import CHROMIUM, MILLISECONDS, VIEW, browser, served, settled
from support.tiny_bundle import make_bundle, picture

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("gradio") is None,
        reason="needs Gradio: pip install 'asag-deploy[playground]'",
    ),
    pytest.mark.skipif(
        importlib.util.find_spec("playwright") is None, reason="needs Playwright: pip install playwright"
    ),
    pytest.mark.skipif(not Path(CHROMIUM).exists(), reason="needs Chromium: apt-get install chromium"),
]

PHONE = 390
"""Pixels across."""
TYPED = (
    ("most", "0", "#stopped", "P3: 1 object in "),
    ("most", "", "#stopped", "P3: 10 objects in "),
    ("most", "3", "#stopped", "P3: 3 objects in "),
    ("most", "700", "#stopped", "P3: 10 objects in "),
    ("cap", "0", "#story", "5 anchors were given"),
    ("cap", "", "#story", "24 anchors were given"),
    ("cap", "7", "#story", "7 anchors were given"),
    ("cap", "100000", "#story", "24 anchors were given"),
    ("threshold", "5", "#found", "Nothing is as sure"),
    ("threshold", "", "#found", "object"),
    ("threshold", "2", "#found", "Nothing is as sure"),
    ("threshold", "-1", "#found", "object"),
    ("deadline", "0.001", "#story", "the deadline of 0.001 ms had passed"),
    ("deadline", "-5", "#story", "Probing stopped after P3"),
    ("deadline", "0.002", "#story", "the deadline of 0.002 ms had passed"),
    ("deadline", "", "#story", "Probing stopped after P3"),
)
"""A field, what is typed into it, and what is then said where."""


def nothing_is_covered_or_cut_off(page: Any) -> None:
    """Check that no label lies over an example, and that a phone shows the whole width of every picture."""
    label, thumbnail = page.locator("#examples label").first, page.locator("#examples .thumbnail-item").first
    for width in (PHONE, VIEW[0]):
        page.set_viewport_size({"width": width, "height": VIEW[1]})
        above = label.bounding_box()
        assert above["y"] + above["height"] <= thumbnail.bounding_box()["y"]
        for item in page.locator("#levels .thumbnail-item, #stopped .thumbnail-item").all():
            box = item.bounding_box()
            assert 100 < box["width"] < box["x"] + box["width"] < width


def test_a_visit(tmp_path: Path) -> None:
    examples = tmp_path / "examples"
    examples.mkdir()
    cv2.imwrite(str(examples / "none asks.png"), picture(0)[..., ::-1])
    uploaded = tmp_path / "four ask.png"
    cv2.imwrite(str(uploaded), picture(4, 2)[..., ::-1])
    tiff = tmp_path / "four ask.tiff"
    cv2.imwrite(str(tiff), picture(4, 2)[..., ::-1])
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    make_bundle(tmp_path / "bundle")

    with (
        served(tmp_path / "bundle", "--examples", str(examples), "--threshold", "0") as (address, process),
        browser() as running,
    ):
        page = running.new_page(viewport={"width": VIEW[0], "height": VIEW[1]})
        asked: list[str] = []
        complaints: list[str] = []
        messages_of_page: list[tuple[str, str]] = []
        page.on("request", lambda request: asked.append(request.url))
        # Gradio's own page warns of what it lacks; errors are ours.
        page.on("console", lambda message: messages_of_page.append((message.type, message.text)))
        page.on("pageerror", lambda error: complaints.append(str(error)))

        def wait_for(selector: str, text: str) -> None:
            page.wait_for_function(
                "([where, text]) => document.querySelector(where)?.textContent.includes(text)",
                arg=[selector, text],
                timeout=MILLISECONDS,
            )

        def captions(row: str) -> list[str]:
            return page.locator(f"{row} .caption-label").all_inner_texts()

        # It begins with the first example.
        page.goto(address)
        settled(page)
        wait_for("#story", "Probing stopped after P5: no anchor there asked for a closer look.")
        assert [caption[:3] for caption in captions("#levels")] == ["P5:", "Dec"]
        assert "untrained" in page.inner_text("body")

        page.set_input_files("#given input[type=file]", str(uploaded))
        wait_for("#story", "Probing stopped after P3")
        wait_for("#levels", "4 asked and were replaced on P4")
        wait_for("#stopped", "P3: 10 objects in ")
        wait_for("#times", "probe_p3")
        assert [caption[:3] for caption in captions("#levels")] == ["P5:", "P4:", "P3:", "Dec"]
        assert page.locator("#found tbody tr").count() == 10
        settled(page)

        page.fill("#threshold input[type=number]", "1")
        page.press("#threshold input[type=number]", "Enter")
        wait_for("#found", "Nothing is as sure")
        wait_for("#stopped", "P3: 0 objects in ")  # the comparison is of what is above
        page.fill("#threshold input[type=number]", "0")
        page.press("#threshold input[type=number]", "Enter")
        page.wait_for_selector("#found tbody tr", timeout=MILLISECONDS)
        wait_for("#stopped", "P3: 10 objects in ")

        # Numbers beyond their range, and fields that are empty while another is typed.
        for field, text, where, said in TYPED:
            page.fill(f"#{field} input[type=number]", text)
            wait_for(where, said)
            assert page.locator(".problem").count() == 1, text  # of the untrained weights
        settled(page)
        assert page.get_by_text("Error", exact=True).count() == 0

        page.check("#level input[value=P4]")
        wait_for("#story", "Probing stopped after P4: deeper levels are not allowed")
        assert [caption[:3] for caption in captions("#levels")] == ["P5:", "P4:", "Dec"]

        with page.expect_download(timeout=MILLISECONDS) as download:
            page.click("#download")
        trace = json.loads(Path(download.value.path()).read_text())["trace"]
        assert trace["exit_level"] == "P4"
        assert sum(trace["levels"][0]["candidates"]["asked"]) == 4

        # What is no image is a sentence, and an example mends it.
        page.click("#given button[aria-label*='lear'], #given button[aria-label*='emove']")
        wait_for("#story", "Choose a picture")
        page.set_input_files("#given input[type=file]", str(broken))
        wait_for("#story", "'broken.jpg' is damaged or is not an image")
        page.set_input_files("#given input[type=file]", str(tiff))
        wait_for("#story", "Your browser may be unable to show a file of this kind")
        wait_for("#stopped", "P5: 10 objects in ")
        page.click("#examples .thumbnail-item")
        wait_for("#story", "Probing stopped after P5")
        wait_for("#stopped", "it stopped after P5")
        settled(page)
        assert "Your browser" not in page.inner_text("#story")

        nothing_is_covered_or_cut_off(page)
        shot = cv2.imdecode(np.frombuffer(page.screenshot(), np.uint8), cv2.IMREAD_COLOR)
        assert shot is not None
        assert shot.shape == (VIEW[1], VIEW[0], 3)
        page.close()
        process.terminate()
        _, messages = process.communicate(timeout=60)

    assert {url for url in asked if not url.startswith((f"{address}/", "data:", "blob:"))} == set()
    assert len(asked) > 20
    assert complaints == []
    assert [text for kind, text in messages_of_page if kind == "error"] == []
    assert process.returncode == 143
    assert messages == "asag-playground: warning: the bundle's weights are untrained\n"
