"""An imaginary GPU for every test here."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest

from asag_deploy.cuda import Cuda, Device, open_cuda
from support.simulated_gpu.fake_cuda import FakeCuda
from support.simulated_gpu.fake_gpu import install_cuda


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    made = FakeCuda()
    install_cuda(monkeypatch, made)
    return made


@pytest.fixture
def device(cuda: FakeCuda) -> Device:
    return Device(open_cuda())


@pytest.fixture
def api(cuda: FakeCuda) -> Cuda:
    return open_cuda()


@pytest.fixture
def stream(api: Cuda) -> Iterator[int]:
    made = api.create_stream()
    yield made
    api.destroy_stream(made)


@pytest.fixture
def memory(api: Cuda) -> Iterator[list[int]]:
    """Two pieces of 4 bytes on the GPU: zeros, and ones."""
    pieces = [api.allocate(4), api.allocate(4)]
    for value, piece in enumerate(pieces):
        ctypes.memset(piece, value, 4)
    yield pieces
    for piece in pieces:
        api.free(piece)
