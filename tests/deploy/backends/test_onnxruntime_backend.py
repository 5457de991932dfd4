"""The ONNX Runtime backend, beyond what every backend does (`test_backends.py`)."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from asag_deploy.backends import BACKENDS, open_network
from asag_deploy.backends.network import Network
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.errors import BackendError
from asag_deploy.loop.probing import detect
from asag_deploy.loop.stopping import StopRule
from support.tiny_bundle import backbone, batch, make_bundle, picture

SIZES = np.array([[64, 64]], dtype=np.int64)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("onnxruntime") / "bundle")


@pytest.fixture(scope="module")
def network(bundle: Bundle) -> Network:
    return open_network(None, bundle, threads=1)


def test_onnxruntime_is_always_available() -> None:
    assert BACKENDS["onnxruntime"].problem() is None


def test_cuda_without_its_provider(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: pytest.fail("loaded a graph"))
    with pytest.raises(BackendError, match=r"'onnxruntime-cuda' cannot run .* --no-deps onnxruntime-gpu`"):
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


def test_a_session_that_cannot_be_made_prints_nothing_amid_results(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_threads(*_: object) -> None:
        raise RuntimeError("pthread_create failed, error code: 11")

    monkeypatch.setattr(onnxruntime.InferenceSession, "_create_inference_session", no_threads)
    with pytest.raises(BackendError, match=r"'onnxruntime' could not load .* pthread_create failed"):
        open_network("onnxruntime", bundle)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("ours", "threads", "wanted"), [(4, None, 0), (1, None, 1), (3, None, 3), (3, 2, 2)])
def test_only_processors_that_are_ours_get_threads(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, ours: int, threads: int | None, wanted: int
) -> None:
    """A container's --cpuset-cpus, or taskset, leaves some of those that the machine has."""
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(ours)))
    told = []
    session = onnxruntime.InferenceSession

    def take_note(path: object, options: onnxruntime.SessionOptions, **rest: Any) -> object:
        told.append(options.intra_op_num_threads)
        options.intra_op_num_threads = 1
        return session(path, options, **rest)

    monkeypatch.setattr(onnxruntime, "InferenceSession", take_note)
    open_network("onnxruntime", bundle, threads=threads)
    assert set(told) == {wanted}


def test_cuda_that_falls_back_is_refused(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def fall_back(path: object, options: object, *, providers: list[Any], **_: object) -> object:
        assert [providers[0][0], *providers[1:]] == ["CUDAExecutionProvider", "CPUExecutionProvider"]
        return session(path, options, providers=["CPUExecutionProvider"])

    session = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "InferenceSession", fall_back)
    with pytest.raises(BackendError, match="'onnxruntime-cuda' could not start on this machine"):
        BACKENDS["onnxruntime-cuda"].open(bundle, threads=1)


@pytest.mark.parametrize(("backend", "told"), [("onnxruntime", []), ("onnxruntime-cuda", [4])])
def test_only_a_gpu_silences_what_is_no_error(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, backend: str, told: list[int]
) -> None:
    """The CUDA provider writes an error for each way of fusing a convolution that cuDNN does not have."""

    class Session:
        def __init__(self, path: str, options: object, *, providers: list[Any], **_: object) -> None:
            self.asked_for = [each if isinstance(each, str) else each[0] for each in providers]
            self.session = session(path, options, providers=["CPUExecutionProvider"])

        def get_providers(self) -> list[str]:
            assert severities == []  # what keeps a session from the GPU is still written
            return self.asked_for

        def __getattr__(self, name: str) -> Any:
            return getattr(self.session, name)

    session = onnxruntime.InferenceSession
    severities: list[int] = []
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(onnxruntime, "set_default_logger_severity", severities.append)
    BACKENDS[backend].open(bundle, threads=1)
    assert severities == told


def test_cuda_without_any_onnxruntime(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(BackendError, match="not installed; install it with `pip install onnxruntime`"):
        open_network("onnxruntime-cuda", bundle)


@pytest.mark.gpu
def test_cuda_computes_the_same(bundle: Bundle, network: Network) -> None:
    if BACKENDS["onnxruntime-cuda"].problem() is not None:
        pytest.skip("needs onnxruntime-gpu instead of onnxruntime")
    cuda = open_network("onnxruntime-cuda", bundle)
    for expected, actual in zip(_detections(network), _detections(cuda), strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_no_map_comes_to_the_host_while_the_loop_runs(
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
    assert {len(shape) for shape in shapes} <= {2, 3}  # counts, and what NMS needs
    assert shapes.count((2, 4)) == 2 + 3


def _detections(network: Network) -> list[NDArray[Any]]:
    outputs = backbone(network, picture(5, 2))
    return [network.download(outputs[name]) for name in ("p4", "anchors", "selected", "counts")]
