"""`asag-quantize` on a machine without PyTorch, and on one without the package onnx."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from asag_deploy.bundle.bundle import Bundle
from asag_evaluation.data.doodles import draw_doodles
from asag_export.quantize.cli import main
from support.bundle_edits import edit_graph
from support.coco_files import write_coco
from support.tiny_bundle import make_bundle

WITHOUT_TORCH = """
import sys
sys.modules["torch"] = sys.modules["asag_training"] = None
from asag_export.quantize.cli import main
sys.exit(main(sys.argv[1:]))
"""


def add_convolution(model: onnx.ModelProto) -> None:
    """All feature maps come from a convolution that changes nothing."""
    for node in model.graph.node:
        if node.output[0] in ("p2", "p3", "p4", "p5"):
            node.input[0] = "toned"
    weights = np.eye(3, dtype=np.float32)[:, :, None, None]
    model.graph.initializer.append(numpy_helper.from_array(weights, "tones"))
    model.graph.node.insert(0, onnx.helper.make_node("Conv", ["image", "tones"], ["toned"]))


def add_product(model: onnx.ModelProto) -> None:
    """The logits come from a matrix product that changes nothing."""
    (index,) = (i for i, node in enumerate(model.graph.node) if node.output[0] == "logits")
    model.graph.node[index].output[0] = "before"
    model.graph.initializer.append(numpy_helper.from_array(np.eye(3, dtype=np.float32), "classes_of"))
    model.graph.node.insert(index + 1, onnx.helper.make_node("MatMul", ["before", "classes_of"], ["logits"]))


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """The tiny bundle, with something to quantise."""
    made = edit_graph(
        make_bundle(tmp_path / "tiny"), "backbone", add_convolution, tmp_path / "with-convolution"
    )
    return edit_graph(made, "decoder", add_product, tmp_path / "bundle")


@pytest.fixture
def command(bundle: Bundle, tmp_path: Path) -> list[str]:
    """What quantises it, calibrated and measured on a data set."""
    categories = [dataclasses.asdict(category) for category in bundle.manifest.categories]
    pictures = [draw_doodles(64, 80, seed) for seed in range(8)]
    boxes = [{"image_id": 1, "bbox": [10, 10, 50, 40], "category_id": categories[0]["id"]}]
    for split, count in (("train2017", 8), ("val2017", 2)):
        write_coco(tmp_path / "data", boxes, split=split, pictures=pictures[:count], categories=categories)
    return [str(bundle.path), "--data", str(tmp_path / "data"), "--output-dir", str(tmp_path / "int8")]


def test_without_pytorch(command: list[str], tmp_path: Path) -> None:
    """Calibration, the quantised graphs, and AP before and after."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *command, "--max-loss", "1"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "1 convolutions and 1 matrix products in int8, calibrated on 8 pictures" in done.stdout
    assert "AP on 2 images, onnxruntime: float32 " in done.stdout
    manifest = Bundle.open(tmp_path / "int8").manifest
    assert (manifest.precision_of("backbone"), manifest.precision_of("probe_p4")) == ("int8", "fp32")


def test_accuracy_that_falls_too_far(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--max-loss", "-1"]) == 1
    assert "AP falls from" in capsys.readouterr().err
    assert not (tmp_path / "int8").exists()


def test_without_onnx(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("bundle_quantization", "graph_quantization", "placement"):
        monkeypatch.delitem(sys.modules, f"asag_export.quantize.{module}", raising=False)
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert main([str(bundle.path), "--images", "x", "--output-dir", str(tmp_path / "int8")]) == 2
    assert capsys.readouterr().err == (
        "asag-quantize: error: quantising needs the package onnx; "
        "install it with `pip install 'asag-deploy[quantize]'`\n"
    )
