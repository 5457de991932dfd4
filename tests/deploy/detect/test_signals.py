"""`asag-detect` that is told to end keeps what it has found."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from support.tiny_bundle import make_bundle

SECONDS = 120


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM])
def test_what_was_found_is_kept(tmp_path: Path, number: signal.Signals) -> None:
    make_bundle(tmp_path / "bundle")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(2):
        cv2.imwrite(str(pictures / f"{i}.png"), np.full((64, 64, 3), 200, np.uint8))
    for i in range(2, 5_000):
        (pictures / f"{i}.png").hardlink_to(pictures / f"{i % 2}.png")
    results = tmp_path / "results"
    files = ["--json", str(results / "all.json"), "--coco", str(results / "coco.json")]
    command = [sys.executable, "-W", "error", "-m", "asag_deploy.detect.cli", str(tmp_path / "bundle")]
    with subprocess.Popen(
        [*command, str(pictures), *files, "--quiet"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            end = time.monotonic() + SECONDS
            while time.monotonic() < end and not any(
                file.stat().st_size > 10_000 for file in results.glob(".all.*")
            ):
                time.sleep(0.02)
            process.send_signal(number)
            out, err = process.communicate(timeout=SECONDS)
        finally:
            process.kill()
    assert (process.returncode, out, err) == (128 + number, "", "")
    assert 0 < len(json.loads((results / "all.json").read_text())) < 5_000
    assert json.loads((results / "coco.json").read_text())
    assert sorted(path.name for path in results.iterdir()) == ["all.json", "coco.json"]
