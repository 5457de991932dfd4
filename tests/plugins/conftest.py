"""The kernels compiled for the CPU, once for all tests of a session; skips that say what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from asag_deploy.kernels import KernelLibrary
from support.plugin_builds import (
    build_cuda_library,
    build_cuda_objects,
    missing_nvcc,
)


@pytest.fixture(params=[(1, 0), (32, 7), (512, 3)], ids=["1 thread", "32 shuffled", "512 shuffled"])
def host(host_library_path: Path, request: pytest.FixtureRequest) -> KernelLibrary:
    """The host library, with blocks of several sizes whose threads take their turns in several orders."""
    threads, seed = request.param
    return KernelLibrary(host_library_path, "host", threads=threads, seed=seed)


@pytest.fixture(scope="session")
def cuda_objects(build_dir: Path) -> list[Path]:
    """The CUDA kernels for every GPU generation, as object files."""
    missing = missing_nvcc()
    if missing is not None:
        pytest.skip(missing)
    return build_cuda_objects(build_dir)


@pytest.fixture(scope="session")
def cuda_library_path(build_dir: Path) -> Path:
    missing = missing_nvcc()
    if missing is not None:
        pytest.skip(missing)
    return build_cuda_library(build_dir)
