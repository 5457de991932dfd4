"""An imaginary GPU for every test here."""

from __future__ import annotations

import pytest

from asag_deploy.cuda import Device, open_cuda
from fake_cuda import FakeCuda
from fake_gpu import install_cuda


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    made = FakeCuda()
    install_cuda(monkeypatch, made)
    return made


@pytest.fixture
def device(cuda: FakeCuda) -> Device:
    return Device(open_cuda())
