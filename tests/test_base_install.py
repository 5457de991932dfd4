"""With the four packages of the base install every program helps, and says which extra a command takes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from support.every_program import PROGRAMS
from support.tiny_bundle import make_bundle

ROOT = Path(__file__).parent.parent


def run(commands: Sequence[Sequence[str]], folder: Path, allowed: Sequence[str] = ()) -> list[dict[str, Any]]:
    asked = json.dumps({"allowed": list(allowed), "commands": [list(command) for command in commands]})
    packages = (ROOT / name for name in (".", "training", "export", "benchmarks", "tests"))
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "support" / "base_install.py"), asked],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, packages))},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A bundle, a data set in COCO layout, and a file that stands for a checkpoint."""
    make_bundle(tmp_path / "bundle")
    images = tmp_path / "data" / "val2017"
    images.mkdir(parents=True)
    cv2.imwrite(str(images / "a.png"), np.zeros((64, 64, 3), np.uint8))
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 64, "height": 64}],
        "annotations": [],
        "categories": [{"id": i, "name": name} for i, name in enumerate(("round", "square", "other"))],
    }
    (tmp_path / "data" / "annotations").mkdir()
    for split in ("train2017", "val2017"):
        (tmp_path / "data" / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    (tmp_path / "data" / "train2017").symlink_to("val2017")
    (tmp_path / "a.pth").write_bytes(b"")
    return tmp_path


def test_every_program_helps_and_tells_its_version(tmp_path: Path) -> None:
    found = run([[program, option] for program in PROGRAMS for option in ("--help", "--version")], tmp_path)
    assert {name for entry in found for name in entry["command"][:1]} == set(PROGRAMS)
    assert len(found) > 2 * len(PROGRAMS)  # and of every command
    for entry in found:
        assert (entry["code"], entry["err"]) == (0, ""), entry
        assert entry["out"].startswith(("usage: ", f"{entry['command'][0]} ")), entry


WORKS = "works"
BUNDLE_RUN = ["bundle", "--duration", "1", "--limit", "1"]
EXPORT = ["asag-export", "--untrained", "--variant", "asag-a-r50-100", "--output-dir", "new"]
COMMANDS: list[tuple[list[str], str]] = [
    (["asag-detect", "bundle", "data/val2017", "--quiet", "--json", "a.json"], WORKS),
    (["asag-data", "scenes", "--output-dir", "scenes", "--count", "1"], WORKS),
    (["asag-data", "check", "scenes"], WORKS),
    (["asag-build", "bundle"], "engines"),
    (["asag-serve", "bundle", "--port", "0"], "serve"),
    (["asag-batch", "bundle", "data/val2017", "--output", "batch"], "ray"),
    (["asag-playground", "bundle", "--port", "0"], "playground"),
    (["asag-eval", "bundle", "--data", "data"], "evaluate"),
    (["asag-eval", "a.pth", "--data", "data"], "train"),
    (["asag-train", "--data", "data", "--output-dir", "run"], "train"),
    (["pack", "a.pth", "b.safetensors"], "train"),
    (["asag-quantize", "bundle", "--images", "data/val2017", "--output-dir", "int8"], "quantize"),
    (EXPORT, "export"),
    (["demo", "--scenes", "1"], "export"),
    (["asag-bench", "run", *BUNDLE_RUN], "bench"),
    (["asag-bench", "run", *BUNDLE_RUN, "--output-dir", "results"], "bench"),
    (["asag-bench", "demo"], "bench"),
    (["asag-bench", "parity", "bundle", "--backend", "onnxruntime"], "bench"),
    (["asag-bench", "training-step"], "bench"),
    (["asag-paper", "tables"], "bench"),
    (["asag-paper", "figures", "--output-dir", "figures"], "bench"),
    (["asag-bench", "annotations"], "bench"),
    (["asag-bench", "torch-cuda-loop"], "bench"),
]


@pytest.mark.slow
def test_a_command_says_which_extra_it_takes(folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    found = run([command for command, _ in COMMANDS], folder)
    for entry, (command, extra) in zip(found, COMMANDS, strict=True):
        if extra == WORKS:
            assert (entry["code"], entry["err"]) == (0, ""), entry
            continue
        lines = entry["err"].splitlines()
        assert entry["code"] == 2, entry
        assert len([line for line in lines if "warning: " not in line]) == 1, entry
        assert lines[-1].startswith(f"{command[0]}: error: "), entry
        assert f" install it with `pip install 'asag-deploy[{extra}]'`" in lines[-1], entry
        assert "is not installed" in lines[-1], entry
    made = {path.relative_to(folder).parts[0] for path in folder.rglob("*") if path not in before}
    assert made == {"a.json", "scenes"}


@pytest.mark.parametrize(
    ("package", "code", "said"),
    [
        (
            "cv2",
            "raise ImportError('libGL.so.1: cannot open shared object file', name='cv2')",
            (
                "cv2, which cannot be used (libGL.so.1: cannot open shared object file): install it anew "
                "with `pip install --force-reinstall opencv-python-headless`"
            ),
        ),
        (
            "numpy",
            "raise ImportError('multiarray failed to import')",
            (
                "numpy, which cannot be used (multiarray failed to import): install it anew with "
                "`pip install --force-reinstall numpy`"
            ),
        ),
        (
            "tqdm",
            "import nowhere",
            "nowhere, which is not installed: install it with `pip install nowhere`",
        ),
    ],
)
def test_a_package_of_the_base_that_cannot_be_imported(
    package: str, code: str, said: str, tmp_path: Path
) -> None:
    (tmp_path / f"{package}.py").write_text(code)
    (tmp_path / "asag-detect").write_text("from asag_deploy.detect.cli import main\nmain(['--help'])\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run(
        [sys.executable, tmp_path / "asag-detect"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == f"asag-detect: error: this needs the package {said}\n"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")
def test_an_extra_that_is_half_there(folder: Path) -> None:
    torch = ["torch", "torchgen", "mpmath", "sympy", "networkx", "jinja2", "markupsafe", "filelock", "fsspec"]
    command = ["asag-eval", "bundle", "--data", "data", "--output-dir", "figures"]
    (without_coco,) = run([command], folder, ["matplotlib", "onnx", "ml_dtypes"])
    assert "needs the package faster_coco_eval" in without_coco["err"]
    assert "asag-deploy[evaluate]" in without_coco["err"]
    (without_onnx,) = run([EXPORT], folder, [*torch, "safetensors", "scipy", "typing_extensions"])
    assert "this needs the package onnx" in without_onnx["err"], without_onnx
    assert "asag-deploy[export]" in without_onnx["err"]
    assert (without_coco["code"], without_onnx["code"]) == (2, 2)
