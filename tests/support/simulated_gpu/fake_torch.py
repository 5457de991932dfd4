"""PyTorch on the GPU of `fake_cuda`: it computes on the CPU, in the order of the stream, and late."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from asag_bench.runners.references import with_interfaces
from asag_bench.runners.torch_cuda import torch_network
from asag_bench.runners.torch_cuda_operators import KernelOperators
from asag_deploy.backends.tensorrt.backend import EngineNetwork
from asag_deploy.bundle.manifest import Precision, Probing
from asag_deploy.cuda import Device, open_cuda
from asag_deploy.kernels import KernelLibrary
from asag_export.stage_export import prepare_for_export
from asag_training.checkpoints import Checkpoint
from asag_training.network.model import build
from asag_training.network.stage_plan import build_stages
from support.simulated_gpu import fake_tensorrt
from support.simulated_gpu.fake_cuda import FakeCuda
from support.simulated_gpu.fake_gpu import install_gpu
from support.simulated_gpu.fake_kernels import FakeKernels, install_kernels


class OnFakeGpu:
    """An `asag_bench.runners.torch_cuda.TorchAccess`."""

    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda

    def view(self, address: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> torch.Tensor:
        return torch.from_numpy(fake_tensorrt.view(self._cuda, address, shape, dtype))

    def run(self, stream: int, work: Callable[[], None]) -> None:
        self._cuda.put(stream, work)


def fake_torch_network(
    monkeypatch: pytest.MonkeyPatch,
    host_library: Path,
    checkpoint: Checkpoint,
    probing: Probing,
    precision: Precision = "fp32",
) -> tuple[EngineNetwork, FakeCuda, FakeKernels]:
    """The checkpoint's stages in PyTorch on a simulated GPU, with the kernels compiled for the CPU."""
    cuda = install_gpu(monkeypatch)
    kernels = install_kernels(monkeypatch, cuda, host_library)
    model = prepare_for_export(build(checkpoint.config, checkpoint.state), precision)
    modules = build_stages(model, probing)
    modules, interfaces = with_interfaces(modules, checkpoint, probing, precision)
    operators = KernelOperators(KernelLibrary(host_library, "host"), stream=lambda: 0)
    device, access = Device(open_cuda()), OnFakeGpu(cuda)
    network = torch_network(modules, interfaces, device, kernels, access=access, operators=operators)
    return network, cuda, kernels
