"""The playground in a process of its own, and a browser that looks at it.

    PYTHONPATH=.:training:tests python tests/support/playground_browser.py BUNDLE docs/playground.png

makes the picture of the documentation.
"""

from __future__ import annotations

import argparse
import io
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or "/usr/bin/chromium"
_ARGUMENTS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
VIEW = (1400, 1000)
MILLISECONDS = 60_000
_COLOURS = 255


@contextmanager
def served(bundle: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Run `asag-playground` until the block ends; gives its address and its process."""
    command = [sys.executable, "-m", "asag_deploy.playground.cli", str(bundle), "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if " at http" not in line:
                assert process.stderr is not None
                raise AssertionError(line + process.stderr.read())
            yield line.rpartition(" at ")[2].strip(), process
        finally:
            process.kill()


@contextmanager
def browser() -> Iterator[Browser]:
    """Run Chromium until the block ends."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=list(_ARGUMENTS))
        try:
            yield running
        finally:
            running.close()


def settled(page: Page) -> None:
    """Wait until both rows of pictures are there, with their pictures."""
    for row in ("#levels", "#stopped"):
        page.wait_for_selector(f"{row} .caption-label", timeout=MILLISECONDS)
    page.wait_for_function(
        "[...document.querySelectorAll('img')].every(image => image.complete && image.naturalWidth)",
        timeout=MILLISECONDS,
    )


def main(bundle: Path, target: Path) -> None:
    """Write what the page shows of the first example, as a PNG of 255 colours."""
    from PIL import Image

    with served(bundle) as (address, _), browser() as running:
        page = running.new_page(viewport={"width": VIEW[0], "height": VIEW[1]})
        page.goto(address)
        settled(page)
        for threshold in ("0.31", "0.29", "0.3"):  # the first calls take longer, which the bars would show
            page.fill("#threshold input[type=number]", threshold)
            page.press("#threshold input[type=number]", "Enter")
            page.wait_for_timeout(1500)
        page.locator("#threshold input[type=number]").blur()
        picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    # Such a palette keeps rare colours, which are those of the lines.
    few = picture.quantize(_COLOURS, method=Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE)
    few.save(target, optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bundle", type=Path, help="what is looked at")
    parser.add_argument("picture", type=Path, help="the PNG to write")
    options = parser.parse_args()
    main(options.bundle, options.picture)
