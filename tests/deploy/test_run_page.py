"""docs/run.md says what there is, and its Python runs."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import cv2
import numpy as np
import pytest

from asag_deploy.backends import BACKENDS
from asag_deploy.backends.compiled_cache import CompiledCache
from asag_deploy.call_options import OPTION_NAMES
from asag_deploy.detect import cli
from asag_deploy.detector_options import DetectorOptions
from support.tiny_bundle import make_bundle
from support.videos import write_video

PAGE = (Path(__file__).parents[2] / "docs" / "run.md").read_text(encoding="utf-8")
PROGRAMS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
FLAGS = set(cli._parser()._option_string_actions)


def rows(heading: str) -> list[list[str]]:
    """The rows of the tables below a heading, without their heads: one text a cell."""
    part = PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_every_option_has_a_row() -> None:
    table = rows("Options")
    names = [row[0].strip("`") for row in table]
    loaded = [field.name for field in dataclasses.fields(DetectorOptions)]
    assert sorted(names) == sorted({*loaded, *OPTION_NAMES})
    for name, row in zip(names, table, strict=True):
        flag = f"--{name.replace('_', '-')}"
        assert row[1] == (f"`{flag}`" if flag in FLAGS else ""), name
        if name in loaded:
            assert row[3] == ("yes" if name in OPTION_NAMES else "no"), name


def test_every_backend_has_a_row() -> None:
    named = [name for row in rows("Which backend") for name in re.findall(r"`([^`]+)`", row[0])]
    assert sorted(named) == sorted(BACKENDS)


def test_where_compiled_graphs_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("ASAG_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", "/home/somebody")
    cache = CompiledCache.of_user("a recipe")
    assert f"`{str(cache.folder).replace('/home/somebody', '~')}`" in PAGE
    assert f"grows to {cache.most_bytes // 2**30} GiB at most" in PAGE


def test_every_option_of_the_program_is_there() -> None:
    detectors = {f"--{name.replace('_', '-')}" for name in (*OPTION_NAMES, "backend", "threads")}
    own = {flag for flag in FLAGS if flag.startswith("--")} - detectors
    listed = {row[0].split("`")[1].split()[0] for row in rows("The command line")}
    assert own - {"--help", "--version", "--loop", "--requests"} == listed


@pytest.mark.parametrize("program", PROGRAMS, ids=[str(number) for number in range(len(PROGRAMS))])
def test_its_python_runs(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if "clip.mp4" in program:
        pytest.importorskip("av", reason="PyAV writes the video")
        write_video(tmp_path / "clip.mp4")
    monkeypatch.chdir(tmp_path)
    make_bundle(tmp_path / "bundle")
    noise = np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)
    Path("photos").mkdir()
    for name in ("street.jpg", "market.jpg", "photos/one.jpg"):
        cv2.imwrite(name, noise)
    exec(program, {})
    assert capsys.readouterr().out
