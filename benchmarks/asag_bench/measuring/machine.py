"""The machine that a measurement is taken on, and the resident memory of this process."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from asag_bench.result import Machine
from asag_bench.runners.runner import DetectorRunner
from asag_deploy.backends.pieces import why_no_pieces
from asag_deploy.command_line import progress
from asag_deploy.kernels.structures import INTERFACE_VERSION

_PACKAGES = (
    *(
        "asag-deploy",
        "msgspec",
        "numpy",
        "onnxruntime",
        "onnxruntime-gpu",
        "opencv-python-headless",
        "openvino",
    ),
    *("tensorrt-rtx", "tensorrt", "torch", "transformers"),
)
WARM = 20
"""Pictures until buffers have grown to what they need."""
_SIDES = (200, 420)


def describe_machine() -> Machine:
    """Return processor, cores, memory, system, library versions and whether operators are compiled."""
    return Machine(
        date=datetime.now(UTC).date().isoformat(),
        processor=_processor(),
        cores=len(os.sched_getaffinity(0)),
        memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        packages={name: version for name in _PACKAGES if (version := _version(name))},
        compiled_operators=f"interface {INTERFACE_VERSION}" if why_no_pieces() is None else "none",
    )


def clocks_mhz() -> list[float]:
    """Return what each core runs at now, in MHz; nothing where the kernel does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return [float(line.split(":")[1]) for line in lines if line.startswith("cpu MHz")]
    except (OSError, ValueError, IndexError):
        return []


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    fields = dict(part for line in lines if len(part := [p.strip() for p in line.split(":", 1)]) == 2)
    family, model = fields.get("cpu family"), fields.get("model")
    return f"{fields.get('model name', 'unknown')} (family {family}, model {model})"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def resident_mib() -> float:
    """Return the memory of this process that is in RAM, in MiB."""
    return _status_mib("VmRSS")


def peak_resident_mib() -> float:
    """Return the most memory of this process that was ever in RAM, in MiB."""
    return _status_mib("VmHWM")


def measure_growth(runner: DetectorRunner, pictures: int, *, quiet: bool) -> float:
    """Return the MiB that a detector adds while pictures of many sizes pass through it.

    They are noise of 192 to 416 pixels a side, the same every time.  The first 20 do not count.
    """
    rng = np.random.default_rng(0)
    detector = runner.detector()
    before = resident_mib()
    label = f"memory of {runner.name}"
    with progress(total=pictures, unit="image", description=label, quiet=quiet) as bar:
        for i in range(pictures):
            if i == WARM:
                before = resident_mib()
            height, width = (int(side) // 32 * 32 for side in rng.integers(*_SIDES, 2))
            noise = rng.standard_normal((1, 3, height, width), dtype=np.float32)
            detector.forward(noise, np.array([[height, width]]))
            bar.update()
    return resident_mib() - before


def _status_mib(field: str) -> float:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field} line")
