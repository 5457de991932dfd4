"""`asag-playground`: a bundle on a page of its own, from the command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from asag_deploy.backends import DEFAULT_BACKEND
from asag_deploy.command_line import (
    ALL_FINE,
    OneSentenceParser,
    add_listening,
    add_threshold,
    exit_code,
)
from asag_deploy.detector_options import add_detector_options, detector_options
from asag_deploy.playground.examples import list_examples, own_examples, prepare
from asag_deploy.playground.looking import Ranges
from asag_deploy.playground.page import make_page
from asag_deploy.playground.server import check_gradio, make_server, silent_gradio
from asag_deploy.playground.shelf import Shelf
from asag_deploy.playground.turns import Turns
from asag_deploy.scratch import scratch_folder
from asag_deploy.serving.server import address_of, bind, run

PROGRAM = "asag-playground"


def main(argv: Sequence[str] | None = None) -> int:
    """Run `asag-playground` with these arguments (None: the command line's) and return its exit code.

    143, 130 or 129: stopped by SIGTERM, Ctrl-C or SIGHUP; 2: there is no page, with the reason in one
    sentence on stderr.
    """
    return exit_code(PROGRAM, lambda: _play(_parser().parse_args(argv)))


def _play(options: argparse.Namespace) -> int:
    check_gradio()
    chosen = detector_options(options)
    given = None if options.examples is None else list_examples(options.examples)
    # What takes a while, such as loading, comes after what may be wrong.
    with (
        bind(options.host, options.port) as listener,
        chosen.load(options.bundle) as detector,
        scratch_folder() as scratch,
    ):
        manifest = detector.manifest
        if not manifest.trained:
            print(f"{PROGRAM}: warning: the bundle's weights are untrained", file=sys.stderr)
        files = own_examples(manifest) if given is None else given
        examples = prepare(files, scratch / "examples")
        with silent_gradio(scratch / "gradio"), Turns(at_once=chosen.requests) as turns:
            page = make_page(
                detector,
                Ranges.of(manifest).first_choices(chosen, options.threshold),
                turns=turns,
                backend=chosen.backend or DEFAULT_BACKEND,
                examples=examples,
                shelf=Shelf(scratch / "gradio" / "shown"),
            )
            address = f"{PROGRAM}: {manifest.variant} at {address_of(listener)}"
            server = make_server(page, allowed=scratch / "examples", ready=lambda: print(address, flush=True))
            run(server, listener)
    return ALL_FINE


def _parser() -> argparse.ArgumentParser:
    parser = OneSentenceParser(
        prog=PROGRAM,
        description="Try a bundle on a page in the browser, which shows how probing decided, level by level.",
        epilog="There is no encryption and no authentication; by default only this machine sees the page.",
    )
    add = parser.add_argument
    add("bundle", metavar="BUNDLE", type=Path, help="the folder that asag-export has written, or its address")
    add_listening(parser, port=7860)
    add(
        "--examples",
        type=Path,
        metavar="DIR",
        help="pictures to offer, a dozen at most (default: some that come with the package)",
    )
    add_threshold(parser, "least confidence to begin with")
    add_detector_options(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
