"""Make a checkpoint fit to be kept and passed on: weights in float16, and thresholds as they shall be used.

    python -m asag_training.checkpoints.pack runs/a/best.safetensors small.safetensors --set score_low=0.2

What reads it computes in float32 as before.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from asag_deploy.atomic import check_spares
from asag_deploy.command_line import ALL_FINE, OneSentenceParser, exit_code
from asag_deploy.replacing import check_own_file
from asag_training.settings import WEIGHTS_CHOICES


def main(argv: Sequence[str] | None = None) -> int:
    """Run it with these arguments (None: the command line's) and return its exit code, 0 or 2."""
    return exit_code("pack", lambda: _run(_parser().parse_args(argv)))


def _parser() -> argparse.ArgumentParser:
    parser = OneSentenceParser(
        prog="pack",
        description="Store a checkpoint in half the space, its weights rounded to float16.",
    )
    add = parser.add_argument
    add("checkpoint", type=Path, help="any checkpoint that asag-export reads, or its address")
    add("output", type=Path, help="the .safetensors file to write")
    add(
        "--weights",
        choices=WEIGHTS_CHOICES,
        default=WEIGHTS_CHOICES[0],
        help="those trained (default), or their average, EMA",
    )
    add(
        "--set",
        dest="changes",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="change a setting of the network that decides no shape, e.g. score_low=0.2; may be repeated",
    )
    return parser


def _run(options: argparse.Namespace) -> int:
    check_spares(options.output, options.checkpoint)
    from asag_training.checkpoints.checkpoint import change_settings
    from asag_training.checkpoints.loading import load_checkpoint
    from asag_training.checkpoints.native import is_native_file, save_checkpoint

    check_own_file(options.output, is_native_file, "a checkpoint of asag-train's")
    checkpoint = load_checkpoint(options.checkpoint, weights=options.weights)
    save_checkpoint(options.output, change_settings(checkpoint, options.changes), half=True)
    for sentence in checkpoint.notes:
        print(f"pack: note: '{options.checkpoint}': {sentence}", file=sys.stderr)
    return ALL_FINE


if __name__ == "__main__":
    sys.exit(main())
