"""The OpenVINO backend, beyond what every backend does (`test_backends.py`)."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from asag_deploy.backends import BACKENDS, open_network
from asag_deploy.backends.compiled_cache import CompiledCache, cache_folder
from asag_deploy.backends.hooked_network import HookedNetwork
from asag_deploy.backends.openvino import backend as openvino
from asag_deploy.backends.openvino import models
from asag_deploy.backends.openvino.backend import OpenVinoArray
from asag_deploy.backends.openvino.compiled import Compiled
from asag_deploy.backends.openvino.precision import keep_coordinates_precise
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.bundle.manifest import GraphSpec, TensorSpec
from asag_deploy.detector import Detector
from asag_deploy.errors import BackendError
from asag_deploy.loop.probing import detect
from asag_deploy.loop.stopping import StopRule
from support.tiny_bundle import backbone, batch, counts, make_bundle, picture, probe_p4_inputs

library = pytest.importorskip("openvino", reason="needs OpenVINO")

SIZES = np.array([[64, 64]], dtype=np.int64)
GRAPHS = 5


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("openvino") / "bundle")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ASAG_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "openvino"


def compilations(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The graphs that are read, and so compiled, from now on."""
    read: list[Path] = []
    original = models.read_graph

    def spy(path: Path) -> Any:
        read.append(path)
        return original(path)

    for module in (openvino, models):
        monkeypatch.setattr(module, "read_graph", spy)
    return read


def test_a_graph_is_compiled_once(bundle: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = compilations(monkeypatch)
    assert counts(open_network("openvino", bundle, threads=1), 3) == [3, 0, 20, 17]
    assert len(read) == len(list(cache.iterdir())) == GRAPHS + 1  # and the backbone for one size
    assert counts(open_network("openvino", bundle, threads=1), 4) == [4, 0, 20, 16]
    assert len(read) == GRAPHS + 1


def test_damaged_cache_recovers(bundle: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_network("openvino", bundle, threads=1)
    flipped, cut, empty, foreign, _ = sorted(cache.iterdir())
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    cut.write_bytes(cut.read_bytes()[:-9])
    empty.write_bytes(b"")
    own = CompiledCache(cache, "any")
    own.write("0", b"of another library, but whole")
    (whole,) = set(cache.iterdir()) - {flipped, cut, empty, foreign, _}
    whole.replace(foreign)

    read = compilations(monkeypatch)
    network = open_network("openvino", bundle, threads=1)
    assert len(read) == 4
    open_network("openvino", bundle, threads=1)
    assert len(read) == 4
    assert counts(network, 3) == [3, 0, 20, 17]


def test_precision_and_version_are_part_of_the_key(tmp_path: Path) -> None:
    first, second = CompiledCache(tmp_path, "2026.4 f32"), CompiledCache(tmp_path, "2026.5 f32")
    first.write("abc", b"compiled")
    assert first.read("abc") == b"compiled"
    assert second.read("abc") is None
    assert first.read("abd") is None


def test_what_was_used_longest_ago_is_deleted(tmp_path: Path) -> None:
    import os

    cache = CompiledCache(tmp_path, "any", most_bytes=3000)
    for age, name in ((30, "old"), (20, "older but used"), (10, "new")):
        cache.write(name, bytes(900))
        os.utime(cache._file(name), (1e9 - age, 1e9 - age))
    assert cache.read("older but used") is not None
    cache.write("newest", bytes(900))
    names = ("old", "older but used", "new", "newest")
    assert [name for name in names if cache.read(name) is None] == ["old"]


def test_without_a_place_to_write_nothing_is_cached(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("ASAG_CACHE_DIR", str(tmp_path / "file"))
    assert counts(open_network("openvino", bundle, threads=1), 3) == [3, 0, 20, 17]


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ASAG_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "asag-deploy"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which counts as none
    assert cache_folder() == tmp_path / ".cache" / "asag-deploy"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == tmp_path / ".cache" / "asag-deploy"


def test_requests_are_used_again(bundle: Bundle, cache: Path) -> None:
    network = open_network("openvino", bundle, threads=1)
    of_one_size: Any = network.stage("backbone")
    for _ in range(5):
        counts(network, 3)
    stage = of_one_size._own
    assert stage._idle.qsize() == 1
    inputs = {"image": network.upload(batch(picture(3))), "image_size": network.upload(SIZES)}
    held = [stage(inputs)["p5"] for _ in range(3)]
    assert stage._idle.qsize() == 0
    del held
    gc.collect()
    assert stage._idle.qsize() == 3


def run_backbone(network: Any, *pictures: NDArray[Any]) -> dict[str, NDArray[Any]]:
    image = batch(*pictures)
    sizes = np.repeat(np.array([image.shape[2:]], dtype=np.int64), len(pictures), axis=0)
    outputs = network.stage("backbone")({"image": network.upload(image), "image_size": network.upload(sizes)})
    return {name: network.download(array) for name, array in outputs.items()}


def test_the_size_that_comes_first_has_a_graph_of_its_own(bundle: Bundle, cache: Path) -> None:
    network = open_network("openvino", bundle, threads=1)
    stage: Any = network.stage("backbone")
    first, second = (run_backbone(network, picture(5, 2)) for _ in range(2))
    own, any_size = stage._own, stage._any_size
    assert (own._idle.qsize(), any_size._idle.qsize()) == (1, 0)
    assert all(not port.get_partial_shape().is_dynamic for port in own._model.inputs)
    pair = run_backbone(network, picture(5, 2), picture(5, 2))
    assert (own._idle.qsize(), any_size._idle.qsize()) == (1, 1)
    again = run_backbone(network, picture(5, 2))
    assert stage._own is own
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name])
        np.testing.assert_array_equal(value, again[name])
        np.testing.assert_array_equal(np.repeat(value, 2, axis=0), pair[name])


def test_a_size_that_comes_more_often_takes_the_graph_over(
    bundle: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = open_network("openvino", bundle, threads=1)
    read = compilations(monkeypatch)
    stage: Any = network.stage("backbone")
    first, pair = (picture(5, 2),), (picture(5, 2), picture(3))
    run_backbone(network, *first)
    expected, own = run_backbone(network, *pair), stage._own
    for _ in range(31):  # a call short of what it takes
        run_backbone(network, *pair)
    assert stage._own is own
    for name, value in run_backbone(network, *pair).items():
        np.testing.assert_array_equal(value, expected[name])
    assert stage._own is not own
    own = stage._own
    assert len(read) == 2
    for _ in range(63):  # the way back is twice as long
        run_backbone(network, *first)
    assert stage._own is own
    run_backbone(network, *first)
    assert stage._own is not own
    assert len(read) == 2  # what was compiled before comes from the cache


def test_another_size_that_cannot_be_compiled_changes_nothing(cache: Path, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    network = open_network("openvino", bundle, threads=1)
    stage: Any = network.stage("backbone")
    run_backbone(network, picture(5, 2))
    own = stage._own
    bundle.graph_path("backbone").write_bytes(bundle.graph_path("decoder").read_bytes())
    for _ in range(32):
        run_backbone(network, picture(5, 2), picture(3))
    with pytest.warns(RuntimeWarning, match="'backbone' is not compiled for its inputs of 2x3x64x64"):
        run_backbone(network, picture(5, 2), picture(3))
    assert stage._own is own


def test_sizes_in_turn_change_nothing_and_few_are_counted(bundle: Bundle, cache: Path) -> None:
    network = open_network("openvino", bundle, threads=1)
    stage: Any = network.stage("backbone")
    run_backbone(network, picture(5, 2))
    own = stage._own
    for number in range(2, 90):
        run_backbone(network, *[picture(5)] * number)
        run_backbone(network, picture(5, 2))
    assert stage._own is own
    assert len(stage._calls) <= 64


def test_threads_that_come_first_wait_for_one_graph(
    bundle: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = open_network("openvino", bundle, threads=1)
    read = compilations(monkeypatch)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: counts(network, 3), range(8)))
    assert found == [[3, 0, 20, 17]] * 8
    assert len(read) == 1


def test_a_bundle_that_was_deleted_serves_on(cache: Path, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    network = open_network("openvino", bundle, threads=1)
    bundle.graph_path("backbone").unlink()
    assert counts(network, 3) == [3, 0, 20, 17]
    stage: Any = network.stage("backbone")
    assert stage._own is not None


def test_a_bundle_that_was_written_to_serves_on_as_it_was(cache: Path, tmp_path: Path) -> None:
    """The graph of one size is made of what was opened, or not at all."""
    bundle = make_bundle(tmp_path / "bundle")
    network = open_network("openvino", bundle, threads=1)
    bundle.graph_path("backbone").write_bytes(bundle.graph_path("decoder").read_bytes())
    with pytest.warns(RuntimeWarning, match="'backbone' is not compiled for its inputs of 1x3x64x64"):
        assert counts(network, 3) == [3, 0, 20, 17]
    assert counts(network, 4) == [4, 0, 20, 16]


def test_features_are_not_copied(bundle: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop brings nothing to the host but counts and what NMS needs, and casts nothing."""
    network = open_network("openvino", bundle, threads=1)
    shapes: list[tuple[int, ...]] = []
    to_numpy = openvino._to_numpy

    def spy(tensor: Any) -> NDArray[Any]:
        shapes.append(tuple(tensor.shape))
        return to_numpy(tensor)

    monkeypatch.setattr(openvino, "_to_numpy", spy)
    image = network.upload(batch(picture(5, 2), picture(3)))
    probed = detect(network, bundle.manifest.probing, StopRule(), image, np.repeat(SIZES, 2, axis=0))
    assert len(probed.levels) == 3
    assert {len(shape) for shape in shapes} <= {2, 3}  # no map
    assert shapes.count((2, 4)) == 2 + 3


def test_a_stage_reads_what_another_wrote_where_it_lies(bundle: Bundle, cache: Path) -> None:
    network = open_network("openvino", bundle, threads=1)
    outputs = backbone(network, picture(5, 2))
    inputs = probe_p4_inputs(network, outputs)
    probe: Any = network.stage("probe_p4")
    probe(inputs)
    request = probe._idle.get_nowait()
    for name in ("feature", "patches"):
        assert address(request.get_tensor(name)) == address(inputs[name].tensor)


def address(tensor: Any) -> int:
    """Where its values lie in memory."""
    found: int = tensor.data.ctypes.data
    return found


def test_few_numbers_of_patches_and_queries_come(
    small_bundle: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are rounded up, which changes nothing that is found."""
    slots: dict[str, list[int]] = {"slots": [], "query_slots": []}

    def note(stage: str, inputs: Mapping[str, Any]) -> None:
        for name in slots.keys() & inputs.keys():
            slots[name].append(inputs[name].tensor.shape[0])

    pictures = np.random.default_rng(0).integers(0, 256, (4, 160, 160, 3)).astype(np.uint8)
    levels = {level.capacity for level in small_bundle.manifest.probing.levels}
    network = open_network("openvino", small_bundle, threads=1)
    watched = HookedNetwork(network, before=note)
    with Detector(small_bundle.manifest, watched, StopRule()) as detector:
        rounded = [detector(image) for image in pictures]
    assert slots["slots"]
    assert all(count % 8 == 0 or count in levels for count in slots["slots"])
    cap = small_bundle.manifest.probing.anchor_cap
    assert slots["query_slots"]
    assert all(count % 16 == 0 or count == cap for count in slots["query_slots"])

    monkeypatch.setattr(type(network), "patch_bucket", 1)
    monkeypatch.setattr(type(network), "query_bucket", 1)
    before = {name: list(counts) for name, counts in slots.items()}
    with Detector(small_bundle.manifest, HookedNetwork(network, before=note), StopRule()) as detector:
        plain = [detector(image) for image in pictures]
    assert slots != {name: counts * 2 for name, counts in before.items()}
    for found, expected in zip(rounded, plain, strict=True):
        assert found.trace.to_dict() == expected.trace.to_dict()
        np.testing.assert_array_equal(found.class_id, expected.class_id)
        np.testing.assert_allclose(found.xyxy, expected.xyxy, atol=1e-3)
        np.testing.assert_allclose(found.confidence, expected.confidence, atol=1e-5)


def test_a_processor_without_bfloat16(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    class OldProcessor:
        def get_property(self, device: str, name: str) -> list[str]:
            assert (device, name) == ("CPU", "OPTIMIZATION_CAPABILITIES")
            return ["FP32", "INT8"]

    monkeypatch.setattr(openvino, "_core", OldProcessor)
    with pytest.raises(BackendError, match=r"no bfloat16 arithmetic .*; use the backend 'openvino'"):
        open_network("openvino-bf16", bundle)
    assert BACKENDS["openvino"].problem() is None


def test_bfloat16_to_the_host_and_back() -> None:
    values = np.array([0, 1, -2.5, 3.14159, 1e-30, 1e30, 1 + 2**-8, 1 + 3 * 2**-8], dtype=np.float32)
    there = openvino._cast(library.Tensor(values), library.Type.bf16)
    assert there.get_element_type() == library.Type.bf16
    back = openvino._to_numpy(there)
    assert back.dtype == np.float32
    np.testing.assert_allclose(back, values, rtol=2**-8)
    assert back[-2:].tolist() == [1.0, 1 + 4 * 2**-8]  # ties go to the even neighbour


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (
            "Exception from src/a.cpp:84:\nCheck 'x' failed at src/b.cpp:1:\nShapes differ\nmore",
            "Shapes differ",
        ),
        ("just this", "just this"),
        ("Exception from src/a.cpp:84:", "Exception from src/a.cpp:84:"),
        ("", "RuntimeError"),
    ],
)
def test_reason(message: str, reason: str) -> None:
    assert openvino._reason(RuntimeError(message)) == reason


def marked(model: Any, folder: Path) -> set[str]:
    """The types of the layers that are to stay precise."""
    library.serialize(model, folder / "graph.xml", folder / "graph.bin")
    root = ElementTree.fromstring(keep_coordinates_precise((folder / "graph.xml").read_bytes()))
    found = root.findall("layers/layer")
    return {
        layer.attrib["type"]
        for layer in found
        if layer.find("rt_info/attribute[@name='precise']") is not None
    }


def test_what_stays_precise(tmp_path: Path) -> None:
    import openvino.opset13 as ops

    weight = np.eye(4, dtype=np.float32)
    feature, size = (ops.parameter([-1, 4], np.float32, name=name) for name in ("feature", "image_size"))
    for node in (feature, size):
        node.output(0).get_tensor().set_names({node.friendly_name})
    hidden = ops.tanh(ops.matmul(ops.relu(feature), weight, False, False))  # features all along
    boxes = ops.sigmoid(ops.matmul(hidden, weight, False, False))  # the last layer's outputs are coordinates
    scores = ops.softplus(ops.matmul(hidden, weight, False, False))  # or come out as they are
    scaled = ops.floor(ops.multiply(boxes, ops.exp(size)))
    indices = ops.convert(ops.sqrt(size), "i64")
    gathered = ops.gather(ops.elu(feature, 1.0), ops.reduce_max(indices, [0, 1]), np.int64(0))
    outputs = [scaled, scores, ops.matmul(ops.cos(gathered), weight, False, False)]
    model = library.Model(outputs, [feature, size])
    found = marked(model, tmp_path)
    assert {"Sigmoid", "Multiply", "Floor", "Exp", "Sqrt", "SoftPlus"} <= found
    assert not found & {
        "GridSample",
        "Sign",
        "Tan",
        "Relu",
        "Tanh",
        "Elu",
        "Gather",
        "Cos",
        "MatMul",
        "Const",
        "Parameter",
        "Result",
    }


@pytest.mark.parametrize("cached", [False, True])
def test_a_marked_graph_is_computed_in_two_precisions(cached: bool) -> None:
    import openvino.opset13 as ops

    core = library.Core()
    if "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("needs a processor with bfloat16")
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((64, 64), dtype=np.float32)
    feature, anchors = (ops.parameter([-1, 64], np.float32, name=name) for name in ("feature", "anchors_p5"))
    for node in (feature, anchors):
        node.output(0).get_tensor().set_names({node.friendly_name})
    product = ops.matmul(ops.matmul(feature, weight, False, False), weight, False, False)
    wave = ops.matmul(ops.sin(ops.multiply(anchors, np.float32(1.7))), weight, False, False)
    result = ops.matmul(ops.multiply(product, wave), weight, False, False)
    model = models.mixed_precision(core, library.Model([product, wave, result], [feature, anchors]))
    options = {"INFERENCE_PRECISION_HINT": "bf16"}
    compiled = core.compile_model(model, "CPU", options)
    if cached:
        compiled = core.import_model(compiled.export_model().getvalue(), "CPU", options)
    assert compiled.input("feature").get_element_type() == library.Type.bf16
    assert compiled.input("anchors_p5").get_element_type() == library.Type.f32
    request = compiled.create_infer_request()
    values = rng.standard_normal((3, 64), dtype=np.float32)
    request.set_input_tensor(0, openvino._cast(library.Tensor(values), library.Type.bf16))
    request.set_input_tensor(1, library.Tensor(1000 * values))
    request.infer()
    product_found, wave_found, _ = (np.array(request.get_output_tensor(i).data) for i in range(3))
    exact = values @ weight @ weight
    difference = np.abs(product_found - exact).max() / np.abs(exact).max()
    assert 1e-5 < difference < 2e-2
    # In bfloat16 a sine of thousands would be any number.
    np.testing.assert_allclose(wave_found, np.sin(1700 * values.astype(np.float64)) @ weight, atol=0.1)


def test_values_that_compiling_makes_one_keep_the_names_of_the_graph(tmp_path: Path) -> None:
    """What goes in and what comes out, although `a`, copied from it, comes first in the alphabet."""
    nodes = [
        helper.make_node("Identity", ["pixels"], ["a"]),
        helper.make_node("Add", ["a", "a"], ["b"]),
        helper.make_node("Identity", ["b"], ["image"]),
    ]
    pixels, image = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n"]) for n in ("pixels", "image"))
    opset = [helper.make_opsetid("", 18)]
    model = helper.make_model(helper.make_graph(nodes, "copies", [pixels], [image]), opset_imports=opset)
    onnx.save(model, tmp_path / "copies.onnx")
    core = library.Core()
    compiled = core.compile_model(core.read_model(tmp_path / "copies.onnx"), "CPU")
    assert len(compiled.input(0).names) == 2
    spec = {name: TensorSpec(name=name, dtype="float32", shape=("n",)) for name in ("pixels", "image")}
    graph = GraphSpec(name="copies", file="", sha256="", inputs=(spec["pixels"],), outputs=(spec["image"],))
    stage = openvino._OpenVinoStage(graph, Compiled(compiled))
    found = stage({"pixels": OpenVinoArray(library.Tensor(np.arange(3, dtype=np.float32)), None)})
    assert list(found) == ["image"]
    assert found["image"].tensor.data.tolist() == [0, 2, 4]


def test_equal_values_come_in_order() -> None:
    import openvino.opset11 as ops

    values = ops.parameter([-1, -1], np.float32, name="values")
    best = ops.topk(values, np.int64(7), 1, "max", "value")
    model = library.Model([best.output(1)], [values])
    assert models.break_ties_by_index(model) is model
    request = library.Core().compile_model(model, "CPU").create_infer_request()
    scores = np.zeros((1, 250), np.float32)
    scores[0, [100, 200]] = 1
    request.set_input_tensor(0, library.Tensor(scores))
    request.infer()
    assert request.get_output_tensor(0).data.tolist() == [[100, 200, 0, 1, 2, 3, 4]]


CLOSED_IN_ORDER = """
import signal, sys
from asag_deploy import Detector

signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
detectors = [Detector.load(sys.argv[1], backend="openvino", threads=1) for _ in range(2)]
while detectors:
    detectors.pop(0).close()
signal.raise_signal(signal.SIGUSR1)
"""


def test_signals_are_handled_after_networks_were_closed(bundle: Bundle) -> None:
    """In whatever order, on processors for which OpenVINO changes the stack that they are handled on."""
    command = [sys.executable, "-c", CLOSED_IN_ORDER, str(bundle.path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (run.returncode, run.stdout) == (0, "handled\n"), run.stderr
