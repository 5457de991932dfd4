"""The demo: photographs first, then generated scenes, then more objects than any network was trained for.

Exports the two small networks that come with the project, lets the parity gate compare them with PyTorch, and
runs the bundles without PyTorch: on photographs of blood cells that the one has never seen; on scenes that
the other has never seen, exactly, in fast mode and at every manual stop; and on crowds, with more anchors
than it was trained with.  Says how well they detect, and how far each picture made them look.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from asag_deploy.command_line import ALL_FINE, OneSentenceParser, exit_code, whole_number
from asag_deploy.images.writing import is_own_picture
from asag_deploy.replacing import check_own_file
from asag_export.demo.crowds import show_crowds
from asag_export.demo.photographs import show_photographs
from asag_export.demo.pictures import PHOTOGRAPHS_GALLERY, SCENES_GALLERY, SHOWN_AS
from asag_export.demo.scenes import show_scenes


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns 0, or 2 with the reason in one sentence on stderr."""

    def command() -> int:
        options = _parser().parse_args(argv)
        return _demo(options.output_dir, options.scenes, options.crowds)

    return exit_code("demo", command)


def _parser() -> argparse.ArgumentParser:
    parser = OneSentenceParser(prog="demo", description=__doc__)
    add = parser.add_argument
    add("--output-dir", type=Path, default=Path("demo-output"), metavar="DIR", help="default: %(default)s")
    add("--scenes", type=whole_number(1), default=200, metavar="N", help="how many (default: %(default)s)")
    add("--crowds", type=whole_number(1), default=20, metavar="N", help="how many (default: %(default)s)")
    return parser


def _demo(output_dir: Path, scenes: int, crowds: int) -> int:
    from asag_evaluation.report import check_report

    for name in (PHOTOGRAPHS_GALLERY, SCENES_GALLERY):
        check_own_file(output_dir / name, is_own_picture, SHOWN_AS)
    check_report(output_dir / "evaluation")
    show_photographs(output_dir)
    bundle = show_scenes(output_dir, scenes)
    show_crowds(bundle, output_dir, crowds)
    pictures = ", ".join(str(output_dir / name) for name in (PHOTOGRAPHS_GALLERY, SCENES_GALLERY))
    print(f"\nPictures: {pictures}; plots: {output_dir / 'evaluation'}")
    return ALL_FINE
