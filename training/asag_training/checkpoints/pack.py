"""Make a checkpoint fit to be kept and passed on: weights in float16, and thresholds as they shall be used.

    python -m asag_training.checkpoints.pack runs/a/best.safetensors small.safetensors --set score_low=0.2

What reads it computes in float32 as before.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from asag_deploy.command_line import OneSentenceParser
from asag_deploy.errors import AsagError
from asag_training.checkpoints.changing import change_settings
from asag_training.checkpoints.loading import load_checkpoint
from asag_training.checkpoints.native import save_checkpoint


def main(argv: Sequence[str] | None = None) -> int:
    """Run it with these arguments (None: the command line's) and return its exit code, 0 or 2."""
    parser = OneSentenceParser(
        prog="pack",
        description="Store a checkpoint in half the space, its weights rounded to float16.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("checkpoint", type=Path, help="any checkpoint that asag-export reads")
    add("output", type=Path, help="the .safetensors file to write")
    add(
        "--set",
        dest="changes",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="change a setting of the network that decides no shape, e.g. score_low=0.2; may be repeated",
    )
    try:
        options = parser.parse_args(argv)
        checkpoint = change_settings(load_checkpoint(options.checkpoint), options.changes)
        save_checkpoint(options.output, checkpoint, half=True)
    except AsagError as error:
        print(f"pack: error: {error}", file=sys.stderr)
        return 2
    except SystemExit as stop:  # argparse, after --help
        return int(stop.code or 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
