"""The machine that a measurement is taken on: without it a number means nothing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from datetime import UTC, datetime
from pathlib import Path

from asag_bench.result import Machine

_PACKAGES = (
    *("asag-deploy", "numpy", "onnxruntime", "onnxruntime-gpu", "opencv-python-headless", "openvino"),
    *("tensorrt-rtx", "tensorrt", "torch"),
)


def describe_machine() -> Machine:
    """Return processor, cores, memory, system and library versions."""
    return Machine(
        date=datetime.now(UTC).date().isoformat(),
        processor=_processor(),
        cores=len(os.sched_getaffinity(0)),
        memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        packages={name: version for name in _PACKAGES if (version := _version(name))},
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
