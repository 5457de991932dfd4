"""Machines and engines that the TensorRT backends cannot use: one sentence, before anything is loaded."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asag_deploy.backends import open_network
from asag_deploy.backends.tensorrt.backend import PLUGINS_VARIABLE
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.detector import Detector
from asag_deploy.engines.sidecar import Format, engine_folder
from asag_deploy.errors import (
    AsagError,
    BackendError,
    ConfigError,
    EngineMissingError,
    EngineStaleError,
    EngineUnfitError,
    ImageError,
)
from asag_deploy.processing.canvases import Canvas
from support.simulated_gpu import fake_tensorrt
from support.simulated_gpu.fake_cuda import CudaError, FakeCuda
from support.simulated_gpu.fake_gpu import MODULES, install_cuda, write_engines
from support.tiny_bundle import make_bundle

FORMATS: tuple[Format, ...] = ("tensorrt-rtx", "tensorrt")


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle")


@pytest.fixture(params=FORMATS)
def backend(request: pytest.FixtureRequest) -> Format:
    name: Format = request.param
    return name


def refused(cuda: FakeCuda, backend: Format, bundle: Bundle, kind: type[AsagError]) -> str:
    """The sentence with which a bundle is refused, without having touched the GPU."""
    with pytest.raises(kind) as error:
        open_network(backend, bundle)
    assert type(error.value) is kind
    assert cuda.leaked() == {}
    assert cuda.allocations == 0
    assert "\n" not in str(error.value)
    return str(error.value)


def test_no_library(cuda: FakeCuda, bundle: Bundle, backend: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, MODULES[backend])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    sentence = refused(cuda, backend, bundle, BackendError)
    assert f"'{backend}' cannot run on this machine: {MODULES[backend]} is not installed; " in sentence
    assert "`pip install" in sentence


def test_no_driver(cuda: FakeCuda, bundle: Bundle, backend: Format) -> None:
    cuda.devices, cuda.driver_version = (CudaError.cudaErrorInsufficientDriver, None), 0
    assert "there is no NVIDIA driver on this machine" in refused(cuda, backend, bundle, BackendError)


def test_no_cuda_python(
    cuda: FakeCuda, bundle: Bundle, backend: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_cuda(monkeypatch, None)
    assert "cuda-python is not installed; install it with `pip" in refused(
        cuda, backend, bundle, BackendError
    )


def test_no_engines(cuda: FakeCuda, bundle: Bundle, backend: Format) -> None:
    sentence = refused(cuda, backend, bundle, EngineMissingError)
    gpu = " --gpu sm86" if backend == "tensorrt-rtx" else ""
    assert "for sm86 (there are: none); build it with" in sentence
    assert f"`asag-build '{bundle.path}' --format {backend}{gpu}`" in sentence


@pytest.mark.parametrize(
    ("changes", "kind", "reason"),
    [
        ({"sdk_version": "1.6.0"}, EngineStaleError, "1.6.0, but 1.7.1.116 is installed; build it with"),
        ({"capabilities": ("sm89",)}, EngineUnfitError, "was built for sm89, but the GPU here is sm86"),
        ({"device": "Another GPU"}, EngineUnfitError, "'Another GPU', but this one is 'Imaginary GPU'"),
    ],
)
def test_engines_for_another_machine(
    cuda: FakeCuda,
    bundle: Bundle,
    backend: Format,
    changes: dict[str, Any],
    kind: type[AsagError],
    reason: str,
) -> None:
    write_engines(bundle, backend, **changes)
    assert reason in refused(cuda, backend, bundle, kind)


def test_the_last_engine_is_checked_before_the_first_is_loaded(
    cuda: FakeCuda, bundle: Bundle, backend: Format
) -> None:
    write_engines(bundle, backend)
    path = engine_folder(bundle, backend, "sm86") / "decoder.engine"
    path.write_bytes(path.read_bytes()[:-1])
    assert "decoder.engine' is truncated or was altered" in refused(cuda, backend, bundle, EngineStaleError)


CANVASES = (Canvas(64, 64), Canvas(64, 96))


def edit_sidecar(path: Path, **changes: Any) -> None:
    sidecar = json.loads(path.read_text())
    sidecar["recipe"].update(changes)
    path.write_text(json.dumps(sidecar))


@pytest.mark.parametrize("is_there", [True, False])
def test_an_engine_of_a_canvas_that_is_of_no_use(
    cuda: FakeCuda, bundle: Bundle, backend: Format, is_there: bool
) -> None:
    """Nothing is loaded then, the engines that take every shape neither."""
    write_engines(bundle, backend, canvases=CANVASES)
    path = engine_folder(bundle, backend, "sm86") / "64x96" / "probe_p4.engine"
    if is_there:
        edit_sidecar(path.with_suffix(".json"), graph_sha256="0" * 64)
        sentence = refused(cuda, backend, bundle, EngineStaleError)
        assert "was built from another graph than the bundle's" in sentence
    else:
        path.unlink()
        sentence = refused(cuda, backend, bundle, EngineMissingError)
        assert f"has no {backend} engine of the stage 'probe_p4' for sm86 on the canvas 64x96" in sentence
    gpu = " --gpu sm86" if backend == "tensorrt-rtx" else ""
    command = f"`asag-build '{bundle.path}' --format {backend}{gpu} --canvas 64x96`"
    assert sentence.endswith(f"build it with {command}, or delete the folder '64x96' to do without")


def test_to_do_without_a_canvas_its_folder_is_deleted(
    cuda: FakeCuda, bundle: Bundle, backend: Format
) -> None:
    write_engines(bundle, backend, canvases=CANVASES)
    shutil.rmtree(engine_folder(bundle, backend, "sm86") / "64x96")
    network = open_network(backend, bundle)
    assert list(network.canvases) == [CANVASES[0]]
    network.close()


def test_a_driver_that_is_too_old_for_the_library(
    cuda: FakeCuda, bundle: Bundle, backend: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Building the engines again would not help."""
    write_engines(bundle, backend)

    def refuse(runtime: fake_tensorrt.Runtime, engine: bytes) -> None:
        where = "IRuntime::deserializeCudaEngine: Error Code 1: Cuda Runtime (In ScopedCudaStream at c:25 "
        why = "(cudaError 35: CUDA driver version is insufficient for CUDA runtime version))"
        runtime.logger.log(fake_tensorrt.ILogger.Severity.ERROR, where + why)

    monkeypatch.setattr(fake_tensorrt.Runtime, "deserialize_cuda_engine", refuse)
    sentence = refused(cuda, backend, bundle, BackendError)
    title = "TensorRT-RTX" if backend == "tensorrt-rtx" else "TensorRT"
    assert f"the NVIDIA driver is too old for {title} 1.7.1.116; install a newer driver" in sentence


def test_a_gpu_that_the_library_does_not_know(cuda: FakeCuda, bundle: Bundle) -> None:
    """It is of no use then to say that engines are missing, for none can be built."""
    cuda.capability = (9, 0)
    assert refused(cuda, "tensorrt-rtx", bundle, BackendError) == (
        "TensorRT-RTX 1.7.1.116 has nothing for this GPU, Imaginary GPU (sm90): it knows sm75, sm80, sm86, "
        "sm89, sm120, sm121; use backend='tensorrt' or 'onnxruntime-cuda' on it"
    )


def test_engines_with_plugins_want_their_library(
    cuda: FakeCuda, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_engines(bundle, "tensorrt", canvases=CANVASES)
    sidecar = engine_folder(bundle, "tensorrt", "sm86") / "64x96" / "decoder.json"
    edit_sidecar(sidecar, plugins=["AsagPatchNMS"])
    monkeypatch.delenv(PLUGINS_VARIABLE, raising=False)
    sentence = refused(cuda, "tensorrt", bundle, BackendError)
    assert f"were built with the plugins AsagPatchNMS; set {PLUGINS_VARIABLE} to" in sentence
    monkeypatch.setenv(PLUGINS_VARIABLE, str(tmp_path / "nothing.so"))
    assert "there is no plugin library" in refused(cuda, "tensorrt", bundle, ConfigError)


class GpuImages:
    """A batch on the GPU, as far as it can be told from its interface."""

    def __init__(self, cuda: FakeCuda, shape: tuple[int, ...], typestr: str = "<f4") -> None:
        size = int(np.prod(shape)) * np.dtype(typestr).itemsize
        interface = {"version": 3, "shape": shape, "typestr": typestr, "strides": None}
        self.__cuda_array_interface__: dict[str, Any] = {
            **interface,
            "data": (cuda.device.allocate(max(size, 1)), False),
        }


SIZES = np.array([[64, 64]])


def test_gpu_images_for_a_backend_on_the_cpu(cuda: FakeCuda, bundle: Bundle) -> None:
    with Detector.load(bundle) as detector:
        with pytest.raises(ImageError, match="lie on a GPU, but this backend takes arrays on the host"):
            detector.forward(GpuImages(cuda, (1, 3, 64, 64)), SIZES)
        with pytest.raises(ConfigError, match="needs a backend that runs on a GPU"):
            detector.forward_on_device(np.zeros((1, 3, 64, 64), np.float32), SIZES)


@pytest.mark.parametrize(
    ("shape", "typestr", "message"),
    [
        ((3, 64, 64), "<f4", r"expected images of shape \(B, 3, H, W\), got \(3, 64, 64\)"),
        ((1, 64, 64, 3), "<f4", "the channels come first"),
        ((1, 3, 64, 64), "|u1", "expected normalised float32 images, got uint8"),
        ((2, 3, 64, 64), "<f4", r"expected sizes of shape \(2, 2\)"),
        ((1, 3, 32, 64), "<f4", "expected sizes from 1 x 1 to the batch's 32 x 64"),
    ],
)
def test_gpu_images_that_are_none(
    cuda: FakeCuda, bundle: Bundle, shape: tuple[int, ...], typestr: str, message: str
) -> None:
    write_engines(bundle)
    with Detector.load(bundle, backend="tensorrt-rtx") as detector, pytest.raises(ImageError, match=message):
        detector.forward(GpuImages(cuda, shape, typestr), SIZES)
