"""Pages of the playground, made in a process of their own: Gradio leaves event loops behind in its process.

    python playground_pages.py FOLDER

prints what they are made of as JSON.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import cv2

from asag_deploy.bundle.manifest import Manifest
from asag_deploy.detections import Detections
from asag_deploy.detector_options import DetectorOptions
from asag_deploy.errors import ConfigError
from asag_deploy.playground.examples import prepare
from asag_deploy.playground.looking import Ranges
from asag_deploy.playground.page import look_of_the_page, make_page
from asag_deploy.playground.server import make_server, silent_gradio
from asag_deploy.playground.shelf import Shelf
from asag_deploy.playground.turns import Turns
from support.detection_samples import make_detections
from support.tiny_bundle import picture, tiny_manifest

REQUESTS = 3
CROWD, GONE = 12, 2


class Found:
    """A detector that is never asked."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest

    def __call__(self, images: Any, **options: Any) -> Detections:
        return make_detections()


def page_of(manifest: Manifest, folder: Path, *, examples: int = 0) -> Any:
    files = []
    for number in range(examples):
        files.append(folder / f"{number}.png")
        cv2.imwrite(str(files[-1]), picture(0))
    return make_page(
        Found(manifest),
        Ranges.of(manifest).first_choices(DetectorOptions(max_level="P5"), 0.4),
        turns=Turns(at_once=REQUESTS),
        backend="onnxruntime",
        examples=prepare(files, folder / "examples"),
        shelf=Shelf(folder / "gradio" / "shown"),
    )


def components(page: Any) -> dict[str, dict[str, Any]]:
    """The properties of the components that have a name, by that."""
    every = [one["props"] for one in page.get_config_file()["components"]]
    names = ("value", "choices", "interactive", "minimum", "maximum", "visible")
    return {one["elem_id"]: {name: one.get(name) for name in names} for one in every if one.get("elem_id")}


def answers(page: Any, folder: Path) -> dict[str, tuple[int, str]]:
    """What the server answers to a few paths."""
    from starlette.testclient import TestClient

    server = make_server(page, allowed=folder / "examples", ready=lambda: None)
    example, other = folder / "examples" / "00.jpg", folder / "0.png"
    paths = {"page": "/", "theme": "/theme.css"}
    paths |= {"example": f"/gradio_api/file={example}", "other": f"/gradio_api/file={other}"}
    app: Any = server.config.app
    with TestClient(app) as client:
        return {name: ((got := client.get(path)).status_code, got.text) for name, path in paths.items()}


class Visitor:
    """Who has changed something, as Gradio tells of them."""

    def __init__(self, *, gone: bool) -> None:
        self.request = self
        self._gone = gone

    async def is_disconnected(self) -> bool:
        return self._gone


def crowd(folder: Path) -> dict[str, int]:
    """How many of a crowd that changes something at once a page serves, and how many of them at once."""
    now: set[int] = set()
    most, done = 0, 0

    class Slow(Found):
        def __call__(self, images: Any, **options: Any) -> Detections:
            nonlocal most, done
            now.add(threading.get_ident())
            most = max(most, len(now))
            time.sleep(0.02)
            now.remove(threading.get_ident())
            done += 1
            raise ConfigError("it is only counted")

    page = make_page(
        Slow(tiny_manifest()),
        Ranges.of(tiny_manifest()).first_choices(DetectorOptions(), 0.4),
        turns=Turns(at_once=REQUESTS),
        backend="onnxruntime",
        examples=[],
        shelf=Shelf(folder / "gradio" / "shown"),
    )
    (look,) = (function.fn for function in page.fns.values() if function.fn.__name__ == "look")
    picture_file = folder / "crowd.png"
    cv2.imwrite(str(picture_file), picture(0))
    values = (str(picture_file), 0.3, "P3", "exact", 0, 24, 10)

    async def come() -> None:
        await asyncio.gather(*(look(Visitor(gone=number < GONE), *values) for number in range(CROWD)))

    asyncio.run(come())
    return {"most_at_once": most, "done": done}


def main(folder: Path) -> None:
    tiny = tiny_manifest()
    free = dataclasses.replace(tiny.probing, cap_can_be_lowered=True)
    manifest = dataclasses.replace(tiny, probing=dataclasses.replace(tiny.probing, cap_can_be_lowered=False))
    one = dataclasses.replace(manifest.probing, anchor_cap=1, anchor_floor=0)
    with silent_gradio(folder / "gradio"):
        page = page_of(manifest, folder, examples=1)
        made = {
            "components": components(page),
            "functions": [
                (
                    function.fn.__name__,
                    function.queue,
                    function.trigger_mode,
                    function.api_visibility,
                )
                for function in page.fns.values()
            ],
            "free": components(page_of(dataclasses.replace(manifest, probing=free), folder)),
            "one": components(
                page_of(
                    dataclasses.replace(
                        manifest,
                        probing=one,
                        postprocessing=dataclasses.replace(manifest.postprocessing, max_detections=1),
                    ),
                    folder,
                )
            ),
            "answers": answers(page, folder),
            "crowd": crowd(folder),
            "footer": look_of_the_page()["footer_links"],
        }
    print(json.dumps(made))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
