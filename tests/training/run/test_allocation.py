"""Memory that training gives back stays with the process."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

_PROGRAM = """
import resource
import torch
from asag_training.run.process import keep_freed_memory
assert {keep} == (keep_freed_memory() if {keep} else False)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(16 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _page_faults(keep: bool) -> int:
    program = _PROGRAM.format(keep=keep)
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_large_tensors_are_allocated_once() -> None:
    # 64 MiB are 16384 pages, touched for the first time once instead of twenty times (huge pages: fewer).
    assert _page_faults(keep=True) < _page_faults(keep=False) / 2
