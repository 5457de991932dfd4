"""The ONNX Runtime backend, and the choice of backends."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from asag_deploy.backends import BACKENDS, open_network
from asag_deploy.bundle import Bundle, stage_names
from asag_deploy.errors import BackendError, ConfigError
from asag_deploy.probing import StopRule, detect
from asag_deploy.stages import Network
from tiny_bundle import make_bundle, picture

SIZES = np.array([[64, 64]], dtype=np.int64)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("onnxruntime") / "bundle")


@pytest.fixture(scope="module")
def network(bundle: Bundle) -> Network:
    return open_network(None, bundle, threads=1)


def batch(*pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Pictures as the network's input: float32 (B, 3, H, W)."""
    return np.stack(pictures).transpose(0, 3, 1, 2).astype(np.float32)


def test_backends_know_their_names() -> None:
    assert list(BACKENDS) == ["onnxruntime", "onnxruntime-cuda"]
    assert all(backend.name == name for name, backend in BACKENDS.items())


def test_onnxruntime_is_always_available() -> None:
    assert BACKENDS["onnxruntime"].available() is None


def test_unknown_backend(bundle: Bundle) -> None:
    with pytest.raises(ConfigError) as error:
        open_network("tensorflow", bundle)
    assert str(error.value) == "unknown backend 'tensorflow'; the backends are onnxruntime, onnxruntime-cuda"


@pytest.mark.parametrize("threads", [0, -1])
def test_impossible_threads(bundle: Bundle, threads: int) -> None:
    with pytest.raises(ConfigError, match=f"threads is {threads}; expected at least 1"):
        open_network(None, bundle, threads=threads)


def test_cuda_without_its_provider(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: pytest.fail("loaded a graph"))
    with pytest.raises(BackendError, match=r"'onnxruntime-cuda' cannot run .*pip install onnxruntime-gpu"):
        open_network("onnxruntime-cuda", bundle)


def test_cuda_provider_without_a_device(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_device(*_: object) -> None:
        raise RuntimeError("CUDA failure 100: no CUDA-capable device is detected\nmore")

    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
    monkeypatch.setattr(onnxruntime.OrtValue, "ortvalue_from_shape_and_type", no_device)
    with pytest.raises(BackendError) as error:
        open_network("onnxruntime-cuda", bundle)
    assert str(error.value) == (
        "the backend 'onnxruntime-cuda' cannot run on this machine: ONNX Runtime finds no usable CUDA device "
        "(CUDA failure 100: no CUDA-capable device is detected); check with `nvidia-smi`"
    )


def test_cuda_that_falls_back_is_refused(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def fall_back(path: object, options: object, *, providers: list[str]) -> object:
        assert providers == ["CUDAExecutionProvider", "CPUExecutionProvider"]
        return session(path, options, providers=["CPUExecutionProvider"])

    session = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "InferenceSession", fall_back)
    with pytest.raises(BackendError, match="'onnxruntime-cuda' could not start on this machine"):
        BACKENDS["onnxruntime-cuda"].open(bundle, threads=1)


@pytest.mark.parametrize("name", BACKENDS)
def test_onnxruntime_that_is_not_installed(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(BackendError, match="not installed; install it with `pip install onnxruntime`"):
        open_network(name, bundle)


@pytest.mark.gpu
def test_cuda_computes_the_same(bundle: Bundle, network: Network) -> None:
    if BACKENDS["onnxruntime-cuda"].available() is not None:
        pytest.skip("needs onnxruntime-gpu instead of onnxruntime")
    cuda = open_network("onnxruntime-cuda", bundle)
    for expected, actual in zip(_detections(network), _detections(cuda), strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_graph_that_is_no_onnx(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    bundle.graph_path("decoder").write_bytes(b"no graph")
    manifest = json.loads((bundle.path / "manifest.json").read_text())
    manifest["graphs"][-1]["sha256"] = hashlib.sha256(b"no graph").hexdigest()
    (bundle.path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BackendError, match=r"'onnxruntime' could not load '.*decoder\.onnx'") as error:
        open_network(None, Bundle.open(bundle.path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.int64).reshape(2, 3),
        np.arange(6, dtype=np.float32).reshape(2, 3).T,
        np.arange(8, dtype=np.uint8)[::2],
        np.zeros((2, 0), dtype=np.bool_),
        np.ones((1, 2), dtype=np.float16),
    ],
)
def test_arrays_come_back_as_they_went(network: Network, array: NDArray[Any]) -> None:
    back = network.download(network.upload(array))
    assert back.dtype == array.dtype
    np.testing.assert_array_equal(back, array)


def test_uploaded_array_lives_as_long_as_it_is_used(network: Network) -> None:
    uploaded = [network.upload(np.full((100, 100), i, dtype=np.int64)) for i in range(50)]
    assert [int(network.download(array).min()) for array in uploaded] == list(range(50))


def test_download_is_a_copy_of_its_own(network: Network) -> None:
    counts = _backbone(network, picture(3))["counts"]
    first = network.download(counts)
    first[:] = 99
    assert network.download(counts).tolist() == [[3, 3, 20, 17]]


def test_every_stage_is_there(bundle: Bundle, network: Network) -> None:
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
    assert list(outputs) == ["p2", "p3", "p4", "p5", "anchors", "selected", "origins", "counts"]


def test_input_the_graph_lacks(network: Network) -> None:
    with pytest.raises(BackendError, match="the graph 'backbone' asks for an input 'image_size'"):
        network.stage("backbone")({"image": network.upload(batch(picture(3)))})


def test_failure_in_a_graph_is_one_line(network: Network) -> None:
    grey = network.upload(np.zeros((1, 1, 64, 64), dtype=np.float32))
    with pytest.raises(BackendError, match="ONNX Runtime failed in the graph 'backbone'") as error:
        network.stage("backbone")({"image": grey, "image_size": network.upload(SIZES)})
    assert "\n" not in str(error.value)
    assert error.value.__cause__ is not None


def test_only_counts_come_to_the_host_while_the_loop_runs(
    bundle: Bundle, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[int, ...]] = []
    to_host = onnxruntime.OrtValue.numpy

    def spy(value: onnxruntime.OrtValue) -> NDArray[Any]:
        shapes.append(tuple(value.shape()))
        array: NDArray[Any] = to_host(value)
        return array

    monkeypatch.setattr(onnxruntime.OrtValue, "numpy", spy)
    image = network.upload(batch(picture(5, 2), picture(3)))
    probed = detect(network, bundle.manifest.probing, StopRule(), image, np.repeat(SIZES, 2, axis=0))
    assert len(probed.levels) == 3
    assert shapes == [(2, 4)] * 3


def test_stage_is_safe_in_many_threads(network: Network) -> None:
    def counts(red: int) -> list[int]:
        return [int(value) for value in network.download(_backbone(network, picture(red))["counts"])[0]]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(counts, list(range(20)) * 5))
    assert found == [[red, red, 20, 20 - red] for red in list(range(20)) * 5]


def _backbone(network: Network, image: NDArray[np.uint8]) -> dict[str, Any]:
    inputs = {"image": network.upload(batch(image)), "image_size": network.upload(SIZES)}
    return network.stage("backbone")(inputs)


def _detections(network: Network) -> list[NDArray[Any]]:
    outputs = _backbone(network, picture(5, 2))
    return [network.download(outputs[name]) for name in ("p4", "anchors", "origins", "counts")]
