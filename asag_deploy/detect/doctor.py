"""`asag-detect --doctor`: what this machine can run, and what is missing for the rest.

Nothing here raises: a broken driver or library is a finding, not an error.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from asag_deploy._version import __version__

if TYPE_CHECKING:
    from asag_deploy.backends import Backend

_NOT_SUPPORTED = "not supported by this version of asag-deploy"
_CPU_INFO = Path("/proc/cpuinfo")
_CPU_FEATURES = (
    *("avx2", "avx512f", "avx512_vnni", "avx512_bf16"),
    *("avx_vnni", "amx_bf16", "amx_int8", "amx_tile"),
)
_ARM_FEATURES = ("asimd", "asimddp", "i8mm", "bf16", "sve")
_NVIDIA_SMI_SECONDS = 10
_SAYS_WHAT_TO_DO = ("pip install", "; install", "; check")


@dataclass(frozen=True, kw_only=True)
class BackendReport:
    """One backend on this machine."""

    name: str
    """As `--backend` takes it."""
    available: bool
    library: str | None
    """The library's distribution and version, or None if it is not installed."""
    missing: str | None
    """What it lacks, in words; None if it is available."""
    remedy: str | None
    """The command that installs what is missing, if one does."""


@dataclass(frozen=True, kw_only=True)
class MachineReport:
    """The processor and the NVIDIA GPUs of this machine."""

    system: str
    cores: int
    """Cores this process may use."""
    cpu_features: tuple[str, ...]
    """Instruction sets that speed up networks, as the kernel names them."""
    gpus: tuple[str, ...]
    """Name, memory and driver version of each."""
    gpu_problem: str | None
    """Why no GPU can be used, or None."""
    kernels: str
    """Whether images are prepared and detections finished on the GPU, with which library, or why not."""
    device_loop: str
    """Whether the GPU takes the stop decisions itself, or why not."""


@dataclass(frozen=True, kw_only=True)
class _Known:
    """A backend by name, the distributions that hold its library, and how to install them."""

    name: str
    distributions: tuple[str, ...]
    remedy: str


_FOR_CUDA = "pip uninstall onnxruntime && pip install onnxruntime-gpu"
_KNOWN = (
    _Known(
        name="onnxruntime",
        distributions=("onnxruntime", "onnxruntime-gpu"),
        remedy="pip install onnxruntime",
    ),
    _Known(name="onnxruntime-cuda", distributions=("onnxruntime-gpu",), remedy=_FOR_CUDA),
    _Known(name="onnxruntime-cuda-tf32", distributions=("onnxruntime-gpu",), remedy=_FOR_CUDA),
    _Known(name="openvino", distributions=("openvino",), remedy="pip install openvino"),
    _Known(name="openvino-bf16", distributions=("openvino",), remedy="pip install openvino"),
    _Known(
        name="tensorrt-rtx",
        distributions=("tensorrt-rtx", "tensorrt_rtx"),
        remedy="pip install 'asag-deploy[tensorrt-rtx]'",
    ),
    _Known(name="tensorrt", distributions=("tensorrt", "tensorrt-cu12"), remedy="pip install tensorrt"),
)


def diagnose() -> list[BackendReport]:
    """Every backend, whether or not this version implements it, and what it lacks on this machine."""
    try:
        from asag_deploy.backends import BACKENDS

        implemented: Mapping[str, Backend] = BACKENDS
        broken = None
    except Exception as error:  # a half-installed library can raise anything when it is imported
        implemented, broken = {}, f"its library cannot be imported ({_first_line(error)})"
    extra = [_Known(name=name, distributions=(), remedy="") for name in implemented]
    known = {entry.name: entry for entry in (*extra, *_KNOWN)}
    return [_report(entry, implemented.get(name), broken) for name, entry in known.items()]


def machine() -> MachineReport:
    """What the processor and the GPU driver say."""
    gpus = _gpus()
    return MachineReport(
        system=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        cores=_cores(),
        cpu_features=_cpu_features(),
        gpus=gpus,
        gpu_problem=_gpu_problem(gpus),
        kernels=_kernels(),
        device_loop=_device_loop(),
    )


def describe(backends: list[BackendReport], computer: MachineReport) -> str:
    """The findings as a table for people."""
    gpu = [*computer.gpus, *([computer.gpu_problem] if computer.gpu_problem else [])]
    lines = [
        f"asag-deploy {__version__} on {computer.system}",
        f"CPU  {computer.cores} cores, {' '.join(computer.cpu_features) or 'no special instruction sets'}",
        f"GPU  {'; '.join(gpu)}",
        f"GPU pre- and post-processing  {computer.kernels}",
        f"probing loop on the GPU  {computer.device_loop}",
        "",
    ]
    rows = [("backend", "state", "library", "what is missing")]
    for report in backends:
        state = "ready" if report.available else "no"
        rows.append((report.name, state, report.library or "not installed", _what_to_do(report)))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        lines.append("  ".join([*cells, row[3]]).rstrip())
    return "\n".join(lines)


def _what_to_do(report: BackendReport) -> str:
    if report.missing is None:
        return ""
    if report.remedy is None or any(words in report.missing for words in _SAYS_WHAT_TO_DO):
        return report.missing
    return f"{report.missing}: {report.remedy}"


def _report(known: _Known, backend: Backend | None, broken: str | None) -> BackendReport:
    missing: str | None
    if backend is None:
        missing = broken or _NOT_SUPPORTED
    else:
        try:
            missing = backend.available()
        except Exception as error:  # whatever a broken library raises is the finding
            missing = f"it cannot be asked ({_first_line(error)})"
    mendable = missing is not None and missing != _NOT_SUPPORTED
    return BackendReport(
        name=known.name,
        available=missing is None,
        library=_installed(known.distributions),
        missing=missing,
        remedy=(known.remedy or None) if mendable else None,
    )


def _installed(distributions: tuple[str, ...]) -> str | None:
    for name in distributions:
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # not on macOS or Windows
        return os.cpu_count() or 1


def _cpu_features() -> tuple[str, ...]:
    try:
        text = _CPU_INFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ()
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            flags = set(value.split())
            wanted = _CPU_FEATURES if key.strip() == "flags" else _ARM_FEATURES
            return tuple(feature for feature in wanted if feature in flags)
    return ()


def _gpus() -> tuple[str, ...]:
    """What nvidia-smi lists: name, memory and driver of each GPU."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    query = [program, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(
            query, capture_output=True, text=True, timeout=_NVIDIA_SMI_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ()
    rows = (line.split(", ") for line in answer.stdout.splitlines() if line.strip())
    return tuple(f"{row[0]}, {row[1]}, driver {row[2]}" if len(row) == 3 else ", ".join(row) for row in rows)


def _gpu_problem(listed: tuple[str, ...]) -> str | None:
    """Why CUDA finds no GPU; the driver library itself is asked, for containers may lack nvidia-smi."""
    library = "nvcuda.dll" if platform.system() == "Windows" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(library)
        count = ctypes.c_int(0)
        started = driver.cuInit(0)
        if started == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0:
            return None if listed else f"the driver finds {count.value}, but nvidia-smi does not list them"
    except (OSError, AttributeError):
        return f"no NVIDIA driver: {library} is not there"
    return f"the NVIDIA driver finds no GPU it can use (cuInit returned {started})"


def _kernels() -> str:
    """What `asag_deploy.backends.tensorrt.backend` would do about the compiled kernels."""
    try:
        from asag_deploy.cuda import open_cuda, why_no_cuda
        from asag_deploy.kernels import LIBRARY_VARIABLE, KernelLibrary, cuda_library_path

        path = cuda_library_path()
        if path is None:
            return (
                "not used, OpenCV and NumPy do it; build the kernels as plugins/README.md says and set "
                f"{LIBRARY_VARIABLE}"
            )
        library = KernelLibrary(path, "cuda")
        problem = why_no_cuda()
        if problem is not None:
            return f"not used, although {path} is there: {problem}"
        library.check_device(open_cuda().capability)
    except Exception as error:  # whatever a broken library raises is the finding
        return f"no: {_first_line(error)}"
    return f"used by tensorrt-rtx and tensorrt, from {path}"


def _device_loop() -> str:
    """What `Detector.load(..., loop="auto")` would do with a TensorRT backend."""
    try:
        from asag_deploy.backends.tensorrt.device_loop import why_no_device_loop
        from asag_deploy.cuda import open_cuda, why_no_cuda
        from asag_deploy.kernels import open_cuda_library

        problem = why_no_cuda()
        if problem is None:
            cuda = open_cuda()
            problem = why_no_device_loop(cuda, open_cuda_library(cuda.capability))
    except Exception as error:  # whatever a broken library raises is the finding
        problem = _first_line(error)
    return "used by tensorrt-rtx and tensorrt" if problem is None else f"not used: {problem}"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
