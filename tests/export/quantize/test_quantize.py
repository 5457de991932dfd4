"""`asag-quantize`: what an INT8 bundle holds and computes, what it costs, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from asag_deploy.backends import BACKENDS, open_network
from asag_deploy.bundle.bundle import Bundle, write_bundle
from asag_deploy.detector import Detector
from asag_deploy.engines.build import BuildOptions, build_engines
from asag_deploy.errors import ConfigError, Problem
from asag_deploy.kernels.cpu import CPU_LIBRARY_VARIABLE
from asag_evaluation.data.doodles import draw_doodles
from asag_export.quantize import graph_quantization
from asag_export.quantize.bundle_quantization import check_quantizable, quantize_bundle
from asag_export.quantize.calibration import stage_inputs
from asag_export.quantize.cli import main
from asag_export.quantize.cost import signal_to_noise
from asag_export.quantize.placement import feature_nodes, product_nodes, settle_weights
from support.bundle_edits import edit_graph
from support.coco_files import write_coco

PICTURES = 8
SHAPE = (160, 224)
CONVOLUTIONS = 61
PRODUCTS = 3


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of scenes."""
    folder = tmp_path_factory.mktemp("calibration")
    for seed in range(PICTURES):
        write_picture(folder / f"{seed}.png", draw_doodles(*SHAPE, seed))
    return folder


def write_picture(path: Path, image: Any) -> None:
    assert cv2.imwrite(str(path), cv2.cvtColor(image, cv2.COLOR_RGB2BGR))


@pytest.fixture(scope="module")
def int8_bundle(small_bundle: Bundle, pictures: Path, shared_bundle: Callable[..., Bundle]) -> Bundle:
    def quantize(path: Path) -> None:
        options = ["--images", str(pictures), "--output-dir", str(path), "--quiet"]
        assert main([str(small_bundle.path), *options]) == 0

    return shared_bundle("int8", quantize)


def quantizers(bundle: Bundle) -> list[onnx.NodeProto]:
    model = onnx.load(bundle.graph_path("backbone"))
    return [node for node in model.graph.node if node.op_type == "QuantizeLinear"]


def noise(bundle: Bundle, quantized: Bundle, stage: str = "backbone") -> float:
    """The signal-to-noise ratio of a stage's worst result in decibels."""
    inputs = stage_inputs(bundle, stage, [draw_doodles(*SHAPE, 0)])
    return min(signal_to_noise(bundle, quantized, stage, inputs).values())


def test_what_is_quantised(small_bundle: Bundle, int8_bundle: Bundle) -> None:
    manifest = int8_bundle.manifest
    assert manifest.precision == "int8"
    assert manifest.parity["passed"] is True
    assert manifest.parity["quantization"]["convolutions"] == CONVOLUTIONS
    assert manifest.parity["float32"] == small_bundle.manifest.parity
    model = onnx.load(int8_bundle.graph_path("backbone"))
    producers = {output: node.op_type for node in model.graph.node for output in node.output}
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    both = [all(producers.get(name) == "DequantizeLinear" for name in c.input[:2]) for c in convolutions]
    assert both.count(True) == CONVOLUTIONS
    assert both.count(False) == 3, "those of the anchor generator"
    assert len(model.functions) == 0
    for name in ("normalize", "probe_p4", "probe_p3"):
        original = small_bundle.manifest.graph(name)
        assert manifest.graph(name) == dataclasses.replace(original, precision="fp32")
    assert manifest.precision_of("backbone") == manifest.precision_of("decoder") == "int8"


def test_the_decoder_keeps_its_light_products_in_float32(small_bundle: Bundle, int8_bundle: Bundle) -> None:
    assert int8_bundle.manifest.parity["quantization"]["products"] == PRODUCTS
    model = onnx.load(int8_bundle.graph_path("decoder"))
    constants = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    producers = {output: node for node in model.graph.node for output in node.output}
    products = [node for node in model.graph.node if node.op_type == "MatMul"]
    linear = [node for node in products if is_linear(producers.get(node.input[1]))]
    assert len(linear) == PRODUCTS
    assert all(is_linear(producers[node.input[0]]) for node in linear)
    weights = [constants[producers[node.input[1]].input[0]] for node in linear]
    scales = [constants[producers[node.input[1]].input[1]] for node in linear]
    assert [scale.shape for scale in scales] == [weight.shape[1:] for weight in weights]
    light = [constants[node.input[1]] for node in products if node.input[1] in constants]
    assert len(light) == 21
    assert max(weight.size for weight in light) < min(weight.size for weight in weights)
    results = {
        reader.op_type for reader in model.graph.node if set(reader.input) & {n.output[0] for n in linear}
    }
    assert "QuantizeLinear" not in results, "sums and attention are in float32"
    # Nor is a weight there twice: as it was, and in eight bits.
    saved = 3 * sum(weight.size for weight in weights)
    before, after = (b.graph_path("decoder").stat().st_size for b in (small_bundle, int8_bundle))
    assert before - after == pytest.approx(saved, rel=0.05)
    assert noise(small_bundle, int8_bundle, "decoder") > 30


def is_linear(node: onnx.NodeProto | None) -> bool:
    return node is not None and node.op_type == "DequantizeLinear"


def test_weights_that_the_graph_moves_itself() -> None:
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    names = {"model.weight": weight, "shape": np.array([1, 3, 2]), "other": weight}
    nodes = [
        onnx.helper.make_node("Reshape", ["model.weight", "shape"], ["reshaped"]),
        onnx.helper.make_node("Transpose", ["reshaped"], ["moved"], perm=[0, 2, 1]),
        onnx.helper.make_node("MatMul", ["x", "moved"], ["product"]),
        onnx.helper.make_node("Reshape", ["x", "shape"], ["also"]),
    ]
    x, product, also = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        for name in ("x", "product", "also")
    )
    constants = [numpy_helper.from_array(array, name) for name, array in names.items()]
    graph = onnx.helper.make_graph(nodes, "decoder", [x], [product, also], constants)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)])
    settle_weights(model)
    assert [node.op_type for node in model.graph.node] == ["MatMul", "Reshape"]
    left = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    assert set(left) == {"shape", "moved"}
    np.testing.assert_array_equal(left["moved"], weight.reshape(1, 3, 2).transpose(0, 2, 1))
    (product_node,) = product_nodes(model)
    assert product_node.input[1] == "moved"
    del model.graph.node[0]
    with pytest.raises(ConfigError, match="the graph 'decoder' multiplies by no weights"):
        product_nodes(model)


def test_an_encoder_after_the_convolutions_stays_as_it_is() -> None:
    """Of its layers' sums and activations none is of a map that convolutions have made."""
    model = onnx.parser.parse_model("""
    <ir_version: 10, opset_import: ["" : 20]>
    backbone (float[b, 3, h, w] image) => (float[b, n, m, 4] p5, float[b, 4] other) {
        first = Conv (image, kernel)
        rectified = Relu (first)
        second = Conv (rectified, other_kernel)
        both = Add (second, rectified)
        cells = Transpose <perm = [0, 2, 3, 1]> (both)
        product = MatMul (cells, weight)
        biased = Add (product, bias)
        inner = Relu (biased)
        more = MatMul (inner, weight)
        p5 = Add (more, cells)
        place = ReduceMean <keepdims = 0> (image, axes)
        other = Relu (place)
    }
    """)
    found = feature_nodes(model)
    assert [node.output[0] for node in found] == ["first", "rectified", "second", "both"]


def test_scales_are_symmetric_and_weights_have_one_per_channel(int8_bundle: Bundle) -> None:
    model = onnx.load(int8_bundle.graph_path("backbone"))
    constants = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    linear = [n for n in model.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    for node in linear:
        zero = constants[node.input[2]]
        assert zero.dtype == np.int8
        assert not zero.any()
    weights = [constants[n.input[0]] for n in linear if n.input[0] in constants]
    scales = [constants[n.input[1]] for n in linear if n.input[0] in constants]
    assert len(weights) == CONVOLUTIONS
    for weight, scale in zip(weights, scales, strict=True):
        assert scale.shape == weight.shape[:1]
        assert np.abs(weight.reshape(len(weight), -1)).max() == 127


def test_a_relu_and_what_goes_into_it_share_a_scale(int8_bundle: Bundle) -> None:
    model = onnx.load(int8_bundle.graph_path("backbone"))
    scales = {node.input[0]: node.input[1] for node in quantizers(int8_bundle)}
    values = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    sources = {node.output[0]: node.input[0] for node in model.graph.node if "Linear" in node.op_type}
    relus = [node for node in model.graph.node if node.op_type == "Relu" and node.input[0] in sources]
    assert len(relus) == 49
    for relu in relus:
        before = sources[sources[relu.input[0]]]
        assert values[scales[before]] == values[scales[relu.output[0]]]


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "openvino-bf16"])
def test_every_backend_detects_with_it(backend: str, small_bundle: Bundle, int8_bundle: Bundle) -> None:
    missing = BACKENDS[backend].problem()
    if missing is not None:
        pytest.skip(str(missing))
    scene = draw_doodles(*SHAPE, 1)
    with Detector.load(small_bundle) as full, Detector.load(int8_bundle, backend=backend) as quantized:
        expected, actual = full(scene, channel_order="rgb"), quantized(scene, channel_order="rgb")
    assert len(actual) == len(expected)
    np.testing.assert_allclose(actual.confidence, expected.confidence, atol=0.05)


@pytest.mark.parametrize(
    ("stage", "layer", "count"),
    [("backbone", "Convolution", CONVOLUTIONS), ("decoder", "FullyConnected", PRODUCTS)],
)
def test_openvino_multiplies_bytes(stage: str, layer: str, count: int, int8_bundle: Bundle) -> None:
    openvino = pytest.importorskip("openvino", reason="needs OpenVINO")
    network: Any = open_network("openvino", int8_bundle, threads=1)
    loaded = network.stage(stage)
    runtime = getattr(loaded, "_any_size", loaded)._model.get_runtime_model()
    kinds = [
        node.get_rt_info()["runtimePrecision"].astype(str)
        for node in runtime.get_ops()
        if layer in node.get_rt_info()["layerType"].astype(str)
    ]
    assert kinds.count("u8") + kinds.count("i8") == count, (kinds, openvino.get_version())


@pytest.mark.parametrize("backend", ["openvino", "openvino-bf16"])
def test_openvino_hands_maps_to_compiled_operators_as_integers(
    backend: str, int8_bundle: Bundle, host_library_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = BACKENDS[backend].problem()
    if missing is not None:
        pytest.skip(str(missing))
    scene = draw_doodles(*SHAPE, 1)
    with Detector.load(int8_bundle, backend=backend, threads=1) as detector:
        expected = detector(scene, channel_order="rgb")
    monkeypatch.setenv(CPU_LIBRARY_VARIABLE, str(host_library_path))
    network = open_network(backend, int8_bundle, threads=1)
    inputs = stage_inputs(int8_bundle, "backbone", [scene])
    (image,) = ({name: network.upload(value) for name, value in each.items()} for each in inputs)
    made = network.stage("backbone")(image)
    assert [name for name, array in made.items() if array.scale is not None] == ["p2", "p5"]
    with Detector.load(int8_bundle, backend=backend, threads=1) as detector:
        found = detector(scene, channel_order="rgb")
    assert len(found) == len(expected) > 0
    np.testing.assert_allclose(found.confidence, expected.confidence, atol=0.02)  # those maps are rounded


def test_a_wrong_scale_or_zero_point_is_noise(
    small_bundle: Bundle, int8_bundle: Bundle, tmp_path: Path
) -> None:
    assert noise(small_bundle, int8_bundle) > 15
    scale = quantizers(int8_bundle)[4].input[1]
    zero_point = quantizers(int8_bundle)[4].input[2]

    def change(name: str, by: Callable[[Any], Any]) -> Callable[[onnx.ModelProto], None]:
        def edit(model: onnx.ModelProto) -> None:
            (found,) = (item for item in model.graph.initializer if item.name == name)
            found.CopyFrom(numpy_helper.from_array(by(numpy_helper.to_array(found)), name))

        return edit

    small = edit_graph(int8_bundle, "backbone", change(scale, lambda s: s / 16), tmp_path / "scale")
    assert noise(small_bundle, small) < 10
    moved = edit_graph(
        int8_bundle, "backbone", change(zero_point, lambda z: z + np.int8(100)), tmp_path / "zero"
    )
    assert noise(small_bundle, moved) < 10


def test_wrong_ranges_fail_the_gate(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calibrate = graph_quantization._calibrate

    def far_too_narrow(*arguments: Any) -> Any:
        ranges = calibrate(*arguments)
        for found in ranges.data.values():
            found.lowest, found.highest = found.lowest / 64, found.highest / 64
        return ranges

    monkeypatch.setattr(graph_quantization, "_calibrate", far_too_narrow)
    assert main([*command, "--quiet"]) == 1
    message = capsys.readouterr().err
    assert message.startswith("asag-quantize: error: quantising costs too much: 'p2' has")
    assert not (tmp_path / "int8").exists()
    assert main([*command, "--keep-failed"]) == 1
    assert "FAILED: 'p2' has" in capsys.readouterr().out
    assert Bundle.open(tmp_path / "int8").manifest.parity["passed"] is False


def test_uint8_for_the_cpu_and_what_accuracy_it_has(
    small_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    categories = [dataclasses.asdict(category) for category in small_bundle.manifest.categories]
    scenes = [draw_doodles(*SHAPE, seed) for seed in range(PICTURES)]
    boxes = [{"image_id": 1, "bbox": [10, 10, 50, 40], "category_id": categories[0]["id"]}]
    for split, count in (("train2017", PICTURES), ("val2017", 2)):
        write_coco(tmp_path / "data", boxes, split=split, pictures=scenes[:count], categories=categories)
    command = [str(small_bundle.path), "--data", str(tmp_path / "data"), "--activations", "uint8"]
    assert main([*command, "--output-dir", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert (
        "61 convolutions and 3 matrix products in int8, calibrated on 8 pictures, activations uint8" in shown
    )
    assert "AP on 2 images, onnxruntime: before " in shown
    bundle = Bundle.open(tmp_path / "out")
    (pair,) = bundle.manifest.parity["quantization"]["accuracy"]
    assert pair["loss"] == pytest.approx(pair["float32"] - pair["int8"])
    model = onnx.load(bundle.graph_path("backbone"))
    kinds = {item.name: item.data_type for item in model.graph.initializer}
    assert {kinds[node.input[2]] for node in quantizers(bundle)} == {onnx.TensorProto.UINT8}
    assert noise(small_bundle, bundle) > 15


def test_tensorrt_rtx_compiles_it(int8_bundle: Bundle, small_bundle: Bundle, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX: pip install tensorrt-rtx")
    with write_bundle(tmp_path / "copy") as writer:
        for graph in int8_bundle.manifest.graphs:
            content = int8_bundle.graph_path(graph.name).read_bytes()
            writer.add_graph(graph.name, content, inputs=graph.inputs, outputs=graph.outputs)
        bundle = writer.finish(int8_bundle.manifest)
    only = tuple(graph for graph in bundle.manifest.graphs if graph.name in ("backbone", "decoder"))
    bundle = Bundle(path=tmp_path / "copy", manifest=dataclasses.replace(bundle.manifest, graphs=only))
    report = build_engines(bundle, BuildOptions(gpus=("sm89",), precision="int8"))
    recipes = [json.loads(engine.with_suffix(".json").read_text())["recipe"] for engine in report.built]
    assert [recipe["precision"] for recipe in recipes] == ["int8", "int8"]


def fill(folder: Path, images: list[Any]) -> Path:
    folder.mkdir()
    for i, image in enumerate(images):
        write_picture(folder / f"{i}.png", image)
    return folder


def refused(bundle: Bundle, output: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """The one sentence with which a command is refused."""
    assert main([str(bundle.path), "--output-dir", str(output), *options]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert not output.exists()
    assert shown.err.startswith("asag-quantize: error: ")
    assert shown.err.count("\n") == 1
    return shown.err


def test_unsuitable_pictures(
    small_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def ask(folder: Path) -> str:
        return refused(small_bundle, tmp_path / "out", capsys, "--images", str(folder))

    scene = draw_doodles(*SHAPE, 0)
    (tmp_path / "empty").mkdir()
    assert "no images" in ask(tmp_path / "empty")
    assert "there is no picture or folder 'nowhere'; check the path" in ask(Path("nowhere"))
    beside = ["--images", str(fill(tmp_path / "one", [scene])), "nowhere.png"]
    assert "there is no picture or folder 'nowhere.png'" in refused(
        small_bundle, tmp_path / "out", capsys, *beside
    )
    assert "there is 1 picture to calibrate on; give 8 or more" in ask(tmp_path / "one")
    assert "there are 3 pictures to calibrate on; give 8 or more" in ask(fill(tmp_path / "few", [scene] * 3))
    plain = [np.full((*SHAPE, 3), i * 9, np.uint8) for i in range(5)]
    assert "5 of the 9 calibration pictures are of one colour" in ask(
        fill(tmp_path / "plain", [*plain, *(draw_doodles(*SHAPE, seed) for seed in range(4))])
    )
    assert "only 1 of the 9 calibration pictures differ" in ask(fill(tmp_path / "same", [scene] * 9))
    damaged = fill(tmp_path / "damaged", [draw_doodles(*SHAPE, seed) for seed in range(8)])
    (damaged / "3.png").write_bytes(b"no picture")
    assert "3.png" in ask(damaged)
    lost = ["--images", str(tmp_path / "empty"), str(tmp_path / "plain")]
    assert f"'{tmp_path / 'empty'}' holds no images" in refused(small_bundle, tmp_path / "out", capsys, *lost)


def test_pictures_in_which_a_trained_network_finds_nothing(
    small_bundle: Bundle, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def silence(model: onnx.ModelProto) -> None:
        (scores,) = (node for node in model.graph.node if "det_scores" in node.output)
        scores.output[list(scores.output).index("det_scores")] = "loud"
        model.graph.initializer.append(numpy_helper.from_array(np.array(1e-3, np.float32), "quieter"))
        model.graph.node.append(onnx.helper.make_node("Mul", ["loud", "quieter"], ["det_scores"]))

    quiet = edit_graph(small_bundle, "decoder", silence, tmp_path / "quiet")
    with write_bundle(tmp_path / "trained") as writer:
        for graph in quiet.manifest.graphs:
            content = quiet.graph_path(graph.name).read_bytes()
            writer.add_graph(graph.name, content, inputs=graph.inputs, outputs=graph.outputs)
        trained = writer.finish(dataclasses.replace(quiet.manifest, trained=True))
    trained = Bundle.open(tmp_path / "trained")
    message = refused(trained, tmp_path / "out", capsys, "--images", str(pictures))
    assert "the network finds nothing (score 0.05 or more) in any of the 8 calibration pictures" in message


@pytest.mark.parametrize("most_loss", [-0.001, 2, float("nan")])
def test_a_loss_that_is_none(small_bundle: Bundle, tmp_path: Path, most_loss: float) -> None:
    with pytest.raises(ConfigError, match=f"most_loss is {most_loss}; expected 0 to 1"):
        quantize_bundle(small_bundle, tmp_path / "out", [], most_loss=most_loss)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "there is nothing to calibrate on; give --images PATH or --data DIR"),
        (("--images", "x", "--activations", "int4"), "unknown activations 'int4'; choose one of int8, uint8"),
        (("--images", "x", "--limit", "0"), "--limit is 0"),
        *(
            (("--data", "x", "--max-loss", loss), f"--max-loss is {loss}; it must be from 0 to 1")
            for loss in ("-1", "-0.001", "2", "nan")
        ),
        (("--data", "x", "--backend", "gpu"), "unknown backend 'gpu'; choose one of onnxruntime"),
        (("--data", "nowhere"), "there is no data folder 'nowhere'"),
    ],
)
def test_options_that_make_no_sense(
    options: tuple[str, ...],
    message: str,
    small_bundle: Bundle,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert message in refused(small_bundle, tmp_path / "out", capsys, *options)


def test_what_is_refused_before_pictures_are_read(
    small_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The data set is not even there, and nothing can be looked for in it."""
    data = ("--data", "nowhere")
    assert "3 pictures are asked for" in refused(
        small_bundle, tmp_path / "out", capsys, *data, "--count", "3"
    )
    missing = Problem("it is not installed", "install it")
    monkeypatch.setattr(type(BACKENDS["openvino"]), "problem", lambda self: missing)
    message = refused(small_bundle, tmp_path / "out", capsys, *data, "--backend", "openvino")
    assert "the backend 'openvino' cannot run on this machine" in message
    made = tmp_path / "made"
    shutil.copytree(small_bundle.path, made)
    assert main([str(small_bundle.path), *data, "--output-dir", str(made)]) == 2
    assert (
        "already exists; choose another directory, or replace it with --overwrite" in capsys.readouterr().err
    )


def test_bundles_that_cannot_be_quantised(
    small_bundle: Bundle,
    int8_bundle: Bundle,
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ("--images", str(pictures))
    assert "is quantised already" in refused(int8_bundle, tmp_path / "out", capsys, *options)
    half = dataclasses.replace(small_bundle.manifest, precision="fp16")
    with pytest.raises(ConfigError, match="are fp16, and ranges are measured in float32"):
        check_quantizable(dataclasses.replace(small_bundle, manifest=half))
    assert "3 pictures are asked for" in refused(
        small_bundle, tmp_path / "out", capsys, *options, "--count", "3"
    )
