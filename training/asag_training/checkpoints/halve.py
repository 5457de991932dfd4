"""Store a checkpoint in half the space, its weights rounded to float16, for keeping and passing on.

    python -m asag_training.checkpoints.halve runs/scenes/best.safetensors small.safetensors

What reads it computes in float32 as before.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from asag_deploy.command_line import OneSentenceParser
from asag_deploy.errors import AsagError
from asag_training.checkpoints.loading import load_checkpoint
from asag_training.checkpoints.native import save_checkpoint


def main(argv: Sequence[str] | None = None) -> int:
    """Run it with these arguments (None: the command line's) and return its exit code, 0 or 2."""
    parser = OneSentenceParser(
        prog="python -m asag_training.checkpoints.halve",
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, help="any checkpoint that asag-export reads")
    parser.add_argument("output", type=Path, help="the .safetensors file to write")
    try:
        options = parser.parse_args(argv)
        save_checkpoint(options.output, load_checkpoint(options.checkpoint), half=True)
    except AsagError as error:
        print(f"halve: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
