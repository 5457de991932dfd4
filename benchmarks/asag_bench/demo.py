"""`make bench`: what the network that comes with the project costs on this machine, and how well it detects.

Exports it, draws scenes it has not seen, and runs `asag-bench` on them with every backend that the processor
has and the peers that need nothing else; a few minutes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from asag_bench.cli import main as bench
from asag_deploy.backends import BACKENDS
from asag_deploy.command_line import OneSentenceParser, exit_code
from asag_evaluation.data.coco import VAL_SPLIT
from asag_evaluation.data.scenes import write_scenes
from asag_export.bundle_export import export_bundle
from asag_export.demo import CHECKPOINT, SEED
from asag_training.checkpoints import load_checkpoint

ON_CPU = ("onnxruntime", "openvino", "openvino-bf16")
PEERS = ("torch", "unsplit", "always-probe", "adamixer-6")
_SIZE = 320
_PROGRAM = "asag_bench.demo"


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; returns 0 when measured, stable or not, or 2 with the reason in one sentence on stderr."""
    parser = OneSentenceParser(prog=_PROGRAM, description=__doc__)
    add = parser.add_argument
    add("--output-dir", type=Path, default=Path("bench-output"), metavar="DIR")
    add("--scenes", type=int, default=60, metavar="N", help="how many (default: 60)")
    add("--duration", type=float, default=30.0, metavar="S", help="most seconds a row block (default: 30)")

    def command() -> int:
        options = parser.parse_args(argv)
        return _run(options.output_dir, options.scenes, options.duration)

    return exit_code(_PROGRAM, command)


def _run(output_dir: Path, scenes: int, duration: float) -> int:
    print(f"1. Exporting the network to {output_dir / 'bundle'}", flush=True)
    export_bundle(load_checkpoint(CHECKPOINT), output_dir / "bundle", overwrite=True)
    data = output_dir / f"scenes-{scenes}"
    if not (data / VAL_SPLIT).exists():
        print(f"2. Drawing {scenes} scenes that the network has never seen", flush=True)
        write_scenes(data, count=scenes, seed=SEED, size=_SIZE, split=VAL_SPLIT)
    backends = [name for name in ON_CPU if BACKENDS[name].problem() is None]
    arguments = [str(output_dir / "bundle"), "--data", str(data), "--backend", ",".join(backends)]
    weights = os.path.relpath(CHECKPOINT)  # for the result repeats the command, which is to be read elsewhere
    arguments += ["--peer", ",".join(PEERS), "--checkpoint", weights, "--duration", f"{duration:g}"]
    print(f"3. Measuring {', '.join(backends)} and the peers {', '.join(PEERS)}\n", flush=True)
    code = bench([*arguments, "--output-dir", str(output_dir)])
    if code == 0:
        print(f"\nTable: {output_dir / 'result.md'}, plots: {output_dir}/*.png")
    return code


if __name__ == "__main__":
    sys.exit(main())
