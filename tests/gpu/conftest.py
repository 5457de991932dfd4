"""The demo's network in PyTorch on this machine's GPU, with the kernels compiled for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from asag_deploy.kernels import LIBRARY_VARIABLE, cuda_library_path
from support.plugin_builds import build_cuda_library, missing_gpu, missing_nvcc


@pytest.fixture(scope="session")
def kernels_path(build_dir: Path) -> Path:
    """The library that the environment names, or one that is compiled now."""
    named = cuda_library_path()
    if named is not None:
        return named
    missing = missing_gpu() or missing_nvcc()
    if missing is not None:
        pytest.skip(missing)
    return build_cuda_library(build_dir)


@pytest.fixture(scope="session", autouse=True)
def _kernels(kernels_path: Path) -> Iterator[None]:
    from asag_bench.runners.references import HOST_LOOP, why_not_on_cuda

    before = os.environ.get(LIBRARY_VARIABLE)
    os.environ[LIBRARY_VARIABLE] = str(kernels_path)
    try:
        problem = why_not_on_cuda(HOST_LOOP)
        if problem is not None:
            pytest.skip(problem)
        yield
    finally:
        if before is None:
            del os.environ[LIBRARY_VARIABLE]
