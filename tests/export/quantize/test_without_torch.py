"""`asag-quantize` on a machine without PyTorch, and on one without the package onnx."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from asag_deploy.bundle.bundle import Bundle
from asag_export.quantize import cost
from asag_export.quantize.cli import main

WITHOUT_TORCH = """
import sys
sys.modules["torch"] = sys.modules["asag_training"] = None
from asag_export.quantize.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_without_pytorch(command: list[str], tmp_path: Path) -> None:
    """Calibration, the quantised graphs, and AP before and after."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *command, "--max-loss", "1"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "1 convolutions and 1 matrix products in int8, calibrated on 8 pictures" in done.stdout
    assert "AP on 2 images, onnxruntime: before " in done.stdout
    manifest = Bundle.open(tmp_path / "int8").manifest
    assert (manifest.precision_of("backbone"), manifest.precision_of("probe_p4")) == ("int8", "fp32")


def test_accuracy_that_falls_too_far(
    command: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measured = iter((0.5, 0.4))
    monkeypatch.setattr(cost, "_average_precision", lambda *_: next(measured))
    assert main([*command, "--max-loss", "0.09"]) == 1
    assert "AP falls from 0.5000 to 0.4000" in capsys.readouterr().err
    assert not (tmp_path / "int8").exists()


def test_without_onnx(
    tiny_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("bundle_quantization", "graph_quantization", "placement"):
        monkeypatch.delitem(sys.modules, f"asag_export.quantize.{module}", raising=False)
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert main([str(tiny_bundle.path), "--images", "x", "--output-dir", str(tmp_path / "int8")]) == 2
    assert capsys.readouterr().err == (
        "asag-quantize: error: this needs the package onnx, which is not installed: "
        "install it with `pip install 'asag-deploy[quantize]'`\n"
    )
