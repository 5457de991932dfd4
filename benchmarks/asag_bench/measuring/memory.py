"""Resident memory of the process: now, at most, and whether it stays flat while pictures pass through."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from asag_bench.runners.runner import DetectorRunner
from asag_deploy.command_line import progress

WARM = 20
"""Pictures until buffers have grown to what they need."""
_SIDES = (200, 420)


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
