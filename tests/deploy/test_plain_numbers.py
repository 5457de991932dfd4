"""Numbers from text: only as people write them, wherever the project reads one."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from asag_deploy.batch.cluster import knock
from asag_deploy.command_line import numbers, real_number, whole_number
from asag_deploy.engines.targets import parse_target
from asag_deploy.errors import ConfigError, plural
from asag_deploy.images.sources import Failure, iter_frames, list_sources
from asag_deploy.plain_numbers import real, unsigned, whole
from asag_deploy.processing.canvases import parse_canvas

ARABIC = "\u0661"
"""The digit one, as Python reads it too."""
NO_NUMBERS = ("", "1_0", ARABIC, "\uff11", " 1", "1 ", "1\n", "0x1", "one", "--1", "²", "9" * 5000)
NO_REAL_ONES = (*NO_NUMBERS, "nan", "inf", "-Infinity", "1e999", ".", "e5", "1e", "0.1_0", f"0.{ARABIC}")


@pytest.mark.parametrize("text", NO_NUMBERS)
def test_no_whole_number(text: str) -> None:
    assert whole(text) is None
    assert unsigned(text) is None
    with pytest.raises(argparse.ArgumentTypeError, match="it must be a whole number from 0 to"):
        whole_number(0)(text)


@pytest.mark.parametrize("text", NO_REAL_ONES)
def test_no_number(text: str) -> None:
    assert real(text) is None
    for read in (real_number(0, 10), numbers(real_number(0, 10))):
        with pytest.raises(argparse.ArgumentTypeError, match="it must be from 0 to 10"):
            read(text)


def test_numbers() -> None:
    assert [whole(text) for text in ("0", "007", "-1", "+12")] == [0, 7, -1, 12]
    assert [unsigned(text) for text in ("0", "007", "-1", "+12")] == [0, 7, None, None]
    texts = ("0", "-1", "+0.5", ".5", "5.", "1e3", "2.5E-1")
    assert [real(text) for text in texts] == [0, -1, 0.5, 0.5, 5, 1000, 0.25]
    assert [str(real(text)) for text in ("-0", "-0.0", "-1e-999")] == ["0.0"] * 3


def test_other_options_of_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for port in ("637" + ARABIC, "6_379", " 6379"):
        with pytest.raises(ConfigError, match="it must be host:port"):
            knock(f"127.0.0.1:{port}")
    with pytest.raises(ConfigError, match="unknown canvas"):
        parse_canvas(f"8{ARABIC}0x1088")
    with pytest.raises(ConfigError, match="unknown GPU"):
        parse_target(f"8.{ARABIC}")
    monkeypatch.chdir(tmp_path)
    assert [source.kind for source in list_sources(["0"]).sources] == ["camera"]
    for number in ("9" * 12, ARABIC):  # no camera's, but a file's name
        assert [source.kind for source in list_sources([number]).sources] == ["image"]
    (failure,) = iter_frames(list_sources(["camera:" + "9" * 12]).sources)
    assert isinstance(failure, Failure)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (plural(0, "frame"), "0 frames"),
        (plural(1, "frame"), "1 frame"),
        (plural(2, "box"), "2 boxes"),
        (plural(1, "class"), "1 class"),
        (plural(3, "patch"), "3 patches"),
        (plural(1, "image is used", "images are used"), "1 image is used"),
        (plural(2, "image is used", "images are used"), "2 images are used"),
    ],
)
def test_counts_in_words(said: str, words: str) -> None:
    assert said == words
