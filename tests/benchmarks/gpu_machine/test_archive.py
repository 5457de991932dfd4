"""What is carried to a GPU machine: wheels without the machine code of other GPUs, small enough."""

from __future__ import annotations

import ctypes
import lzma
import shutil
import sys
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from asag_bench.cli import main
from asag_bench.gpu_machine.archive import make_archive, tree_size, unpack_archive
from asag_bench.gpu_machine.fatbin import has_gpu_code, prune
from asag_deploy.errors import BackendError, ConfigError
from support.plugin_builds import missing_nvcc, run

SOURCES = {
    "common.cu": "__global__ void scale(float* x) { x[threadIdx.x] *= 3; }\n"
    'extern "C" int answer() { scale<<<1, 1>>>(nullptr); return 42; }\n',
    "language.cu": "__global__ void flash_attention(float* x) { x[threadIdx.x] += 1; }\n"
    "void attend() { flash_attention<<<1, 1>>>(nullptr); }\n",
    "newest.cu": "__global__ void only_here(float* x) { x[threadIdx.x] -= 1; }\n"
    "void here() { only_here<<<1, 1>>>(nullptr); }\n",
}
KERNELS = {"scale": "_Z5scalePf", "flash_attention": "_Z15flash_attentionPf", "only_here": "_Z9only_herePf"}
"""Their names, and those the compiler makes of them."""


@pytest.fixture(scope="module", params=["plain", "compressed"])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library with a kernel for two GPUs, one that is not wanted, and one for the newer GPU alone."""
    missing = missing_nvcc()
    if missing is not None:
        pytest.skip(missing)
    folder = tmp_path_factory.mktemp(request.param)
    options = ["-Xcompiler=-fPIC", *(["--no-compress"] if request.param == "plain" else [])]

    def compiled(name: str) -> Path:
        (folder / name).write_text(SOURCES[name])
        gpus = (90,) if name == "newest.cu" else (80, 90)
        targets = [f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in gpus]
        run(["nvcc", *options, *targets, "-c", folder / name, "-o", folder / f"{name}.o"])
        return folder / f"{name}.o"

    with ThreadPoolExecutor() as compilers:
        objects = list(compilers.map(compiled, SOURCES))
    library = folder / "libkernels.so"
    run(["nvcc", "-shared", *objects, "-o", library])
    return library


@pytest.fixture
def library(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(built, tmp_path / "libkernels.so"))


def kernels(library: Path) -> dict[str, int]:
    """For how many GPUs there is code of each kernel, if it can be read; names come twice."""
    content = library.read_bytes()
    return {name: content.count(f".text.{symbol}\0".encode()) // 2 for name, symbol in KERNELS.items()}


@pytest.mark.slow
def test_code_of_other_gpus_is_zeroed(built: Path, library: Path) -> None:
    pruned = prune(library, 90)
    assert pruned.kept > 0
    assert pruned.zeroed > pruned.kept
    assert library.stat().st_size == built.stat().st_size
    assert has_gpu_code(library)
    assert ctypes.CDLL(str(library)).answer() == 42  # it loads, and its host code is as it was
    assert len(lzma.compress(library.read_bytes())) < len(lzma.compress(built.read_bytes()))
    if built.parent.name.startswith("plain"):
        assert kernels(built) == {"scale": 2, "flash_attention": 2, "only_here": 1}
        assert kernels(library) == {"scale": 1, "flash_attention": 1, "only_here": 0}


@pytest.mark.slow
def test_kernels_of_other_networks_are_zeroed(built: Path, library: Path) -> None:
    if shutil.which("zstd") is None:
        pytest.skip("needs zstd to look into machine code")
    everything = prune(Path(shutil.copy(library, library.with_name("other.so"))), 90)
    some = prune(library, 90, "flash|attention")
    assert 0 < some.kept < everything.kept
    assert some.kept + some.zeroed == everything.kept + everything.zeroed
    before, after = built.read_bytes(), library.read_bytes()
    assert all(after[i] in (0, value) for i, value in enumerate(before))
    if built.parent.name.startswith("plain"):
        assert kernels(library) == {"scale": 1, "flash_attention": 0, "only_here": 0}


@pytest.mark.slow
def test_a_gpu_that_the_library_has_no_code_for(library: Path) -> None:
    before = library.read_bytes()
    with pytest.raises(ConfigError, match="holds no code for SM35"):
        prune(library, 35)
    assert library.read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"text", b"\x7fELF\x01\x01" + bytes(100)])
def test_files_that_are_no_libraries(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "file.so"
    file.write_bytes(content or b"\0")
    assert not has_gpu_code(file)
    with pytest.raises(ConfigError, match="is no shared library with code for GPUs"):
        prune(file, 90)


def test_a_library_without_gpu_code() -> None:
    import cv2

    (module,) = Path(cv2.__file__).parent.glob("cv2*.so")
    assert not has_gpu_code(module)


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """A wheel of two files, one of which is left out."""
    path = tmp_path / "onnxruntime_gpu-1.0-cp312-cp312-linux.whl"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("onnxruntime/__init__.py", "carried = True\n")
        file.writestr("onnxruntime/capi/libonnxruntime.so.1.0", "once more")
    return path


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    folder = tmp_path / "tree"
    folder.mkdir()
    (folder / "file").write_bytes(bytes(3 * 2**20))
    return folder


def test_an_archive_and_back(wheel: Path, tree: Path, tmp_path: Path) -> None:
    output = tmp_path / "out" / "packages.tar.xz"
    carried = make_archive(output, tree, wheels=[wheel], gpu=90, limit_mib=4, python="3.12")
    assert str(carried) == "archive 0.0 MiB, tree 3.0 MiB, together 3.0 MiB"
    again = tmp_path / "again.tar.xz"
    make_archive(again, tree, wheels=[wheel], gpu=90, limit_mib=4, python="3.12")
    assert again.read_bytes() == output.read_bytes()
    packages = unpack_archive(output, tmp_path / "there")
    assert list(packages) == ["onnxruntime-gpu"]
    files = [p.relative_to(packages["onnxruntime-gpu"]) for p in packages["onnxruntime-gpu"].rglob("*.*")]
    assert files == [Path("onnxruntime/__init__.py")]


def test_too_large_to_be_carried(wheel: Path, tree: Path, tmp_path: Path) -> None:
    output = tmp_path / "packages.tar.xz"
    with pytest.raises(ConfigError, match=r"too large to be carried: archive 0.0 MiB, tree 3.0 MiB"):
        make_archive(output, tree, wheels=[wheel], gpu=90, limit_mib=2.9, python="3.12")
    assert not output.exists()


def test_files_that_git_ignores_are_not_carried(tree: Path) -> None:
    run(["git", "-C", tree, "init", "-q"])
    (tree / ".gitignore").write_text("file\n")
    assert tree_size(tree) == len("file\n")


def test_wheels_that_are_none(tree: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.whl"
    broken.write_text("no wheel")
    with pytest.raises(ConfigError, match=r"broken.whl' is no wheel"):
        make_archive(tmp_path / "o", tree, wheels=[broken], gpu=90, limit_mib=64, python="3.12")


def test_a_download_that_fails(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(BackendError, match=r"pip could not download onnxruntime-gpu: .*give --wheel FILE"):
        make_archive(tmp_path / "o", tree, wheels=[], gpu=90, limit_mib=64, python="3.12")


def test_archives_that_are_none(tmp_path: Path) -> None:
    broken = tmp_path / "broken.tar.xz"
    broken.write_text("no archive")
    with pytest.raises(ConfigError, match=r"broken.tar.xz' cannot be unpacked"):
        unpack_archive(broken, tmp_path / "a")
    empty = tmp_path / "empty.tar.xz"
    with tarfile.open(empty, "w:xz"):
        pass
    with pytest.raises(ConfigError, match="holds no packages"):
        unpack_archive(empty, tmp_path / "b")


def test_the_command(wheel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "my packages.tar.xz"
    assert main(["gpu", "archive", "--wheel", str(wheel), "--output", str(output)]) == 0
    assert f"run --carried '{output}'" in capsys.readouterr().out
    assert main(["gpu", "archive", "--wheel", str(wheel), "--output", str(output), "--limit-mib", "1"]) == 2
    assert "too large to be carried" in capsys.readouterr().err
    assert main(["gpu", "archive", "--gpu", "H100"]) == 2
    assert "expected a compute capability, such as sm90" in capsys.readouterr().err
