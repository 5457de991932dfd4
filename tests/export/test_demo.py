"""The network that comes with the project detects, and looks closer where there is something to see."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from asag_deploy.images.reading import read_image
from asag_evaluation.data.scenes import SCENE_CATEGORIES
from asag_export import demo
from asag_training.checkpoints import load_checkpoint

pytestmark = pytest.mark.slow
SCENES = 36


class Shown(NamedTuple):
    folder: Path
    printed: str
    figures: dict[str, Any]


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Shown:
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("builtins.print", lambda *words, **options: lines.append(" ".join(map(str, words))))
        assert demo.main(["--output-dir", str(folder), "--scenes", str(SCENES)]) == 0
    figures = json.loads((folder / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))
    return Shown(folder, "\n".join(lines), figures)


def test_checkpoint_is_small_and_trained() -> None:
    assert demo.CHECKPOINT.stat().st_size < 20e6
    checkpoint = load_checkpoint(demo.CHECKPOINT)
    assert checkpoint.trained
    assert checkpoint.categories == SCENE_CATEGORIES


def test_it_detects(shown: Shown) -> None:
    assert shown.figures["images"] == SCENES
    assert shown.figures["coco"]["ap"] > 0.5
    assert shown.figures["coco"]["ap50"] > 0.75


def test_it_adapts(shown: Shown) -> None:
    by_kind = shown.figures["anchors"]["exit_levels_of_kind"]
    large, tiny = by_kind["large"], by_kind["tiny"]
    assert tiny["P3"] > 0.9 * sum(tiny.values())
    assert large["P5"] > 0.4 * sum(large.values())
    assert shown.figures["anchors"]["correlation"] > 0.5


def test_probing_is_worth_it(shown: Shown) -> None:
    lines = [line.strip() for line in shown.printed.splitlines()]
    ap = {
        way: float(line.removeprefix(way).split()[0])
        for way in demo._WAYS
        for line in lines
        if line.startswith(f"{way} ") and len(line.removeprefix(way).split()) == 8
    }
    assert ap.keys() == {"exact", "fast", "stop at P4", "stop at P5"}
    assert ap["exact"] > ap["stop at P4"] > ap["stop at P5"]


def test_pictures(shown: Shown) -> None:
    assert read_image(str(shown.folder / "gallery.jpg")).shape == (1280, 1920, 3)
    assert {path.name for path in (shown.folder / "evaluation").glob("*.png")} >= {"exit_levels.png"}


def test_a_second_demo_takes_the_scenes_of_the_first(shown: Shown, tmp_path: Path) -> None:
    assert len(demo._scenes(shown.folder / "scenes", SCENES)) == SCENES
    other = demo._scenes(shown.folder / "scenes", 3)
    assert len(other) == 3
    assert len(demo._scenes(shown.folder / "scenes", 3)) == 3


def test_bad_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--scenes", "some"]) == 2
    assert capsys.readouterr().err.startswith("demo: error: argument --scenes: invalid int value")
