"""`asag-detect --doctor`: what this machine can run, and what is missing for the rest.

Nothing here raises: a broken driver or library is a finding, not an error.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from asag_deploy._version import __version__
from asag_deploy.backends import BACKENDS, Backend
from asag_deploy.backends.pieces import why_no_pieces
from asag_deploy.backends.tensorrt.device_loop import why_no_device_loop
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.cuda import open_cuda, why_no_cuda
from asag_deploy.cuda.driver import find_gpus
from asag_deploy.engines.sidecar import Format, built_engines
from asag_deploy.errors import BackendError, Problem, first_line, plural
from asag_deploy.kernels import LIBRARY_VARIABLE, KernelLibrary, cuda_library_path, open_cuda_library
from asag_deploy.kernels.cpu import cpu_kernels, cpu_library_path

_CPU_INFO = Path("/proc/cpuinfo")
_CPU_FEATURES = (
    *("avx2", "avx512f", "avx512_vnni", "avx512_bf16"),
    *("avx_vnni", "amx_bf16", "amx_int8", "amx_tile"),
)
_ARM_FEATURES = ("asimd", "asimddp", "i8mm", "bf16", "sve")


@dataclass(frozen=True, kw_only=True)
class BackendReport:
    """One backend on this machine."""

    name: str
    """As `--backend` takes it."""
    library: str | None
    """The library's distribution and version, or None if it is not installed."""
    problem: Problem | None
    """What it lacks; None if it can run."""


@dataclass(frozen=True, kw_only=True)
class MachineReport:
    """The processor and the NVIDIA GPUs of this machine."""

    system: str
    cores: int
    """Cores this process may use."""
    cpu_features: tuple[str, ...]
    """Instruction sets that speed up networks, as the kernel names them."""
    operators: str
    """Whether the network's operators are compiled for the CPU, or why not."""
    gpus: str
    """Name, memory and driver of each GPU, or why there is none."""
    kernels: str
    """Whether images are prepared and detections finished on the GPU, with which library, or why not."""
    device_loop: str
    """Whether the GPU takes the stop decisions itself, or why not."""


def diagnose() -> list[BackendReport]:
    """Report on every backend."""
    return [
        BackendReport(name=backend.name, library=_installed(backend.distributions), problem=_problem(backend))
        for backend in BACKENDS.values()
    ]


def machine() -> MachineReport:
    """Report on the processor and on what a GPU would be used for."""
    return MachineReport(
        system=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        cores=_cores(),
        cpu_features=_cpu_features(),
        operators=_operators(),
        gpus=_gpus(),
        kernels=_kernels(),
        device_loop=_device_loop(),
    )


def describe(backends: Sequence[BackendReport], computer: MachineReport) -> str:
    """Write the findings as a table for people."""
    lines = [
        f"asag-deploy {__version__} on {computer.system}",
        f"CPU  {computer.cores} cores, {' '.join(computer.cpu_features) or 'no special instruction sets'}",
        f"compiled operators on the CPU  {computer.operators}",
        f"GPU  {computer.gpus}",
        f"GPU pre- and post-processing  {computer.kernels}",
        f"probing loop on the GPU  {computer.device_loop}",
        "",
    ]
    rows = [("backend", "state", "library", "what is missing")]
    for report in backends:
        state, missing = ("ready", "") if report.problem is None else ("no", str(report.problem))
        rows.append((report.name, state, report.library or "not installed", missing))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        lines.append("  ".join([*cells, row[3]]).rstrip())
    return "\n".join(lines)


def describe_bundle(bundle: Bundle, given: Path) -> str:
    """Write what a bundle, which the user called `given`, holds, and for which GPUs and canvases engines lie
    in it."""
    manifest = bundle.manifest
    weights = "trained" if manifest.trained else "untrained"
    sound = (
        f"bundle '{bundle.as_named(given)}' is sound: {manifest.variant} ({manifest.precision_in_words}, "
        f"{weights} weights, {plural(len(manifest.categories), 'class')}), written by {manifest.producer}"
    )
    lines = [sound]
    for engine_format in get_args(Format):
        for target, canvases in built_engines(bundle, engine_format).items():
            shapes = ", ".join(["every shape", *(f"the canvas {canvas}" for canvas in canvases)])
            lines.append(f"engines of {engine_format} for {target}: {shapes}")
    return "\n".join(lines)


def _problem(backend: Backend) -> Problem | None:
    try:
        problem = backend.problem()
        if problem is None and backend.cuts_graphs:
            cpu_kernels()  # which raises where opening a bundle would
        return problem
    except BackendError as error:
        return Problem(str(error))
    except Exception as error:  # whatever a broken library raises is the finding
        return Problem(f"it cannot be asked ({first_line(error)})")


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


def _operators() -> str:
    """Say what backends on the CPU do about the compiled operators."""
    try:
        cpu_kernels()
        problem = why_no_pieces()
        if problem is not None:
            return f"not used, graphs run whole: {problem}"
        *names, last = (backend.name for backend in BACKENDS.values() if backend.cuts_graphs)
        users = f"{', '.join(names)} and {last}"
        return f"used by {users}, but for bundles in float16, from {cpu_library_path()}"
    except BackendError as error:
        return f"no, and the backends that would use them do not start: {error}"
    except Exception as error:  # whatever a broken library raises is the finding
        return f"no: {first_line(error)}"


def _gpus() -> str:
    try:
        gpus = find_gpus()
    except BackendError as error:
        return str(error)
    return "; ".join(
        f"{gpu.name}, {gpu.memory_bytes / 2**20:.0f} MiB, driver for CUDA {gpu.cuda_version}" for gpu in gpus
    )


def _kernels() -> str:
    """Say what TensorRT backends would do about the compiled kernels."""
    try:
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
        return f"no: {first_line(error)}"
    return f"used by tensorrt-rtx and tensorrt, from {path}"


def _device_loop() -> str:
    """Say what `Detector.load(..., loop="auto")` would do with a TensorRT backend."""
    problem: Problem | str | None
    try:
        problem = why_no_cuda()
        if problem is None:
            cuda = open_cuda()
            problem = why_no_device_loop(cuda, open_cuda_library(cuda.capability))
    except Exception as error:  # whatever a broken library raises is the finding
        problem = first_line(error)
    return "used by tensorrt-rtx and tensorrt" if problem is None else f"not used: {problem}"
