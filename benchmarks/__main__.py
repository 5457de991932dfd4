"""`asag-bench` from a clone on which nothing is installed, such as a machine that is lent for its GPU.

python benchmarks gpu archive                      # with a network: what to carry
python benchmarks gpu run --carried FILE           # with the GPU, in at most eight minutes
python benchmarks gpu run --rehearse               # without one: all that needs none
"""

from __future__ import annotations

import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(_ROOT / name) for name in (".", "training", "export", "benchmarks")]

from asag_bench.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
