"""A small bundle to build engines of, and TensorRTs made of recorded signatures."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from asag_deploy.bundle.bundle import Bundle
from asag_deploy.cuda.driver import Gpu
from asag_deploy.engines import adapter, build
from support.engine_bundle import make_engine_bundle
from support.recorded_tensorrt import RecordedModule, file_of


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_engine_bundle(tmp_path / "bundle")


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], RecordedModule]:
    """A function that puts the module of a record where the real one would be."""

    def put(record: str) -> RecordedModule:
        name = "tensorrt_rtx" if "rtx" in record else "tensorrt"
        module = RecordedModule(file_of(record), name)
        monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(adapter, "_LOGGERS", {})
        return module

    return put


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """A GPU that this machine seems to have."""
    card = Gpu(name="NVIDIA GeForce RTX 3090", capability="sm86")
    monkeypatch.setattr(build, "find_gpu", lambda: card)
    return card


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "find_gpu", lambda: None)
