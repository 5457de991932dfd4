"""CUDA's and cuDNN's libraries are found wherever they lie, and taken from one place."""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from asag_deploy.backends import BACKENDS, cuda_libraries
from asag_deploy.backends.cuda_libraries import load_cuda_libraries

CUBLAS, CUDNN = "libcublasLt.so.13", "libcudnn.so.9"


class Machine:
    """A file system and a process that has no library loaded, and what ONNX Runtime is asked to load."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.site = root / "site"
        self.maps = root / "maps"
        self.calls: list[dict[str, Any]] = []

    def add(self, folder: str, *libraries: str) -> Path:
        path = self.root / folder
        path.mkdir(parents=True, exist_ok=True)
        for library in libraries:
            (path / library).touch()
        return path

    def preload(self, **asked: Any) -> None:
        """As ONNX Runtime's: loads those libraries that lie in the folder, and prints what it misses."""
        self.calls.append(asked)
        folder = asked.get("directory")
        wanted = [CUBLAS] * asked["cuda"] + [CUDNN] * asked["cudnn"]
        for library in wanted:
            path = Path(folder) / library if folder else None
            if path is not None and path.is_file():
                with self.maps.open("a") as file:
                    file.write(f"7f00-7f01 r-xp 0 00:00 1    {path}.99\n")
        sys.stdout.write("Failed to load libcufft.so.12")
        raise OSError("libcufft.so.12")

    def loaded(self) -> list[Path]:
        return [Path(line.split()[-1]).parent for line in self.maps.read_text().splitlines()]


@pytest.fixture
def computer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine(tmp_path)
    made.add("site/onnxruntime", "__init__.py")
    made.add("usr")
    made.maps.write_text("7f00-7f01 r-xp 0 00:00 1    /lib/libc.so.6\n7f00-7f01 rw-p 0 00:00 0\n")
    monkeypatch.setattr(onnxruntime, "__file__", str(made.site / "onnxruntime" / "__init__.py"))
    monkeypatch.setattr(onnxruntime, "cuda_version", "13.0", raising=False)
    monkeypatch.setattr(onnxruntime, "preload_dlls", made.preload, raising=False)
    monkeypatch.setattr(cuda_libraries, "_MAPS", made.maps)
    monkeypatch.setattr(cuda_libraries, "_INSTALLATIONS", tmp_path / "usr")
    monkeypatch.setattr(sys, "path", [str(made.site), "", str(tmp_path / "other")])
    for variable in ("CUDA_HOME", "CUDA_PATH", "LD_LIBRARY_PATH"):
        monkeypatch.delenv(variable, raising=False)
    find_spec = importlib.util.find_spec

    def find(name: str) -> ModuleSpec | None:
        origin = tmp_path / "torch" / "__init__.py"
        if name != "torch":
            return find_spec(name)
        return ModuleSpec("torch", None, origin=str(origin)) if origin.is_file() else None

    monkeypatch.setattr(importlib.util, "find_spec", find)
    return made


def found(computer: Machine) -> list[str]:
    """The folders from which CUDA's and cuDNN's libraries came."""
    before = len(computer.loaded())
    load_cuda_libraries()
    return [str(folder.relative_to(computer.root)) for folder in computer.loaded()[before:]]


def test_wheels_of_cuda_13_beside_onnxruntime(computer: Machine) -> None:
    computer.add("site/nvidia/cu13/lib", CUBLAS)
    computer.add("site/nvidia/cudnn/lib", CUDNN)
    assert found(computer) == ["site/nvidia/cu13/lib", "site/nvidia/cudnn/lib"]


def test_wheels_elsewhere_on_the_path(computer: Machine) -> None:
    """ONNX Runtime was unpacked into a folder of its own; each component has one as with CUDA 12."""
    computer.add("other/nvidia/cuda_runtime/lib", "libcudart.so.13")
    computer.add("other/nvidia/cublas/lib", CUBLAS)
    computer.add("other/nvidia/cudnn/lib", CUDNN)
    assert found(computer) == ["other/nvidia/cublas/lib", "other/nvidia/cudnn/lib"]
    asked = [Path(call["directory"]).parent.name for call in computer.calls if call["cuda"]]
    assert sorted(asked) == ["cublas", "cuda_runtime", "cudnn"]  # the whole of the place that has it


def test_in_the_folder_of_pytorch(computer: Machine) -> None:
    computer.add("torch", "__init__.py")
    computer.add("torch/lib", CUBLAS, CUDNN)
    assert found(computer) == ["torch/lib", "torch/lib"]


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
def test_in_the_installation_that_the_environment_names(
    computer: Machine, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    computer.add("usr/cuda/lib64", CUBLAS)
    monkeypatch.setenv(variable, str(computer.add("opt/cuda/lib64", CUBLAS, CUDNN).parent))
    assert found(computer) == ["opt/cuda/lib64", "opt/cuda/lib64"]


def test_in_the_newest_installation_of_that_version(computer: Machine) -> None:
    computer.add("usr/cuda-9.2/lib64", CUBLAS)
    computer.add("usr/cuda-12.8/lib64", "libcublasLt.so.12")
    computer.add("usr/cuda-13.0/targets/x86_64-linux/lib", CUBLAS)
    assert found(computer) == ["usr/cuda-13.0/targets/x86_64-linux/lib"]
    assert computer.calls[-1] == {"cuda": False, "cudnn": True}  # cuDNN is left to the loader


def test_on_the_path_of_the_loader(computer: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", f":{computer.root}/nothing:{computer.add('far', CUBLAS, CUDNN)}")
    assert found(computer) == ["far", "far"]


def test_what_is_loaded_is_not_loaded_again(computer: Machine) -> None:
    """PyTorch has its own cuBLAS in this process; a second cuDNN beside its own would not work."""
    computer.add("site/nvidia/cu13/lib", CUBLAS)
    computer.add("site/nvidia/cudnn/lib", CUDNN)
    computer.maps.write_text(f"1-2 r-xp 0 0:0 1 /a/{CUBLAS}.1.0.3\n1-2 r-xp 0 0:0 1 /a/{CUDNN}.10\n")
    assert found(computer) == []
    assert computer.calls == []


def test_another_version_is_no_help(computer: Machine) -> None:
    computer.add("site/nvidia/cu12/lib", "libcublasLt.so.12", "libcudnn.so.8")
    computer.maps.write_text("1-2 r-xp 0 0:0 1 /a/libcublasLt.so.12.8\n")
    assert found(computer) == []
    assert computer.calls == [{"cuda": True, "cudnn": False}, {"cuda": False, "cudnn": True}]


def test_where_the_process_cannot_be_looked_into(computer: Machine) -> None:
    computer.maps.unlink()
    load_cuda_libraries()
    assert len(computer.calls) == 2


def test_nothing_is_said(
    computer: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether the provider works is asked afterwards, and what is missing is said then."""
    computer.add("site/nvidia/cu13/lib", CUBLAS)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "OrtValue", np)  # has no such function
    assert "finds no usable CUDA device" in str(BACKENDS["onnxruntime-cuda"].problem())
    assert len(computer.calls) == 2
    assert capsys.readouterr().out == ""


def test_an_onnxruntime_before_1_21(computer: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    computer.add("site/nvidia/cu13/lib", CUBLAS)
    monkeypatch.delattr(onnxruntime, "preload_dlls")
    load_cuda_libraries()
    assert computer.calls == []
