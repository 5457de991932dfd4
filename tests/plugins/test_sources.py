"""What every file of `plugins/` keeps to."""

from __future__ import annotations

import re

from support.plugin_builds import PLUGINS

SUFFIXES = {".h", ".cpp", ".cu"}
MAX_LINES = 400
MAX_COLUMNS = 120


def test_sources_are_short_and_say_what_they_are() -> None:
    files = [file for file in sorted(PLUGINS.rglob("*")) if file.suffix in SUFFIXES]
    assert len(files) > 15
    for file in files:
        lines = file.read_text(encoding="utf-8").splitlines()
        assert lines[0].startswith(("//", "/*")), f"{file} does not begin with what it is"
        assert len(lines) <= MAX_LINES, file
        assert max(map(len, lines)) <= MAX_COLUMNS, file


def test_kernels_know_nothing_of_tensorrt() -> None:
    for folder in ("include", "src"):
        for file in (PLUGINS / folder).rglob("*"):
            if file.suffix in SUFFIXES:
                text = file.read_text(encoding="utf-8")
                assert not re.search(r"NvInfer|nvinfer", text), file
