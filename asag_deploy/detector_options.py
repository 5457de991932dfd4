"""The detector's command-line options: declared once, the same in every program that loads a detector."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from asag_deploy.backends import DEFAULT_BACKEND, check_backend, open_network
from asag_deploy.backends.network import Network
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.bundle.manifest import Level, Manifest, Mode
from asag_deploy.call_options import OPTION_NAMES, CallLimits
from asag_deploy.command_line import (
    MOST_SECONDS,
    MOST_THREADS,
    listed,
    real_number,
    whole_number,
)
from asag_deploy.detector import Detector
from asag_deploy.errors import ConfigError
from asag_deploy.loop.loop import LOOPS, LoopChoice
from asag_deploy.loop.stopping import StopRule, stop_rule


@dataclass(frozen=True, kw_only=True)
class DetectorOptions:
    """How to load a detector, see `asag_deploy.Detector.load`.

    Raises ConfigError, in the words of the command line, when a value makes no sense.
    """

    backend: str | None = None
    mode: Mode | None = None
    max_level: Level | None = None
    deadline_ms: float | None = None
    loop: LoopChoice = "auto"
    threads: int | None = None
    requests: int = 1
    max_detections: int | None = None
    anchor_cap: int | None = None

    def __post_init__(self) -> None:
        for option, number in (("threads", self.threads), ("requests", self.requests)):
            if number is not None and not 1 <= number <= MOST_THREADS:
                raise ConfigError(f"--{option} is {number}; it must be from 1 to {MOST_THREADS}")
        if self.deadline_ms is not None and not 0 < self.deadline_ms < math.inf:
            raise ConfigError(f"--deadline-ms is {self.deadline_ms:g}; it must be more than 0, and finite")

    def load(self, bundle: str | os.PathLike[str] | Bundle) -> Detector:
        """Load a detector; raises what `asag_deploy.Detector.load` does."""
        with _in_words_of_the_command_line():
            return Detector.load(bundle, **dataclasses.asdict(self))

    def stop_rule(self, manifest: Manifest) -> StopRule:
        """Return the rule by which probing stops.

        Raises ConfigError, as loading a detector does, for options that a network cannot keep.
        """
        with _in_words_of_the_command_line():
            rule = stop_rule(manifest, self.mode, self.max_level)
            CallLimits(
                manifest=manifest,
                rule=rule,
                deadline_ms=self.deadline_ms,
                max_detections=self.max_detections,
                anchor_cap=self.anchor_cap,
            )
        return rule

    def open_network(self, bundle: Bundle) -> Network:
        """Load a bundle's network alone; raises what `asag_deploy.backends.open_network` does."""
        return open_network(self.backend, bundle, self.threads, self.requests)


@contextlib.contextmanager
def _in_words_of_the_command_line() -> Iterator[None]:
    """Let a message that begins with an option's name in Python begin with its name on the command line."""
    try:
        yield
    except ConfigError as error:
        name, space, said = str(error).partition(" ")
        if name not in OPTION_NAMES:
            raise
        raise ConfigError(f"--{name.replace('_', '-')}{space}{said}") from None


def add_detector_options(
    parser: argparse.ArgumentParser,
    *,
    several_backends: bool = False,
    own_requests: bool = False,
    limits: bool = True,
) -> None:
    """Add the options that `detector_options` reads.

    several_backends: `--backend` takes names with commas, or several times; `backends_of` reads them.
    own_requests: the program has an option `--requests` of its own; what is read is 1.
    limits: with `--max-detections` and `--anchor-cap`.
    """
    add = parser.add_argument_group("detector").add_argument
    several: dict[str, Any] = {"action": "append", "default": [], "metavar": "B,..."}
    add(
        "--backend",
        help=f"what runs the network (default: {DEFAULT_BACKEND}; see asag-detect --doctor)",
        **(several if several_backends else {"metavar": "B"}),
    )
    add("--mode", choices=("exact", "fast"), help="how far to probe (default: as the bundle was exported)")
    add("--max-level", choices=("P5", "P4", "P3"), help="probe no deeper than this level")
    add(
        "--deadline-ms",
        type=real_number(0, MOST_SECONDS * 1000, above=True),
        metavar="D",
        help="begin no further level after D milliseconds",
    )
    add(
        "--loop",
        choices=LOOPS,
        default="auto",
        help="who decides how far to probe: the host, or with TensorRT the GPU itself (default: auto)",
    )
    add(
        "--threads",
        type=whole_number(1, MOST_THREADS),
        metavar="N",
        help="CPU threads (default: the backend's choice)",
    )
    parser.set_defaults(requests=1)
    if not own_requests:
        text = "calls at once, each on its share of the threads (default: 1)"
        add("--requests", type=whole_number(1, MOST_THREADS), default=1, metavar="N", help=text)
    parser.set_defaults(max_detections=None, anchor_cap=None)
    if limits:
        text = "the most detections of an image (default: as the bundle was exported, which is the most)"
        add("--max-detections", type=whole_number(1), metavar="N", help=text)
        text = "the most anchors that reach the decoder (default: as the bundle was exported, the most too)"
        add("--anchor-cap", type=whole_number(1), metavar="N", help=text)


def detector_options(parsed: argparse.Namespace, *, backend: str | None = None) -> DetectorOptions:
    """Read the options of `add_detector_options`.

    backend: one of several that were asked for; None for the only one.
    """
    values = {field.name: getattr(parsed, field.name) for field in dataclasses.fields(DetectorOptions)}
    asked = parsed.backend if isinstance(parsed.backend, str) else None
    return DetectorOptions(**{**values, "backend": asked if backend is None else backend})


def backends_of(parsed: argparse.Namespace) -> tuple[str, ...]:
    """Return the backends asked for by `--backend` with `several_backends`, each once.

    Raises ConfigError for a name that is no backend.
    """
    names = listed(parsed.backend)
    for name in names:
        check_backend(name)
    return names or (DEFAULT_BACKEND,)
