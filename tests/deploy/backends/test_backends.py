"""What every backend has to do, and the choice among them."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from asag_deploy.backends import BACKENDS, DEFAULT_BACKEND, open_network
from asag_deploy.backends.network import Network
from asag_deploy.bundle.bundle import Bundle, stage_names
from asag_deploy.detector import Detector
from asag_deploy.engines.sidecar import Format
from asag_deploy.errors import BackendError, ConfigError, EngineUnfitError
from asag_deploy.loop.probing import detect
from asag_deploy.loop.stages import features_among
from asag_deploy.loop.stopping import StopRule
from support.bundle_edits import edit_graph, replace_graph
from support.simulated_gpu.fake_gpu import install_gpu, write_engines
from support.tiny_bundle import backbone, batch, counts, make_bundle, picture, probe_p4_inputs

SIZES = np.array([[64, 64]], dtype=np.int64)
ON_THE_CPU = ("onnxruntime", "openvino", "openvino-bf16")
SIMULATED: tuple[Format, ...] = ("tensorrt-rtx", "tensorrt")
"""On an imaginary GPU."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    made = make_bundle(tmp_path_factory.mktemp("backends") / "bundle")
    for engine_format in SIMULATED:
        write_engines(made, engine_format)
    return made


@pytest.fixture(scope="module", params=(*ON_THE_CPU, *SIMULATED))
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    name: str = request.param
    with pytest.MonkeyPatch.context() as patch:
        if name in SIMULATED:
            install_gpu(patch)
        missing = BACKENDS[name].problem()
        if missing is not None:
            pytest.skip(str(missing))
        yield name


@pytest.fixture(scope="module")
def network(bundle: Bundle, backend: str) -> Iterator[Network]:
    made = open_network(backend, bundle, threads=1)
    yield made
    made.close()


def test_backends_know_their_names() -> None:
    assert DEFAULT_BACKEND in BACKENDS
    assert set(ON_THE_CPU) <= set(BACKENDS)
    assert all(backend.name == name for name, backend in BACKENDS.items())


def test_unknown_backend(bundle: Bundle) -> None:
    with pytest.raises(ConfigError) as error:
        open_network("tensorflow", bundle)
    assert str(error.value) == f"unknown backend 'tensorflow'; the backends are {', '.join(BACKENDS)}"


@pytest.mark.parametrize("threads", [0, -1])
def test_impossible_threads(bundle: Bundle, threads: int) -> None:
    with pytest.raises(ConfigError, match=f"threads is {threads}; expected at least 1"):
        open_network(None, bundle, threads=threads)


@pytest.mark.parametrize("name", ON_THE_CPU)
def test_library_that_is_not_installed(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    library = name.partition("-")[0]
    wanted = library if library == "onnxruntime" else rf"'asag-deploy\[{library}\]'"  # which base has
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(BackendError, match=rf"'{name}' cannot run .*not installed; .*`pip install {wanted}`"):
        open_network(name, bundle)


@pytest.mark.parametrize("backend", ON_THE_CPU)
def test_graph_that_is_no_onnx(
    bundle: Bundle, backend: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if BACKENDS[backend].problem() is not None:
        pytest.skip(str(BACKENDS[backend].problem()))
    broken = replace_graph(bundle, "decoder", b"no graph", tmp_path / "bundle")
    with pytest.raises(BackendError, match=rf"'{backend}' could not load '.*decoder\.onnx'") as error:
        open_network(backend, broken)
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", ""), "libraries have nothing to add"


def test_a_bundle_whose_name_is_not_utf8(bundle: Bundle, backend: str, tmp_path: Path) -> None:
    if backend in SIMULATED:
        pytest.skip("engines are read by this project itself")
    folder = tmp_path / os.fsdecode(b"b\xff\xe9")
    shutil.copytree(bundle.graph_path("decoder").parent, folder)
    network = open_network(backend, Bundle.open(folder))
    assert network.download(network.upload(np.arange(3))).tolist() == [0, 1, 2]
    network.close()


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.int64).reshape(2, 3),
        np.arange(6, dtype=np.float32).reshape(2, 3).T,
        np.arange(8, dtype=np.uint8)[::2],
        np.array([True, False]),
        np.zeros((2, 0), dtype=np.bool_),
        np.ones((1, 2), dtype=np.float16),
        np.arange(5000, dtype=np.float32),
    ],
)
def test_arrays_come_back_as_they_went(network: Network, array: NDArray[Any]) -> None:
    back = network.download(network.upload(array))
    assert (back.dtype, back.shape) == (array.dtype, array.shape)
    np.testing.assert_array_equal(back, array)


def test_uploaded_array_lives_as_long_as_it_is_used(network: Network) -> None:
    uploaded = [network.upload(np.full((100, 100), i, dtype=np.int64)) for i in range(50)]
    assert [int(network.download(array).min()) for array in uploaded] == list(range(50))


def test_download_is_a_copy_of_its_own(network: Network) -> None:
    counts = backbone(network, picture(3))["counts"]
    first = network.download(counts)
    first[:] = 99
    assert network.download(counts).tolist() == [[3, 0, 20, 17]]


def test_every_stage_is_there(network: Network) -> None:
    for name in stage_names(("P4", "P3")):
        assert callable(network.stage(name))
    with pytest.raises(KeyError):
        network.stage("probe_p2")


def test_inputs_the_graph_does_not_declare_are_left_out(network: Network) -> None:
    inputs = {
        "image": network.upload(batch(picture(3))),
        "image_size": network.upload(SIZES),
        "other": network.upload(SIZES),
    }
    outputs = network.stage("backbone")(inputs)
    assert list(outputs) == ["p2", "p3", "p4", "p5", "anchors", "selected", "counts"]


def test_input_the_graph_lacks(network: Network) -> None:
    with pytest.raises(BackendError, match="the graph 'backbone' asks for an input 'image_size'"):
        network.stage("backbone")({"image": network.upload(batch(picture(3)))})


def test_failure_in_a_graph_is_one_line(network: Network) -> None:
    flat = network.upload(np.zeros((3, 64, 64), dtype=np.float32))
    with pytest.raises((BackendError, EngineUnfitError), match="'backbone'") as error:
        network.stage("backbone")({"image": flat, "image_size": network.upload(SIZES)})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_an_array_of_another_shape_than_promised_is_refused(
    bundle: Bundle, backend: str, tmp_path: Path
) -> None:
    """What a graph declares can be right, and what it makes of an image wrong all the same."""

    def cut(model: onnx.ModelProto) -> None:
        graph = model.graph
        made = next(node for node in graph.node if "counts" in node.output)
        made.output[list(made.output).index("counts")] = "whole"
        for name in ("nothing", "end"):
            graph.initializer.append(numpy_helper.from_array(np.array([0]), f"{name}_of_them"))
        graph.node.append(
            onnx.helper.make_node("Slice", ["whole", "nothing_of_them", "end_of_them"], ["counts"])
        )

    broken = edit_graph(bundle, "backbone", cut, tmp_path / "broken")
    wrong = pytest.raises(BackendError, match=r"'backbone' gave 'counts' of shape \(0, 4\), which is not")
    with Detector.load(broken, backend=backend) as detector, wrong:
        detector(picture(3))


def test_a_failed_call_does_no_harm_to_the_next(network: Network) -> None:
    with pytest.raises((BackendError, EngineUnfitError)):
        network.stage("backbone")(
            {"image": network.upload(np.zeros((3, 64), np.float32)), "image_size": network.upload(SIZES)}
        )
    assert counts(network, 7) == [7, 0, 20, 13]


def test_a_stage_leaves_its_inputs_alone(network: Network) -> None:
    """Features go into several stages."""
    image = batch(picture(5, 2))
    before = image.copy()
    outputs = network.stage("backbone")({"image": network.upload(image), "image_size": network.upload(SIZES)})
    np.testing.assert_array_equal(image, before)
    kept = {
        name: network.download(outputs[name]) for name in (*features_among(outputs), "anchors", "selected")
    }
    inputs = probe_p4_inputs(network, outputs)
    origins = network.download(inputs["patches"])
    for _ in range(3):
        network.stage("probe_p4")(inputs)
    np.testing.assert_array_equal(network.download(inputs["patches"]), origins)
    for name, array in kept.items():
        np.testing.assert_array_equal(network.download(outputs[name]), array)


def test_outputs_outlive_later_calls(network: Network) -> None:
    """Also where sizes change, and the stage that gave them runs again and again."""
    shapes = [(64, 64), (128, 96), (96, 160), (64, 64), (64, 64), (64, 64)]
    held = [backbone(network, picture(i, size=size)) for i, size in enumerate(shapes)]
    for i, outputs in enumerate(held):
        assert network.download(outputs["counts"]).tolist() == [[i, 0, 20, 20 - i]]
        height, width = shapes[i]
        features = network.download(outputs["p4"])
        assert features.shape == (1, 3, height // 16, width // 16)
        assert (features[:, 0] == i).all()


def test_batches_and_empty_patches(bundle: Bundle, network: Network) -> None:
    image = network.upload(batch(picture(5, 2), picture(0), picture(3)))
    probed = detect(network, bundle.manifest.probing, StopRule(), image, np.repeat(SIZES, 3, axis=0))
    assert [level.patches.tolist() for level in probed.levels] == [[5, 5, 5], [5, 0, 3], [2, 0, 0]]
    assert network.download(probed.outputs["anchor_count"]).tolist()[1] == 20


def test_stage_is_safe_in_many_threads(network: Network) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda red: counts(network, red), list(range(20)) * 5))
    assert found == [[red, 0, 20, 20 - red] for red in list(range(20)) * 5]


def test_detections_are_those_of_the_default_backend(bundle: Bundle, backend: str) -> None:
    images = [picture(5, 2), picture(0), picture(18, 6, 1, size=(64, 100))]
    with Detector.load(bundle, threads=1) as expected, Detector.load(bundle, backend=backend) as detector:
        for one, other in zip(expected(images), detector(images), strict=True):
            assert one.trace.to_dict() == other.trace.to_dict()
            np.testing.assert_allclose(one.confidence, other.confidence, atol=1e-5)
            # Patches' anchors all score 0.8: equal scores have to come in the same order too.
            np.testing.assert_allclose(one.xyxy, other.xyxy, atol=1e-3)
            np.testing.assert_array_equal(one.class_id, other.class_id)
