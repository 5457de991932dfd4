"""The GPUs that the library of the NVIDIA driver lists."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from asag_deploy.cuda.driver import Gpu, find_gpus
from asag_deploy.errors import BackendError


class Driver:
    """A driver with some GPUs, in which any one call can be made to fail."""

    def __init__(self, gpus: int = 1, failing: str = "") -> None:
        self.gpus, self.failing = gpus, failing

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            if name == "cuDeviceGetCount":
                arguments[0]._obj.value = self.gpus
            if name == "cuDriverGetVersion":
                arguments[0]._obj.value = 13010
            if name == "cuDeviceGet":
                arguments[0]._obj.value = arguments[1]
            if name == "cuDeviceGetName":
                arguments[0].value = f"GPU {arguments[2].value}".encode()
            if name == "cuDeviceGetAttribute":
                arguments[0]._obj.value = {75: 12, 76: 0}[arguments[1]]
            if name == "cuDeviceTotalMem_v2":
                arguments[0]._obj.value = 24 * 2**30
            return 100 if name == self.failing else 0

        return call


def test_the_driver_is_asked_for_its_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver(gpus=2))
    common = {"capability": "sm120", "memory_bytes": 24 * 2**30, "cuda_version": "13.1"}
    assert find_gpus() == tuple(Gpu(name=f"GPU {i}", **common) for i in range(2))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "failing",
    [
        *("cuInit", "cuDeviceGetCount", "cuDriverGetVersion", "cuDeviceGet"),
        *("cuDeviceGetName", "cuDeviceGetAttribute", "cuDeviceTotalMem_v2"),
    ],
)
def test_a_driver_that_fails_has_no_gpu(monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver(failing=failing))
    with pytest.raises(BackendError, match=rf"finds no GPU that it can use \({failing} returned 100\)"):
        find_gpus()


def test_a_driver_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver(gpus=0))
    with pytest.raises(BackendError, match=r"finds no GPU that it can use$"):
        find_gpus()


def test_a_library_that_is_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    with pytest.raises(BackendError, match="is no NVIDIA driver: it has no cuInit"):
        find_gpus()


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", absent)
    with pytest.raises(BackendError, match=r"no NVIDIA driver: .* is not there"):
        find_gpus()
