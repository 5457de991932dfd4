"""Backends load and detect where nothing can be written, and leave nothing where something can."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from asag_deploy.backends import BACKENDS
from asag_deploy.scratch import scratch_folder
from support.tiny_bundle import make_bundle

ON_CPU = [
    name
    for name in BACKENDS
    if name == "onnxruntime" or (name.startswith("openvino") and BACKENDS[name].problem() is None)
]

_DETECT = """
import json, os, pwd, sys
if sys.argv[3] == "homeless":
    def no_entry(uid):
        raise KeyError(uid)
    pwd.getpwuid = no_entry
import numpy as np
from asag_deploy import Detector
for backend in sys.argv[2].split(","):
    with Detector.load(sys.argv[1], backend=backend) as detector:
        print(json.dumps(detector(np.full((64, 64, 3), 200, np.uint8)).to_json()["detections"]))
"""


def detect(bundle: Path, environment: dict[str, str | None], *before: str, home: str = "kept") -> list[Any]:
    """What each backend finds, one after the other."""
    changed = {**os.environ, **environment}
    done = subprocess.run(
        [*before, sys.executable, "-W", "error", "-c", _DETECT, str(bundle), ",".join(ON_CPU), home],
        env={name: value for name, value in changed.items() if value is not None},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, ""), done
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(ON_CPU)
    assert all(found)
    return found


UNSET = dict.fromkeys(
    ("ASAG_CACHE_DIR", "XDG_CACHE_HOME", "ORT_DISABLE_TELEMETRY", "TMPDIR", "TEMP", "TMP"), None
)


@pytest.mark.slow
def test_backends_leave_nothing_but_their_cache(tmp_path: Path) -> None:
    """No number of the machine, and no queue of reports about it."""
    make_bundle(tmp_path / "bundle")
    for name in ("home", "tmp", "cwd"):
        (tmp_path / name).mkdir()
    traced = tmp_path / "trace"
    strace = shutil.which("strace")
    tracing = [strace, "-f", "-qq", "-e", "trace=socket,connect", "-o", str(traced)] if strace else []
    places = {"HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "tmp")}
    before = Path.cwd()
    os.chdir(tmp_path / "cwd")
    try:
        detect(tmp_path / "bundle", {**UNSET, **places}, *tracing)
    finally:
        os.chdir(before)
    left = {path.relative_to(tmp_path) for name in places.values() for path in Path(name).rglob("*")}
    cache = Path("home", ".cache", "asag-deploy")
    assert {path for path in left if path != cache.parent and not path.is_relative_to(cache)} == set()
    assert list((tmp_path / "cwd").iterdir()) == []
    if strace:
        assert "AF_INET" not in traced.read_text()


@pytest.mark.slow
def test_backends_for_a_user_without_a_home(tmp_path: Path) -> None:
    make_bundle(tmp_path / "bundle")
    nowhere = {**UNSET, "HOME": None}
    found = detect(tmp_path / "bundle", nowhere, home="homeless")
    unwritable = {**UNSET, "HOME": "/dev/null", "XDG_CACHE_HOME": "/proc/nowhere", "TMPDIR": "/proc/nowhere"}
    assert detect(tmp_path / "bundle", unwritable) == found
    assert not Path(".asag-cache").exists()


def test_scratch_is_gone_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with scratch_folder() as folder:
        assert folder.parent == tmp_path
        assert folder.stat().st_mode & 0o077 == 0
        (folder / "a").write_text("")
    assert list(tmp_path.iterdir()) == []
