"""What is carried to a machine without a network: packages in one archive, small enough beside the tree."""

from __future__ import annotations

import lzma
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from asag_bench.gpu_machine.fatbin import has_gpu_code, prune
from asag_deploy.atomic import atomic_write
from asag_deploy.errors import BackendError, ConfigError, first_line
from asag_deploy.replacing import check_own_file
from asag_deploy.scratch import scratch_folder

MIB = 2**20
PACKAGES = ("onnxruntime-gpu", "faster-coco-eval")
"""The project's third way onto a GPU, and what measures AP; all else is there."""
UNWANTED = "flash|[Mm]oe|fpA_intB|attention|fmha|llm"
"""Kernels of language models, which no detector launches."""
_LEFT_OUT = (
    "onnxruntime/capi/libonnxruntime.so.*",
    "onnxruntime/capi/*_tensorrt.so",
    "onnxruntime/transformers/*",
)
"""ONNX Runtime for C++ (its Python module holds it once more), and what needs libraries of its own."""
_FOLDER = "packages"


@dataclass(frozen=True, kw_only=True)
class Carried:
    """An archive and the tree it goes with, in bytes."""

    archive: int
    tree: int

    def __str__(self) -> str:
        total = (self.archive + self.tree) / MIB
        return (
            f"archive {self.archive / MIB:.1f} MiB, tree {self.tree / MIB:.1f} MiB, together {total:.1f} MiB"
        )


def make_archive(
    output: Path, root: Path, *, wheels: Sequence[Path], gpu: int, limit_mib: float, python: str
) -> Carried:
    """Unpack wheels, zero their code for other GPUs, and write all as `output` (.tar.xz).

    wheels: files; PACKAGES are downloaded with pip, for that Python, if there are none.
    gpu: the compute capability to carry code for, such as 90.

    Raises ConfigError if archive and tree together are above the limit, or a wheel cannot be used;
    BackendError if pip fails; OutputError if `output` is there and no such archive, or cannot be written.
    """
    check_own_file(output, _is_archive, "packages for a GPU machine")
    with scratch_folder() as folder:
        files = list(wheels) or _download(folder / "wheels", python)
        for file in files:
            _unpack(file, folder / _FOLDER / file.name.partition("-")[0].replace("_", "-"), gpu)
        output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(output) as packed:
            _pack(folder / _FOLDER, packed)
            carried = Carried(archive=packed.stat().st_size, tree=tree_size(root))
            if carried.archive + carried.tree > limit_mib * MIB:
                raise ConfigError(
                    f"too large to be carried: {carried}, at most {limit_mib:g} MiB; carry fewer wheels"
                )
    return carried


def unpack_archive(archive: Path, folder: Path) -> dict[str, Path]:
    """Unpack an archive; return its packages by name, each in a folder for `sys.path`.

    Raises ConfigError.
    """
    try:
        with tarfile.open(archive) as file:
            file.extractall(folder, filter="data")
    except (OSError, tarfile.TarError, EOFError) as error:
        raise ConfigError(f"'{archive}' cannot be unpacked ({_reason(error)}); make it again") from error
    found = sorted(path for path in (folder / _FOLDER).glob("*") if path.is_dir())
    if not found:
        raise ConfigError(f"'{archive}' holds no packages; make it with `asag-bench gpu archive`")
    return {path.name: path for path in found}


def _reason(error: Exception) -> str:
    """Say in a few words why a file could not be read."""
    return (getattr(error, "strerror", None) or first_line(error)).lower()


def tree_size(root: Path) -> int:
    """Return the bytes of all files that git knows or does not ignore, or of all without git."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, capture_output=True, check=True).stdout.decode().split("\0")
        files: Iterable[Path] = (root / name for name in listed if name)
    except (OSError, subprocess.CalledProcessError):
        files = root.rglob("*")
    return sum(path.stat().st_size for path in files if path.is_file())


def _download(folder: Path, python: str) -> list[Path]:
    target = ["--no-deps", "--only-binary=:all:", "--python-version", python, "--dest", str(folder)]
    platforms = [part for n in (28, 27, 17) for part in ("--platform", f"manylinux_2_{n}_x86_64")]
    for name in PACKAGES:
        command = [sys.executable, "-m", "pip", "download", "--quiet", *target, *platforms, name]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            reason = next(iter(reversed(done.stderr.strip().splitlines())), "it said nothing")
            raise BackendError(f"pip could not download {name}: {reason}; give --wheel FILE instead")
    return sorted(folder.glob("*.whl"))


def _is_archive(path: Path) -> bool:
    try:
        with tarfile.open(path, "r:xz") as file:
            first = file.next()
    except (tarfile.TarError, EOFError, lzma.LZMAError):
        return False
    return first is not None and first.name.startswith(f"{_FOLDER}/")


def _unpack(wheel: Path, folder: Path, gpu: int) -> None:
    try:
        with zipfile.ZipFile(wheel) as file:
            file.extractall(folder)
    except (OSError, zipfile.BadZipFile) as error:
        raise ConfigError(f"'{wheel}' is no wheel that can be read ({_reason(error)})") from error
    for path in (path for pattern in _LEFT_OUT for path in folder.glob(pattern) if path.is_file()):
        path.unlink()
    for path in sorted(folder.rglob("*.so*")):
        if path.is_file() and has_gpu_code(path):
            prune(path, gpu, UNWANTED)


def _pack(folder: Path, output: Path) -> None:
    """Pack a folder; the same files give the same archive."""
    with tarfile.open(output, "w:xz", preset=6) as file:
        for path in sorted(folder.rglob("*")):
            file.add(path, f"{_FOLDER}/{path.relative_to(folder)}", recursive=False, filter=_anonymous)


def _anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    return entry
