"""`asag-serve`: a bundle behind HTTP, from the command line."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from asag_deploy.backends import DEFAULT_BACKEND, check_runs_here
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.command_line import (
    ALL_FINE,
    MOST_SECONDS,
    OneSentenceParser,
    add_listening,
    add_threshold,
    exit_code,
    real_number,
    whole_number,
)
from asag_deploy.detector_options import add_detector_options, detector_options
from asag_deploy.errors import ConfigError
from asag_deploy.serving.access_log import AccessLog
from asag_deploy.serving.app import check_packages, make_app
from asag_deploy.serving.batching import MOST_IMAGES, Batching
from asag_deploy.serving.limits import Limits
from asag_deploy.serving.options import MOST_DEADLINE_MS
from asag_deploy.serving.protocol import Model
from asag_deploy.serving.server import address_of, allow_connections, bind, make_server, run

PROGRAM = "asag-serve"
_MEBIBYTE = 2**20
_MOST_MEBIBYTES = 4096
_MILLION = 1_000_000
_MOST_MEGAPIXELS = 500


def main(argv: Sequence[str] | None = None) -> int:
    """Run `asag-serve` with these arguments (None: the command line's) and return its exit code.

    143, 130 or 129: stopped by SIGTERM, Ctrl-C or SIGHUP, after answering what it had taken; 2: nothing could
    be served, with the reason in one sentence on stderr.
    """
    return exit_code(PROGRAM, lambda: _serve(_parser().parse_args(argv)))


def _serve(options: argparse.Namespace) -> int:
    check_packages()
    chosen = detector_options(options)
    check_runs_here(chosen.backend)
    limits = Limits(
        requests=chosen.requests,
        queue=options.queue,
        connections=options.connections,
        max_bytes=_bytes(options.max_megabytes),
        max_pixels=_pixels(options.max_megapixels),
        head_seconds=options.head_seconds,
        body_seconds=options.body_seconds,
        queue_seconds=options.queue_seconds,
        answer_seconds=options.answer_seconds,
    )
    batching = Batching(images=options.batch, wait_ms=options.batch_wait_ms)
    allow_connections(limits)
    # Loading takes seconds: what else may be wrong is seen before.
    with _log(options) as log, bind(options.host, options.port) as listener:
        bundle = Bundle.open(options.bundle)
        chosen.stop_rule(bundle.manifest)
        Model(options.model_name, bundle.manifest)
        # The most detections are applied to what is found, as a request may ask for more, and deadlines
        # count from a request's arrival, if it has one.
        own = dataclasses.replace(chosen, max_detections=None, deadline_ms=None)
        with own.load(bundle) as detector:
            if not detector.manifest.trained:
                _warn("the bundle's weights are untrained")
            if batching.images > 1 and (chosen.deadline_ms or MOST_DEADLINE_MS) < MOST_DEADLINE_MS:
                _warn(
                    "with --deadline-ms nothing is batched but requests that lift it "
                    f"(deadline_ms={MOST_DEADLINE_MS:.0f}), since an image with a deadline goes alone"
                )
            app = make_app(
                detector,
                limits,
                backend=chosen.backend or DEFAULT_BACKEND,
                threshold=options.threshold,
                deadline_ms=chosen.deadline_ms,
                max_detections=chosen.max_detections,
                mode=chosen.mode,
                max_level=chosen.max_level,
                anchor_cap=chosen.anchor_cap,
                model_name=options.model_name,
                bundle=bundle.fingerprint,
                batching=batching,
                warm_up=options.warm_up,
                log=log,
            )
            address = f"{PROGRAM}: {detector.manifest.variant} at {address_of(listener)}"
            server = make_server(
                app,
                limits,
                grace_seconds=options.grace_seconds,
                drain_seconds=options.drain_seconds,
                ready=lambda: print(address, flush=True),
            )
            run(server, listener)
    return ALL_FINE


def _warn(sentence: str) -> None:
    print(f"{PROGRAM}: warning: {sentence}", file=sys.stderr)


@contextmanager
def _log(options: argparse.Namespace) -> Iterator[AccessLog | None]:
    """Open the access log, if one is asked for."""
    if options.access_log is None:
        yield None
        return
    log = AccessLog(options.access_log)
    try:
        yield log
    finally:
        log.close()


def _bytes(mebibytes: float) -> int:
    if not 1 / _MEBIBYTE <= mebibytes <= _MOST_MEBIBYTES:
        raise ConfigError(
            f"--max-megabytes is {mebibytes:g}; it must be more than 0, {_MOST_MEBIBYTES} at most"
        )
    return int(mebibytes * _MEBIBYTE)


def _pixels(millions: float) -> int:
    if not 1 / _MILLION <= millions <= _MOST_MEGAPIXELS:
        raise ConfigError(
            f"--max-megapixels is {millions:g}; it must be more than 0, {_MOST_MEGAPIXELS} at most"
        )
    return int(millions * _MILLION)


def _parser() -> argparse.ArgumentParser:
    parser = OneSentenceParser(
        prog=PROGRAM,
        description="Serve a bundle: POST an image file to /detect, and get detections and trace as JSON.",
        epilog="There is no encryption and no authentication: put it behind a proxy that has them.",
    )
    parser.add_argument(
        "bundle",
        metavar="BUNDLE",
        type=Path,
        help="the folder that asag-export has written, or its address",
    )
    add_listening(parser, port=8000)
    add_threshold(parser)
    _add_limits(parser)
    _add_ending(parser)
    _add_ways_to_serve(parser)
    add_detector_options(parser)
    return parser


def _add_limits(parser: argparse.ArgumentParser) -> None:
    """Add what `Limits` are made of."""
    add, time = parser.add_argument, real_number(0, MOST_SECONDS, above=True)
    add(
        "--queue",
        type=whole_number(0),
        default=16,
        metavar="N",
        help="requests that may wait (default: %(default)s)",
    )
    add(
        "--max-megabytes",
        type=real_number(0, _MOST_MEBIBYTES, above=True),
        default=20,
        metavar="M",
        help="largest image (default: %(default)s)",
    )
    text = "pixels of the largest image, in millions (default: %(default)s)"
    add(
        "--max-megapixels",
        type=real_number(0, _MOST_MEGAPIXELS, above=True),
        default=100,
        metavar="M",
        help=text,
    )
    text = "open connections, beyond which only /health and /metrics answer (default: %(default)s)"
    add("--connections", type=whole_number(1), default=256, metavar="N", help=text)
    text = "for a client to send the head of its request in (default: %(default)s)"
    add("--head-seconds", type=time, default=10, metavar="S", help=text)
    text = "for a client to send its image in (default: %(default)s)"
    add("--body-seconds", type=time, default=30, metavar="S", help=text)
    text = "for a request to wait for the network (default: %(default)s)"
    add("--queue-seconds", type=time, default=30, metavar="S", help=text)
    text = "for a client to read its answer in (default: %(default)s)"
    add("--answer-seconds", type=time, default=30, metavar="S", help=text)


def _add_ending(parser: argparse.ArgumentParser) -> None:
    """Add how long the server takes to stop."""
    add = parser.add_argument
    add(
        "--grace-seconds",
        type=whole_number(1, int(MOST_SECONDS)),
        default=30,
        metavar="S",
        help="to end in (default: %(default)s)",
    )
    text = "to go on before that, saying that it is not ready (default: %(default)s)"
    add("--drain-seconds", type=real_number(0, MOST_SECONDS), default=0, metavar="S", help=text)


def _add_ways_to_serve(parser: argparse.ArgumentParser) -> None:
    """Add how it begins, what it writes, what its model is called, and how it batches."""
    add = parser.add_argument
    add("--warm-up", action="store_true", help="try the network before saying that it is ready")
    add("--access-log", type=Path, metavar="FILE", help="write a line of JSON for each request; - is stderr")
    add("--model-name", metavar="NAME", help="in the Open Inference Protocol (default: the variant)")
    text = "images of several requests that go through the network together (default: %(default)s)"
    add("--batch", type=whole_number(1, MOST_IMAGES), default=1, metavar="N", help=text)
    text = "for the first image of a batch to wait for others (default: %(default)s)"
    add("--batch-wait-ms", type=real_number(0, 60_000), default=5, metavar="W", help=text)


if __name__ == "__main__":
    sys.exit(main())
