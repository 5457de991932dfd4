"""Everything that takes an NVIDIA GPU, in one go, with one report; nothing is installed.

    python scripts/gpu_machine.py archive                      # with a network: what to carry
    python scripts/gpu_machine.py run --carried FILE           # with the GPU, in at most eight minutes
    python scripts/gpu_machine.py run --rehearse               # without one: all that needs none

Compiles the kernels for this GPU, runs the checks and tests that are marked `gpu`, times with `asag-bench`,
and writes `gpu_machine.json`, `.md` and `.log` after every step.  A step that cannot be done says why; the
others go on.

Exit codes: 0 if nothing failed, 1 if something did, 2 if nothing could be done.
"""

from __future__ import annotations

import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(_ROOT / name) for name in (".", "training", "export", "benchmarks")]

from asag_bench.gpu_machine.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
