"""Compiles `plugins/` for the tests: always from the sources as they are, never into the source tree."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from asag_deploy.cuda.driver import find_gpus
from asag_deploy.errors import BackendError

BUILD_VARIABLE = "ASAG_KERNELS_BUILD"
PLUGINS = Path(__file__).parents[2] / "plugins"
HOST_SOURCES = (
    *(
        "src/host_api.cpp",
        "src/cpu_api.cpp",
        "src/cpu_sampling.cpp",
        "src/cpu_mixing.cpp",
        "src/cpu_mixing_tiles.cpp",
    ),
    *("src/workers.cpp", "src/host_message.cpp", "src/checks.cpp"),
)
WARNINGS = ("-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Werror")
ARCHITECTURES = (75, 80, 86, 89, 90, 120)


def missing_compiler() -> str | None:
    """Why nothing can be compiled for the CPU here, or None."""
    return (
        None
        if shutil.which("g++")
        else "needs g++ to compile the kernels for the CPU, which is not installed"
    )


def missing_nvcc() -> str | None:
    """Why nothing can be compiled for CUDA here, or None."""
    return missing_compiler() or (
        None if shutil.which("nvcc") else "needs nvcc to compile the kernels, which is not installed"
    )


def missing_gpu() -> str | None:
    """Why the CUDA driver finds no GPU here, or None."""
    try:
        find_gpus()
    except BackendError as error:
        return f"needs an NVIDIA GPU: {error}"
    return None


def nvcc_folder() -> Path:
    """The toolkit that nvcc belongs to, with its include/ and lib64/."""
    nvcc = shutil.which("nvcc")
    assert nvcc is not None, "nvcc is there"
    for line in run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull]).splitlines():
        name, _, value = line.removeprefix("#$ ").partition("=")
        if name == "TOP":
            return Path(value).resolve()
    return Path(nvcc).resolve().parent.parent


def run(command: Sequence[str | os.PathLike[str]]) -> str:
    """Run a compiler or a check; its output, which is also that of the error if it fails."""
    done = subprocess.run([os.fspath(part) for part in command], capture_output=True, text=True)
    output = done.stdout + done.stderr
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{output}"
    return output


def sources(names: Sequence[str]) -> list[Path]:
    return [PLUGINS / name for name in names]


@contextmanager
def _missing(product: Path) -> Iterator[Path | None]:
    """Give a name to make a product under, which appears when the block ends; None where it is there.

    Another worker that wants the same waits for it, as compiling takes long.
    """
    if product.exists():
        yield None
        return
    with (product.parent / f".{product.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if product.exists():
            yield None
            return
        temporary = product.with_name(f".{secrets.token_hex(4)}{product.suffix}")
        yield temporary
        temporary.replace(product)


def build_host_library(folder: Path, *, sanitized: bool = False) -> Path:
    """The host library in that folder.

    With `sanitized`, one that ends the program at the first access out of bounds or undefined operation.
    """
    library = folder / ("libasag_kernels_sanitized.so" if sanitized else "libasag_kernels_host.so")
    warnings: tuple[str, ...] = WARNINGS
    options = [
        "-std=c++17",
        "-O1",
        "-ffp-contract=off",
        "-fvisibility=hidden",
        "-fPIC",
        "-shared",
        "-pthread",
    ]
    if sanitized:  # which makes g++ warn of what cannot be
        warnings = ()
        options += ["-g", "-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"]
    with _missing(library) as new:
        if new is not None:
            run(["g++", *options, *warnings, f"-I{PLUGINS / 'include'}", *sources(HOST_SOURCES), "-o", new])
    return library


def build_cuda_objects(folder: Path) -> list[Path]:
    """`cuda_api.cu` for every generation, and the checks it links with, as object files in that folder."""
    kernels, checks = folder / "cuda_api.o", folder / "checks.o"
    include = f"-I{PLUGINS / 'include'}"
    with _missing(checks) as new:
        if new is not None:
            options = ["-std=c++17", "-O1", "-fvisibility=hidden", "-fPIC", *WARNINGS, include]
            run(["g++", *options, "-c", PLUGINS / "src" / "checks.cpp", "-o", new])
    with _missing(kernels) as new:
        if new is not None:
            last = ARCHITECTURES[-1]
            targets = [f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in ARCHITECTURES]
            targets += [f"-gencode=arch=compute_{last},code=compute_{last}", "--threads=2"]
            host = ["-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra,-Werror", "--Werror=all-warnings"]
            source = PLUGINS / "src" / "cuda_api.cu"
            run(["nvcc", "-std=c++17", "-O3", *targets, *host, include, "-c", source, "-o", new])
    return [kernels, checks]


def build_check_program(folder: Path, objects: Sequence[Path]) -> Path:
    """The program that checks the kernels on a GPU, in that folder."""
    program = folder / "asag_check_device"
    options = ["-std=c++17", f"-arch=compute_{ARCHITECTURES[0]}", "-Xcompiler=-Wall,-Wextra,-Werror"]
    checks = sources(("checks/check_device.cu", "checks/check_conditional.cu", "src/host_api.cpp"))
    include = f"-I{PLUGINS / 'include'}"
    with _missing(program) as new:
        if new is not None:
            run(["nvcc", *options, "--Werror=all-warnings", include, *checks, *objects, "-o", new])
    return program


def build_cuda_library(folder: Path) -> Path:
    """The CUDA library in that folder."""
    library = folder / "libasag_kernels.so"
    with _missing(library) as new:
        if new is not None:
            run(["nvcc", "-shared", *build_cuda_objects(folder), "-o", new])
    return library
