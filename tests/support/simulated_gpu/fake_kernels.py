"""The compiled kernels on the GPU of `fake_cuda`: the host library, which computes when the stream does."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from asag_deploy.backends.tensorrt import backend as tensorrt
from asag_deploy.kernels import KernelLibrary
from asag_deploy.kernels.structures import INTERFACE_VERSION, Decide
from support.simulated_gpu.fake_cuda import FakeCuda


class FakeKernels(KernelLibrary):
    """Takes what the CUDA library takes, and checks that every address is alive when the kernel runs."""

    def __init__(self, host_library: Path, cuda: FakeCuda) -> None:
        self.device = "cuda"
        self.path = host_library
        self.calls: list[str] = []
        """The operators that were launched."""
        self._host = KernelLibrary(host_library, "host")
        self._cuda = cuda

    def run(self, operator: str, arguments: ctypes.Structure, stream: int = 0) -> None:
        self.calls.append(operator)
        self._cuda.put(stream, self._work(operator, arguments))

    def add_decide(self, graph: int, dependencies: Sequence[int], arguments: Decide) -> int:
        self.calls.append("decide")
        return self._cuda.add_kernel_node(graph, list(dependencies), self._work("decide", arguments))

    def _work(self, operator: str, arguments: ctypes.Structure) -> Callable[[], None]:
        """What the GPU does when it gets there, with the arguments as they are now."""
        copy = type(arguments).from_buffer_copy(arguments)
        addresses = [getattr(copy, name) for name, kind, *_ in copy._fields_ if kind is ctypes.c_void_p]

        def work() -> None:
            for address in addresses:
                assert self._cuda.device.holds(address, 1), f"{operator} uses memory that is not there"
            self._host.run(operator, copy)
            if operator == "decide" and copy.conditional:
                self._cuda.conditions[copy.condition] = ctypes.c_int32.from_address(copy.any).value

        return work


def install_kernels(monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda, host_library: Path) -> FakeKernels:
    """Let the TensorRT backends find the kernels compiled, whatever the GPU."""
    kernels = FakeKernels(host_library, cuda)
    monkeypatch.setattr(tensorrt, "open_cuda_library", lambda capability: kernels)
    return kernels


class ReadyLibrary:
    """The CUDA library as `ctypes.CDLL` gives it, loaded but not run; `status` is what the GPU says."""

    def __init__(self, status: int) -> None:
        self._status = status

    def asag_cuda_ready(self) -> int:
        return self._status

    def __getattr__(self, name: str) -> Any:
        def function(*_: object) -> Any:
            return b"the driver is too old" if name == "asag_message" else INTERFACE_VERSION

        setattr(self, name, function)
        return function
