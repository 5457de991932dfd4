"""What is said of machines without a GPU that can be used, and that the stand-in is like the real module."""

from __future__ import annotations

import enum
import importlib
import inspect
import re
from typing import Any

import pytest

from asag_deploy.cuda import open_cuda, why_no_cuda
from asag_deploy.errors import BackendError
from support.simulated_gpu.fake_cuda import CudaError, FakeCuda
from support.simulated_gpu.fake_gpu import install_cuda


def test_a_gpu_that_can_be_used(cuda: FakeCuda) -> None:
    assert why_no_cuda() is None
    found = open_cuda()
    assert (found.capability, found.name) == ("sm86", "Imaginary GPU")
    assert found.versions() == (13010, 13010)


@pytest.mark.parametrize(
    ("devices", "driver", "sentence"),
    [
        ((CudaError.cudaErrorInsufficientDriver, None), 0, "there is no NVIDIA driver on this machine; .*"),
        (
            (CudaError.cudaErrorInsufficientDriver, None),
            12080,
            r"the NVIDIA driver supports CUDA 12\.8, but the cuda-python here is for 13\.1; .* or `.*12.*`",
        ),
        ((CudaError.cudaErrorNoDevice, None), 13010, "the NVIDIA driver finds no GPU on this machine; .*"),
        ((CudaError.cudaSuccess, 0), 13010, "the NVIDIA driver finds no GPU on this machine; .*"),
        (
            (CudaError.cudaErrorInvalidValue, None),
            13010,
            r"CUDA cannot start \(InvalidValue\); check the driver with `nvidia-smi`",
        ),
    ],
)
def test_a_gpu_that_cannot(
    cuda: FakeCuda, devices: tuple[CudaError, int | None], driver: int, sentence: str
) -> None:
    cuda.devices, cuda.driver_version = devices, driver
    problem = why_no_cuda()
    assert problem is not None
    assert re.fullmatch(sentence, str(problem))
    with pytest.raises(BackendError, match=sentence):
        open_cuda()


def test_no_cuda_python(monkeypatch: pytest.MonkeyPatch) -> None:
    install_cuda(monkeypatch, None)
    message = "cuda-python is not installed; install it with `pip install 'asag-deploy[gpu]'`"
    assert str(why_no_cuda()) == message


def test_a_driver_that_lacks_functions(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Any:
        raise RuntimeError("Function cuGetProcAddress not found\nin libcuda")

    monkeypatch.setattr(cuda, "cudaGetDeviceCount", fail)
    message = "the NVIDIA driver cannot be used (Function cuGetProcAddress not found); install a newer driver"
    assert str(why_no_cuda()) == message


def test_the_stand_in_is_like_the_real_module() -> None:
    """Names, and arguments by name and order, of everything it has."""
    pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-python: pip install cuda-bindings")
    real = importlib.import_module("cuda.bindings.runtime")
    for name in [name for name in dir(FakeCuda) if name.startswith("cuda")]:
        assert hasattr(real, name), name
        ours = getattr(FakeCuda, name)
        if isinstance(ours, enum.EnumType):
            assert set(ours.__members__) <= set(getattr(real, name).__members__), name
        elif inspect.isfunction(ours):
            line = re.sub(r"=\w+", "", str(getattr(real, name).__doc__).splitlines()[0])  # defaults
            while "[" in line:  # types with parameters, one in another
                line = re.sub(r"\[[^\[\]]*\]", "", line)
            arguments = re.findall(r"(\w+)(?:: [\w |]+)?(?=[,)])", line.partition("(")[2])
            assert list(inspect.signature(ours).parameters)[1:] == arguments, name
        else:
            assert int(getattr(real, name)) == ours, name
    for error in CudaError:
        assert int(getattr(real.cudaError_t, error.name)) == error


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("cudaFree", (4096,)),
        ("cudaFreeHost", (4096,)),
        ("cudaHostAlloc", (64, 0)),
        ("cudaStreamSynchronize", (64,)),
        ("cudaStreamDestroy", (64,)),
        ("cudaEventRecord", (64, 64)),
        ("cudaEventQuery", (64,)),
        ("cudaStreamWaitEvent", (64, 64, 0)),
        ("cudaEventElapsedTime", (64, 64)),
        ("cudaStreamEndCapture", (64,)),
        ("cudaGraphLaunch", (64, 64)),
        ("cudaGraphExecDestroy", (64,)),
    ],
)
def test_the_real_module_takes_handles_as_integers(name: str, arguments: tuple[int, ...]) -> None:
    """Asked where there is no driver, where it looks at its arguments and then says so."""
    pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-python: pip install cuda-bindings")
    real = importlib.import_module("cuda.bindings.runtime")
    if real.cudaGetDeviceCount()[0] == real.cudaError_t.cudaSuccess:
        pytest.skip("there is a GPU here, on which these handles mean something else")
    status, *_ = getattr(real, name)(*arguments)
    assert status in (real.cudaError_t.cudaErrorInsufficientDriver, real.cudaError_t.cudaErrorNoDevice)


@pytest.mark.gpu
def test_the_real_thing() -> None:
    found = open_cuda()
    assert re.fullmatch(r"sm\d{2,3}", found.capability)
    pointer = found.allocate(1000)
    assert pointer % 256 == 0
    found.free(pointer)
    with pytest.raises(BackendError, match=r"CUDA could not free memory: \w+"):
        found.free(pointer + 256)
