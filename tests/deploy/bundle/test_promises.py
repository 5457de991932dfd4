"""A bundle that loads does what its manifest says: every graph has the inputs and outputs that it names."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from asag_deploy import Detector
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.detect.cli import main
from asag_deploy.errors import AsagError, BackendError, BundleCorruptError, EngineStaleError
from support.bundle_edits import edit_graph
from support.simulated_gpu.fake_gpu import install_gpu, write_engines
from support.tiny_bundle import make_bundle, picture

GraphEdit = Callable[[onnx.ModelProto], None]
ManifestEdit = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("promises") / "bundle")


def rename_output(model: onnx.ModelProto) -> None:
    output = model.graph.output[-1]
    model.graph.node.append(helper.make_node("Identity", [output.name], ["renamed"]))
    output.name = "renamed"


def rename_input(model: onnx.ModelProto) -> None:
    old = model.graph.input[0].name
    model.graph.input[0].name = "renamed"
    for node in model.graph.node:
        node.input[:] = ["renamed" if name == old else name for name in node.input]


def change_output(operator: str, kind: int, shape: list[int | str], **attributes: Any) -> GraphEdit:
    """Put an operator behind the last output, which keeps its name."""

    def change(model: onnx.ModelProto) -> None:
        output = model.graph.output[-1]
        for node in model.graph.node:
            node.output[:] = ["before" if name == output.name else name for name in node.output]
            node.input[:] = ["before" if name == output.name else name for name in node.input]
        inputs = ["before"]
        if operator == "Unsqueeze":
            model.graph.initializer.append(numpy_helper.from_array(np.array([0]), "first_axis"))
            inputs.append("first_axis")
        model.graph.node.append(helper.make_node(operator, inputs, [output.name], **attributes))
        output.CopyFrom(helper.make_tensor_value_info(output.name, kind, shape))

    return change


def fix_batch(model: onnx.ModelProto) -> None:
    for value in model.graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = 1


def add_output(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Identity", [model.graph.output[0].name], ["more"]))
    model.graph.output.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, None))
    model.graph.output[-1].type.CopyFrom(model.graph.output[0].type)


def give_input_a_value(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.ones((1,), np.float32), "preset"))
    model.graph.input.append(helper.make_tensor_value_info("preset", TensorProto.FLOAT, [1]))


LIES: dict[str, tuple[str, GraphEdit, str]] = {
    "renamed output": ("decoder", rename_output, "it has no output 'det_boxes' (but renamed)"),
    "renamed input": ("probe_p4", rename_input, "it has no input 'feature' (but renamed)"),
    "type": (
        "probe_p3",
        change_output("Cast", TensorProto.INT32, ["batch", 4], to=TensorProto.INT32),
        "its output 'counts' is int32, not int64",
    ),
    "rank": (
        "normalize",
        change_output("Unsqueeze", TensorProto.FLOAT, [1, "batch", 3, "height", "width"]),
        "its output 'image' has the shape (1, ",
    ),
    "fixed size": ("backbone", fix_batch, "its input 'image' has the shape (1, 3, "),
    "extra output": ("backbone", add_output, "it has an output 'more' beside those"),
    "preset input": ("decoder", give_input_a_value, "it has an input 'preset' beside those"),
}


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("lie", LIES)
def test_a_graph_that_is_not_what_the_manifest_says(
    bundle: Bundle, backend: str, lie: str, tmp_path: Path
) -> None:
    """Its checksum is right: what wrote the manifest had another graph in mind."""
    name, edit, sentence = LIES[lie]
    if (backend, lie) == ("openvino", "preset input"):
        pytest.skip("to OpenVINO it is a constant")
    other = edit_graph(bundle, name, edit, tmp_path / "other")
    with pytest.raises(BundleCorruptError) as error:
        Detector.load(other, backend=backend)
    assert sentence in str(error.value)
    assert f"{name}.onnx' is not the graph that manifest.json describes" in str(error.value)
    assert "asag-export" in str(error.value)


def test_the_program_says_so(bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = edit_graph(bundle, "decoder", rename_output, tmp_path / "other")
    cv2.imwrite(str(tmp_path / "photo.png"), picture(3))
    assert main([str(other.path), str(tmp_path / "photo.png")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("asag-detect: error: ")
    assert "no output 'det_boxes'" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("lie", ["renamed output", "type", "rank"])
def test_an_engine_that_is_not_what_the_manifest_says(
    bundle: Bundle, lie: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Engine and sidecar belong together, but the engine is of another graph."""
    install_gpu(monkeypatch)
    name, edit, sentence = LIES[lie]
    other = edit_graph(bundle, name, edit, tmp_path / "other")
    write_engines(other)
    shutil.copytree(bundle.path, tmp_path / "mixed")
    shutil.copytree(other.path / "engines", tmp_path / "mixed" / "engines")
    wrong, right = other.manifest.graph(name).sha256, bundle.manifest.graph(name).sha256
    sidecar = next((tmp_path / "mixed" / "engines").rglob(f"{name}.json"))
    key = '"graph_sha256": '  # the simulated engine is the graph itself
    sidecar.write_text(sidecar.read_text().replace(f'{key}"{wrong}', f'{key}"{right}'))
    with pytest.raises(EngineStaleError) as error:
        Detector.load(tmp_path / "mixed", backend="tensorrt-rtx")
    assert sentence.partition(" (")[0] in str(error.value)
    assert "asag-build" in str(error.value)


def newer_operators(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 99


def newer_format(model: onnx.ModelProto) -> None:
    model.ir_version = 99


def foreign_operator(model: onnx.ModelProto) -> None:
    model.graph.node[0].domain = "com.elsewhere"
    model.opset_import.append(helper.make_opsetid("com.elsewhere", 1))


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (newer_operators, "was written for a newer ONNX Runtime than"),
        (newer_format, "was written for a newer ONNX Runtime than"),
        (foreign_operator, "it uses 'com.elsewhere:"),
    ],
)
def test_a_graph_for_another_library(bundle: Bundle, edit: GraphEdit, sentence: str, tmp_path: Path) -> None:
    other = edit_graph(bundle, "decoder", edit, tmp_path / "other")
    with pytest.raises(BackendError, match=r"pip install --upgrade onnxruntime") as error:
        Detector.load(other)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_weights_that_lie_outside_of_what_is_verified(bundle: Bundle, tmp_path: Path) -> None:
    """Nobody would notice that they were altered; where they are missing, the backend says so."""
    model = onnx.load(bundle.graph_path("backbone"))
    onnx.save(
        model, tmp_path / "backbone.onnx", save_as_external_data=True, location="w.bin", size_threshold=0
    )
    outside = onnx.load(tmp_path / "backbone.onnx", load_external_data=False)
    other = edit_graph(bundle, "backbone", lambda each: each.CopyFrom(outside), tmp_path / "other")
    with pytest.raises(BackendError, match=r"backbone\.onnx': .*External data"):
        Detector.load(other)
    shutil.copy(tmp_path / "w.bin", other.path)
    with pytest.raises(BundleCorruptError, match=r"backbone\.onnx' has weights in another file"):
        Detector.load(other.path)
    noted = Path(shutil.copytree(bundle.path, tmp_path / "noted"))
    (noted / "notes.txt").touch()
    assert Bundle.open(noted).manifest == bundle.manifest


def output_of(graph: int, name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def find(data: dict[str, Any]) -> dict[str, Any]:
        tensors = data["graphs"][graph]["inputs"] + data["graphs"][graph]["outputs"]
        found: dict[str, Any] = next(tensor for tensor in tensors if tensor["name"] == name)
        return found

    return find


NORMALIZE, BACKBONE, PROBE_P4, DECODER = 0, 1, 2, 4


def take_p2_of_nobody(data: dict[str, Any]) -> None:
    """Light networks have no P2; a decoder that wants it is another network's."""
    p2 = output_of(BACKBONE, "p2")(data)
    data["graphs"][BACKBONE]["outputs"].remove(p2)
    data["graphs"][DECODER]["inputs"].append(p2)


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (
            lambda d: output_of(DECODER, "det_boxes")(d).update(name="b"),
            "'decoder' has no output 'det_boxes'",
        ),
        (lambda d: output_of(DECODER, "boxes")(d).update(name="logits"), "has no output 'boxes'"),
        (lambda d: output_of(BACKBONE, "p3")(d).update(name="p1"), "'backbone' has no output 'p3'"),
        (take_p2_of_nobody, "'decoder' takes 'p2', which nothing gives it"),
        (lambda d: output_of(PROBE_P4, "feature")(d).update(name="x"), "takes 'x', which nothing gives it"),
        (lambda d: output_of(PROBE_P4, "slots")(d).update(name="feature"), "has no input 'slots'"),
        (
            lambda d: output_of(PROBE_P4, "counts")(d).update(dtype="int32"),
            "is int32 (batch, 4), expected int64",
        ),
        (
            lambda d: output_of(BACKBONE, "p4")(d).update(shape=["batch", 3]),
            "'p4' of the graph 'backbone' is",
        ),
        (
            lambda d: output_of(BACKBONE, "image")(d)["shape"].__setitem__(0, 1),
            "expected float32 (any size, 3,",
        ),
        (
            lambda d: output_of(BACKBONE, "p4")(d)["shape"].__setitem__(1, 9),
            "gives 'p4' as float32 (batch, 9,",
        ),
        (lambda d: output_of(DECODER, "probed")(d)["shape"].__setitem__(1, 1), "expected bool (any size, 2)"),
        (lambda d: d["probing"]["levels"][0].update(capacity=7), "expected int64 (any size, 7, 2)"),
        (lambda d: d["probing"].update(anchor_floor=21, anchor_cap=24), "first level has 20 anchors"),
        (lambda d: d.update(precision="fp16"), "'p2' of the graph 'backbone' is float32"),
    ],
)
def test_stages_that_do_not_fit_together(
    bundle: Bundle, edit: ManifestEdit, sentence: str, tmp_path: Path
) -> None:
    path = changed(bundle, edit, tmp_path)
    with pytest.raises(BundleCorruptError) as error:
        Detector.load(path)
    assert sentence in str(error.value)
    assert str(error.value).startswith(f"in '{path / 'manifest.json'}', ")


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (lambda d: d["preprocessing"].update(std=[1, 0, 1]), "`preprocessing.std[1]` is 0.0"),
        (lambda d: d["preprocessing"].update(mean=[1, 2]), "`preprocessing.mean` has 2 values, expected 3"),
        (lambda d: d["preprocessing"].update(mean=[1, 2, "3"]), "expected a number"),
        (lambda d: d["preprocessing"].update(longer_side=10**6), "expected at most 32767"),
        (lambda d: d["preprocessing"].update(size_divisor=10**30), "expected at most 32767"),
        (lambda d: d["probing"].update(anchor_floor=25), "`probing.anchor_floor` is 25, expected at most 24"),
        (lambda d: d["probing"].update(patch_nms_iou=1.5), "`probing.patch_nms_iou` is 1.5"),
        (lambda d: d["probing"].update(max_candidates=0), "`probing.max_candidates` is 0"),
        (lambda d: d["probing"]["levels"][1].update(stride=16), "`probing.levels[1].stride` is 16"),
        (lambda d: d["postprocessing"].update(max_detections=0), "`postprocessing.max_detections` is 0"),
        (lambda d: d["postprocessing"].update(nms_iou=2), "`postprocessing.nms_iou` is 2.0"),
        (lambda d: d["categories"][1].update(id=10), "`categories[1].id` is 10, as that of `categories[0]`"),
        (lambda d: d["categories"][2].update(name=" \n"), "`categories[2].name` is"),
        (lambda d: d["categories"][2].update(id=2**70), "expected at most"),
        (
            lambda d: d["graphs"].append({**d["graphs"][0], "name": "probe_p2"}),
            "is 'probe_p2', but the stages",
        ),
        (lambda d: d["graphs"][0].update(file="a\0b"), "expected a file inside the bundle"),
        (lambda d: d["graphs"][0].update(file="\ud800"), "expected a file inside the bundle"),
        (lambda d: d.update(schema_version=True), "expected a whole number"),
    ],
)
def test_a_manifest_that_cannot_be(bundle: Bundle, edit: ManifestEdit, sentence: str, tmp_path: Path) -> None:
    path = changed(bundle, edit, tmp_path)
    with pytest.raises(AsagError) as error:
        Bundle.open(path)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_a_field_that_stands_twice(bundle: Bundle, tmp_path: Path) -> None:
    shutil.copytree(bundle.path, tmp_path / "other")
    file = tmp_path / "other" / "manifest.json"
    file.write_text(file.read_text().replace('"trained"', '"trained": true, "trained"'))
    with pytest.raises(BundleCorruptError, match="`trained` stands there twice"):
        Bundle.open(tmp_path / "other")


@pytest.mark.parametrize("name", ["manifest.json", "decoder.onnx"])
def test_a_pipe_in_the_place_of_a_file(bundle: Bundle, name: str, tmp_path: Path) -> None:
    """Reading it would never end."""
    shutil.copytree(bundle.path, tmp_path / "other")
    (tmp_path / "other" / name).unlink()
    os.mkfifo(tmp_path / "other" / name)
    with pytest.raises(BundleCorruptError, match="no regular file"):
        Bundle.open(tmp_path / "other")


def test_files_that_are_links(bundle: Bundle, tmp_path: Path) -> None:
    """Caches of downloaded models are made of them; the checksum says whether they lead to the right file."""
    (tmp_path / "other").mkdir()
    for file in bundle.path.glob("*.*"):
        (tmp_path / "other" / file.name).symlink_to(file)
    with Detector.load(tmp_path / "other") as detector:
        assert detector(picture(3), channel_order="rgb").trace.exit_level == "P4"


def changed(bundle: Bundle, edit: ManifestEdit, tmp_path: Path) -> Path:
    """A copy of the bundle whose manifest says something else."""
    shutil.copytree(bundle.path, tmp_path / "other")
    file = tmp_path / "other" / "manifest.json"
    data = json.loads(file.read_text())
    edit(data)
    file.write_text(json.dumps(data))
    return tmp_path / "other"
