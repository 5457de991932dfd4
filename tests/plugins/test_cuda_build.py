"""The kernels compiled by nvcc for every GPU generation, and what the CUDA library says without a GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asag_deploy import kernels
from asag_deploy.errors import BackendError
from asag_deploy.kernels import Buffer, KernelLibrary, structures
from support.plugin_builds import ARCHITECTURES, build_check_program, missing_gpu, nvcc_folder, run


@pytest.mark.slow
def test_compiles_for_every_generation(cuda_library_path: Path) -> None:
    """That nvcc took every target, warnings being errors, is what the fixture holds."""
    KernelLibrary(cuda_library_path, "cuda")
    cuobjdump = nvcc_folder() / "bin" / "cuobjdump"
    if cuobjdump.exists():
        listed = run([cuobjdump, "--list-elf", cuda_library_path])
        assert [sm for sm in ARCHITECTURES if f".sm_{sm}.cubin" not in listed] == []
        assert f".sm_{ARCHITECTURES[-1]}.ptx" in run([cuobjdump, "--list-ptx", cuda_library_path])


@pytest.mark.slow
def test_says_what_is_wrong_without_a_gpu(cuda_library_path: Path) -> None:
    library = KernelLibrary(cuda_library_path, "cuda")
    nowhere = {
        name: Buffer(pointer=4096, shape=shape, dtype=np.dtype(dtype), on_device=True)
        for name, shape, dtype in (
            ("anchors", (1, 10, 5), np.float32),
            ("selected", (1, 10), np.bool_),
            ("image_size", (1, 2), np.int64),
            ("origins", (1, 8, 2), np.int64),
            ("counts", (1, 4), np.int64),
        )
    }
    options = {"stride": 16, "patch_size": 15, "iou_threshold": 0.25, "max_candidates": 2048}
    with pytest.raises(BackendError, match="stride is 0, expected 1 to 65536"):
        kernels.patch_nms(library, *nowhere.values(), **{**options, "stride": 0})  # type: ignore[arg-type]
    if missing_gpu() is None:
        pytest.skip("this machine has a GPU, on which these addresses must not be used")
    with pytest.raises(BackendError, match=r"cannot run on this GPU, sm86: .*(driver|device)"):
        library.check_device("sm86")
    with pytest.raises(BackendError, match=r"the kernel patch_nms failed: .*(driver|device)"):
        kernels.patch_nms(library, *nowhere.values(), **options)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_decision_as_a_node_says_what_is_wrong(cuda_library_path: Path) -> None:
    library = KernelLibrary(cuda_library_path, "cuda")
    arrays = [
        Buffer(pointer=4096, shape=shape, dtype=np.dtype(dtype), on_device=True)
        for shape, dtype in (((1, 4), np.int64), ((1, 2), np.bool_), ((1,), np.int64), ((1,), np.int32))
    ]

    def add(graph: int, dependencies: Sequence[int] = (), level: int = 0) -> int:
        place: dict[str, Any] = {"graph": graph, "dependencies": dependencies}
        return kernels.add_decide(library, *arrays, level=level, min_selected=1, max_patches=9, **place)

    begin = "the kernel decide could not be put into a CUDA graph: "
    with pytest.raises(
        BackendError, match=begin + "graph is a null pointer; pass a graph that has been made"
    ):
        add(0)
    with pytest.raises(
        BackendError, match=begin + r"dependencies\[1\] is a null pointer, expected a node of"
    ):
        add(4096, [4096, 0])
    with pytest.raises(BackendError, match=begin + "level is 2, expected 0 to 1"):
        add(4096, level=2)
    if missing_gpu() is None:
        pytest.skip("this machine has a GPU, whose driver must not be given these addresses")
    with pytest.raises(BackendError, match=begin + r".*(driver|device)"):
        add(4096)


@pytest.mark.slow
def test_the_check_program_runs(build_dir: Path, cuda_objects: list[Path]) -> None:
    """On a GPU it compares every kernel and runs a graph that decides; elsewhere it is compiled."""
    program = build_check_program(build_dir, cuda_objects)
    done = subprocess.run([program], capture_output=True, text=True)
    if missing_gpu() is None:
        assert done.returncode == 0, done.stderr
        assert "conditional graph to level 2" in done.stdout
    else:
        assert (done.returncode, done.stderr.startswith("no GPU: ")) == (77, True)


@pytest.mark.slow
def test_exports_the_interface_and_nothing_else(cuda_library_path: Path) -> None:
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("needs nm to list symbols, which is not installed")
    listed = run([nm, "--dynamic", "--defined-only", cuda_library_path]).split()
    names = {name for name in listed if name.startswith("asag_")}
    operators = (
        "multiscale_roi_align",
        "pyramid_sample",
        "deformable_sample",
        "patch_nms",
        "pad_anchors",
        "preprocess",
        "postprocess",
        "decide",
    )
    more = {"asag_cuda_add_decide", "asag_cuda_ready", "asag_message", "asag_interface_version"}
    assert names == {f"asag_cuda_{name}" for name in operators} | more
    assert ctypes.CDLL(str(cuda_library_path)).asag_interface_version() == structures.INTERFACE_VERSION
