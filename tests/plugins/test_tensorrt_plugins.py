"""The TensorRT plugin library: compiled against real headers, registered with a real registry; no GPU needed.

`TENSORRT_ROOT` names a folder with TensorRT's `include/` and, in `lib/`, its library or the lean runtime (the
PyPI package tensorrt-lean-cu13-libs of the same major version has it).
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from support.plugin_builds import PLUGINS, WARNINGS, missing_nvcc, nvcc_folder, run


@pytest.fixture(scope="module")
def tensorrt() -> Path:
    root = os.environ.get("TENSORRT_ROOT")
    if not root:
        pytest.skip("needs TensorRT's headers and library: TENSORRT_ROOT is not set")
    if not (Path(root) / "include" / "NvInferRuntime.h").is_file():
        pytest.skip(f"needs TensorRT's headers: no include/NvInferRuntime.h in TENSORRT_ROOT ({root})")
    return Path(root)


@pytest.fixture(scope="module")
def plugin_check(tensorrt: Path, cuda_objects: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`asag_check_plugins`, linked with the plugin library."""
    folder = tmp_path_factory.mktemp("plugins")
    library, program = folder / "libasag_plugins.so", folder / "asag_check_plugins"
    toolkit = nvcc_folder()
    options = ["-std=c++17", "-O0", "-fPIC", "-fvisibility=hidden", *WARNINGS, f"-I{PLUGINS / 'include'}"]
    options += ["-isystem", str(tensorrt / "include"), "-isystem", str(toolkit / "include")]
    runtime = [f"-L{toolkit / 'lib64'}", "-lcudart_static", "-ldl", "-lpthread", "-lrt"]
    register = PLUGINS / "tensorrt" / "register.cpp"
    run(["g++", *options, "-shared", register, *cuda_objects, *runtime, "-o", library])
    run(["g++", *options, PLUGINS / "checks" / "check_plugins.cpp", library, *runtime, "-o", program])
    return program


@pytest.mark.slow
@pytest.mark.skipif(missing_nvcc() is not None, reason=str(missing_nvcc()))
def test_plugins_in_a_real_registry(tensorrt: Path, plugin_check: Path) -> None:
    libraries = [*tensorrt.glob("lib/libnvinfer.so.[0-9]*"), *tensorrt.glob("lib/libnvinfer_lean.so.[0-9]*")]
    if not libraries:
        pytest.skip(f"needs TensorRT's library: no libnvinfer.so or libnvinfer_lean.so in {tensorrt / 'lib'}")
    assert re.search(r"TensorRT \d+: 4 plugins are right", run([plugin_check, libraries[0]]))


@pytest.mark.slow
@pytest.mark.skipif(missing_nvcc() is not None, reason=str(missing_nvcc()))
def test_plugin_library_without_tensorrt(plugin_check: Path) -> None:
    """The library loads where there is no TensorRT, and says so."""
    import ctypes

    library = ctypes.CDLL(str(plugin_check.parent / "libasag_plugins.so"))
    library.asag_message.restype = ctypes.c_char_p
    status = library.asag_register_plugins(None)
    assert status == -5
    assert re.match(
        rb"no TensorRT \d+ library is loaded in this process; load libnvinf", library.asag_message(status)
    )
