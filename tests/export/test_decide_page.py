"""docs/decide.md tells what the networks do: its captions, its table and its pictures."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from asag_deploy.detector import Detector
from asag_deploy.images.reading import load
from asag_export.demo.networks import CHECKPOINT, PHOTOGRAPHS_CHECKPOINT
from asag_training.checkpoints import load_checkpoint
from asag_training.network.config import VARIANTS
from support.decide_pictures import PHOTOGRAPH, detector_of, look, photograph_pictures, scene_table

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "decide.md").read_text(encoding="utf-8")
_NUMBER = re.compile(r"(?<![P\d])\d+")
_NEAR = 2
"""By how much a number on the page may be another processor's."""


@pytest.fixture(scope="module")
def photographs() -> Detector:
    return detector_of(PHOTOGRAPHS_CHECKPOINT)


def test_what_draws_the_pictures_says_what_it_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["decide_pictures", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(DOCS.parent / "tests" / "support" / "decide_pictures.py"), run_name="__main__")
    assert ended.value.code == 0
    assert "where the pictures are written" in capsys.readouterr().out


def test_the_captions_of_the_photograph(photographs: Detector) -> None:
    said = look(photographs, PHOTOGRAPH).sentences()[1:]
    assert len(said) == 4
    for sentence in said:
        assert is_told(f"*{sentence}.*"), sentence


def test_the_rows_of_the_scene() -> None:
    rows, picture = scene_table(detector_of(CHECKPOINT))
    assert len(rows) == 4
    for row in rows:
        assert is_told(row), row
    assert is_drawn("decide-scene.jpg", picture)


def test_the_pictures_of_the_photograph(photographs: Detector) -> None:
    drawn = dict(photograph_pictures(look(photographs, PHOTOGRAPH)))
    assert sorted(f"decide-{name}.jpg" for name in drawn) == sorted(
        file.name for file in DOCS.glob("decide-photo-*.jpg")
    )
    for name, picture in drawn.items():
        assert is_drawn(f"decide-{name}.jpg", picture), name


def test_the_table_of_settings() -> None:
    scenes, photographs = (load_checkpoint(file).config for file in (CHECKPOINT, PHOTOGRAPHS_CHECKPOINT))
    published = [VARIANTS[f"asag-a-r50-{name}"] for name in ("100", "300", "crowdhuman")]
    for name in (
        *("score_low", "score_high", "score_pass", "patch_nms_iou", "patch_size"),
        *("anchor_floor", "anchor_cap", "max_patches"),
    ):
        values = [getattr(config, name) for config in (*published, scenes, photographs)]
        cells = " | ".join("-" if value is None else f"{value:g}" for value in values)
        assert re.search(rf"^\| `{name}` \|.*\| {re.escape(cells)} \|$", PAGE, re.MULTILINE), (name, cells)


def is_told(sentence: str) -> bool:
    """Whether the page has these words, with these numbers or such as rounding elsewhere makes of them."""
    words = re.compile(_NUMBER.sub(r"(\\d+)", re.escape(sentence)))
    mine = [int(number) for number in _NUMBER.findall(sentence)]
    return any(
        all(abs(int(theirs) - own) <= _NEAR for theirs, own in zip(found.groups(), mine, strict=True))
        for found in words.finditer(PAGE)
    )


def is_drawn(name: str, picture: np.typing.NDArray[np.uint8]) -> bool:
    """Whether the page shows the file, and it holds this picture, up to JPEG and a few lines."""
    stored = load(str(DOCS / name), "rgb")
    if f"]({name})" not in PAGE or abs(len(stored) - len(picture)) > 60:
        return False
    rows = min(len(stored), len(picture))
    difference = np.abs(stored[:rows].astype(np.int16) - picture[:rows])
    return float((difference > 64).mean()) < 0.02


def test_another_number_is_not_told() -> None:
    assert is_told("*Decoder: 102 anchors, 59 of P5, 40 of P4, 3 of P3.*")
    assert not is_told("*Decoder: 102 anchors, 69 of P5, 40 of P4, 3 of P3.*")
