"""What a request may ask of the detector: one table for the checks, the OpenAPI document and the sentences.

The same names stand for query parameters, fields of a form, and the `parameters` of an inference request.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, cast

from asag_deploy.bundle.manifest import FIRST_LEVEL, Level, Manifest, Mode
from asag_deploy.call_options import CallOptions
from asag_deploy.command_line import MOST_SECONDS
from asag_deploy.detections import Detections
from asag_deploy.errors import ConfigError
from asag_deploy.plain_numbers import real, whole
from asag_deploy.serving.limits import RefusedError, unavailable
from asag_deploy.serving.texts import shown

MOST_DEADLINE_MS = MOST_SECONDS * 1000

_LEAST_MS = 1e-3
"""What a detector is given whose deadline has passed once its image was decoded: the coarsest answer."""


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One thing that a request may ask for."""

    name: str
    text: str
    """What it does, for the OpenAPI document."""
    schema: Callable[[Manifest], dict[str, Any]]
    """The JSON schema of its values, for a bundle; by it they are checked."""


def _levels(manifest: Manifest) -> list[str]:
    return [FIRST_LEVEL, *(level.level for level in manifest.probing.levels)]


def _modes(manifest: Manifest) -> list[str]:
    return ["fast"] if manifest.probing.mode == "fast" else ["exact", "fast"]


def _caps(manifest: Manifest) -> dict[str, Any]:
    probing = manifest.probing
    least = max(probing.anchor_floor, 1) if probing.cap_can_be_lowered else probing.anchor_cap
    return {"type": "integer", "minimum": least, "maximum": probing.anchor_cap}


PARAMETERS = (
    Parameter(
        name="threshold",
        text="Least confidence of the detections in the answer.",
        schema=lambda _: {"type": "number", "minimum": 0, "maximum": 1},
    ),
    Parameter(
        name="mode",
        text="How far to probe: `exact`, or `fast`, which stops sooner and looks at fewer patches.",
        schema=lambda manifest: {"type": "string", "enum": _modes(manifest)},
    ),
    Parameter(
        name="max_level",
        text="The deepest level that may be probed.",
        schema=lambda manifest: {"type": "string", "enum": _levels(manifest)},
    ),
    Parameter(
        name="deadline_ms",
        text=(
            "Milliseconds from the arrival of the request. No further level is begun once they have passed, "
            "so that the answer is coarser; if they pass before its turn comes, the answer is 503. The "
            "greatest value is no deadline, where the server has one for requests that name none."
        ),
        schema=lambda _: {"type": "number", "exclusiveMinimum": 0, "maximum": MOST_DEADLINE_MS},
    ),
    Parameter(
        name="max_detections",
        text="The most detections of the answer, best first.",
        schema=lambda manifest: {
            "type": "integer",
            "minimum": 1,
            "maximum": manifest.postprocessing.max_detections,
        },
    ),
    Parameter(
        name="anchor_cap",
        text="The most anchors that reach the decoder, best first.",
        schema=_caps,
    ),
)
"""All there are."""
_BY_NAME = {parameter.name: parameter for parameter in PARAMETERS}
NAMES = ", ".join(_BY_NAME)

_OF_THE_CALL = ("mode", "max_level", "anchor_cap")
"""What the detector itself is told; threshold and number are applied to what it finds, so that images whose
requests differ in nothing else can go through the network together."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What one request asks for."""

    threshold: float
    max_detections: int | None = None
    deadline_ms: float | None = None
    """From the arrival of the request; None for none."""
    call: CallOptions = field(default_factory=CallOptions)
    """What the detector itself is told."""
    given: Mapping[str, Any] = field(default_factory=dict)
    """What the request named, for the log."""

    def of(self, found: Detections) -> Detections:
        """Return the detections that are asked for, of those that were found."""
        kept = found.filter(self.threshold)
        if self.max_detections is None or len(kept) <= self.max_detections:
            return kept
        best = slice(self.max_detections)
        return dataclasses.replace(
            kept, xyxy=kept.xyxy[best], confidence=kept.confidence[best], class_id=kept.class_id[best]
        )


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What holds where a request names nothing else."""

    threshold: float
    deadline_ms: float | None = None
    max_detections: int | None = None
    mode: Mode | None = None
    """This and what follows is what the detector was loaded for: it is said to clients, and no more."""
    max_level: Level | None = None
    anchor_cap: int | None = None

    def __post_init__(self) -> None:
        check_threshold(self.threshold)


def read_asked(
    pairs: Iterable[tuple[str, Any]], manifest: Manifest, defaults: Defaults, *, beside: str = ""
) -> Asked:
    """Read what a request asks for from names and values, which are text, or numbers from JSON.

    beside: other names that the sentence about unknown ones lists.

    Raises RefusedError, with one sentence, for unknown names, for values that make no sense with the bundle,
    and for what is given twice.
    """
    given: dict[str, Any] = {}
    for name, value in pairs:
        parameter = _BY_NAME.get(name)
        if parameter is None:
            raise _bad(f"unknown parameter '{shown(name)}'; there are {NAMES}{beside}")
        if name in given:
            raise _bad(f"{name} is given more than once; give it once")
        given[name] = checked(name, parameter.schema(manifest), value)
    return Asked(
        threshold=given.get("threshold", defaults.threshold),
        max_detections=given.get("max_detections", defaults.max_detections),
        deadline_ms=_unless_lifted(given.get("deadline_ms", defaults.deadline_ms)),
        call=cast(CallOptions, {name: given[name] for name in _OF_THE_CALL if name in given}),
        given=given,
    )


def checked(name: str, schema: Mapping[str, Any], value: object) -> Any:
    """Return a value, of the type that its schema names; raises RefusedError if it is not allowed."""
    text = value if isinstance(value, str) else ""
    if isinstance(value, int | float) and not isinstance(value, bool):
        text = repr(value)
    if not isinstance(value, str) and not text:
        raise _bad(f"{name} is of the wrong type; expected {_expected(schema)}")
    refused = _bad(f"{name} is '{shown(text)}', which is not {_expected(schema)}")
    if "enum" in schema:
        if text not in schema["enum"]:
            raise refused
        return text
    number = whole(text) if schema["type"] == "integer" else real(text)
    if number is None:
        raise refused
    above = (
        number > schema["exclusiveMinimum"] if "exclusiveMinimum" in schema else number >= schema["minimum"]
    )
    if not (above and number <= schema["maximum"]):
        raise refused
    return number


def check_threshold(threshold: float) -> None:
    """Raise ConfigError unless a threshold is from 0 to 1."""
    if not 0 <= threshold <= 1:
        raise ConfigError(f"--threshold is {threshold:g}, which is not between 0 and 1")


def _unless_lifted(deadline_ms: float | None) -> float | None:
    """Return a deadline; None for the greatest that may be named, by which a request lifts a default."""
    return None if deadline_ms is None or deadline_ms >= MOST_DEADLINE_MS else deadline_ms


class Deadline:
    """When a request has to be answered: so many milliseconds after it has arrived, or never."""

    def __init__(self, arrived: float, milliseconds: float | None, *, name: str = "deadline_ms") -> None:
        """Begin at `arrived`, a `time.perf_counter()` value; name: what the request calls it."""
        self._name = name
        self._milliseconds = milliseconds
        self._end = math.inf if milliseconds is None else arrived + milliseconds / 1000

    @property
    def seconds_left(self) -> float:
        """How much is left; less than 0 if it has passed, infinite if there is none."""
        return self._end - time.perf_counter()

    @property
    def ever(self) -> bool:
        """Whether there is one."""
        return self._milliseconds is not None

    def added_to(self, options: CallOptions) -> CallOptions:
        """Return the options of a call that begins now, with what is left of the deadline."""
        if self._milliseconds is None:
            return options
        return {**options, "deadline_ms": max(self.seconds_left * 1000, _LEAST_MS)}

    def check(self) -> None:
        """Raise RefusedError if it has passed."""
        if self.seconds_left <= 0:
            raise self.refusal()

    def refusal(self) -> RefusedError:
        """Make the refusal of a request whose deadline has passed before its turn."""
        return unavailable(
            f"the {self._milliseconds:g} ms of {self._name} had passed before the network had time; allow "
            "more, or try again later",
            "deadline",
        )


def _expected(schema: Mapping[str, Any]) -> str:
    if "enum" in schema:
        return f"one of {', '.join(schema['enum'])}"
    whole = "whole " if schema["type"] == "integer" else ""
    if "exclusiveMinimum" in schema:
        return f"a number above {schema['exclusiveMinimum']}, {schema['maximum']:.0f} at most"
    if schema["minimum"] == schema["maximum"]:
        return f"{schema['minimum']}, the only value that this bundle takes"
    return f"a {whole}number between {schema['minimum']} and {schema['maximum']}"


def _bad(sentence: str) -> RefusedError:
    return RefusedError(HTTPStatus.BAD_REQUEST, sentence, reason="bad_parameter")
