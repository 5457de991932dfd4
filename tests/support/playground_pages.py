"""Pages of the playground, made in a process of their own: Gradio leaves event loops behind in its process.

    python playground_pages.py FOLDER

prints what they are made of as JSON.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import cv2

from asag_deploy.bundle.manifest import Manifest
from asag_deploy.detections import Detections
from asag_deploy.detector_options import DetectorOptions
from asag_deploy.playground.examples import prepare
from asag_deploy.playground.looking import Ranges
from asag_deploy.playground.page import look_of_the_page, make_page
from asag_deploy.playground.server import make_server, silent_gradio
from asag_deploy.playground.shelf import Shelf
from support.detection_samples import make_detections
from support.tiny_bundle import picture, tiny_manifest

REQUESTS = 3


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
        requests=REQUESTS,
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


def main(folder: Path) -> None:
    manifest = tiny_manifest()
    free = dataclasses.replace(manifest.probing, cap_can_be_lowered=True)
    one = dataclasses.replace(manifest.probing, anchor_cap=1, anchor_floor=0)
    with silent_gradio(folder / "gradio"):
        page = page_of(manifest, folder, examples=1)
        made = {
            "components": components(page),
            "functions": [
                (
                    function.fn.__name__,
                    function.concurrency_limit,
                    function.concurrency_id,
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
            "footer": look_of_the_page()["footer_links"],
        }
    print(json.dumps(made))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
