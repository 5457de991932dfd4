"""A few moments of what `kill.py` does a hundred times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from endurance import kill
from support.tiny_bundle import make_bundle


@pytest.mark.slow
def test_detection_that_is_killed(tmp_path: Path) -> None:
    make_bundle(tmp_path / "bundle")
    report = tmp_path / "kill.json"
    options = ["--jobs", "video", "--moments", "3", "--bundle", str(tmp_path / "bundle")]
    assert kill.main([*options, "--report", str(report)]) == 0
    jobs = json.loads(report.read_text())["jobs"]
    assert {name: job["moments"] for name, job in jobs.items()} == {"video": 3}
