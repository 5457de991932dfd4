"""What one call of a detector may ask for, and what that makes of the probing loop."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np

from asag_deploy.bundle.manifest import Level, Manifest, Mode, Probing
from asag_deploy.bundle.manifest_json import export_again, export_with
from asag_deploy.errors import ConfigError
from asag_deploy.kernels.limits import MOST_ANCHORS
from asag_deploy.loop.stopping import StopRule, stop_rule


class CallOptions(TypedDict, total=False):
    """What a call may ask for; None, or leaving it out, is what the detector was loaded for."""

    threshold: float | None
    """Least confidence, 0 to 1, of the detections returned; all of them if there is none."""
    mode: Mode | None
    """`exact` or `fast`, see `Detector.load`."""
    max_level: Level | None
    """The deepest level that may be probed: `P5`, `P4` or `P3` (the paper's manual stop)."""
    deadline_ms: float | None
    """No further level is begun once the call has taken this many milliseconds; `math.inf` for none."""
    max_detections: int | None
    """The most detections of an image, from 1 to what the bundle was exported for."""
    anchor_cap: int | None
    """The most anchors that reach the decoder, best-scored first: from the floor to the bundle's own cap."""
    explain: bool
    """Whether the trace keeps the anchors of every level (`LevelTrace.candidates`)."""


OPTION_NAMES = tuple(CallOptions.__annotations__)


@dataclass(frozen=True, kw_only=True)
class Call:
    """What one call asks for, checked."""

    probing: Probing
    """The bundle's parameters, with the call's cap."""
    rule: StopRule
    """When to stop, the deadline included."""
    threshold: float
    max_detections: int | None
    explain: bool


@dataclass(frozen=True, kw_only=True)
class CallLimits:
    """What calls of a detector may ask for, and what they get if they do not.

    Raises ConfigError for defaults that the bundle cannot keep.
    """

    manifest: Manifest
    rule: StopRule
    deadline_ms: float | None = None
    max_detections: int | None = None
    anchor_cap: int | None = None

    def __post_init__(self) -> None:
        _deadline(self.deadline_ms)
        self._max_detections(self.max_detections)
        self._probing(self.anchor_cap)

    def of(self, options: CallOptions, *, start: float) -> Call:
        """Return what a call with these options, which began at `start` (`time.perf_counter`), is to do.

        Raises ConfigError for what makes no sense or is beyond the bundle, TypeError for an unknown name.
        """
        unknown = [name for name in options if name not in OPTION_NAMES]
        if unknown:
            raise TypeError(f"there is no option '{unknown[0]}'; the options are {', '.join(OPTION_NAMES)}")
        asked = _asked(options, "deadline_ms", self.deadline_ms)
        deadline_ms = _deadline(asked)
        return Call(
            probing=self._probing(_asked(options, "anchor_cap", self.anchor_cap)),
            rule=dataclasses.replace(
                self._rule(options.get("mode"), options.get("max_level")),
                deadline=None if deadline_ms is None else start + deadline_ms / 1000,
            ),
            threshold=_threshold(options.get("threshold")),
            max_detections=self._max_detections(_asked(options, "max_detections", self.max_detections)),
            explain=_explain(options.get("explain", False)),
        )

    def _rule(self, mode: Mode | None, max_level: Level | None) -> StopRule:
        if mode is None and max_level is None:
            return self.rule
        asked = stop_rule(self.manifest, mode, max_level)
        if mode is None:
            return dataclasses.replace(self.rule, max_level=asked.max_level)
        return asked if max_level is not None else dataclasses.replace(asked, max_level=self.rule.max_level)

    def _probing(self, cap: int | None) -> Probing:
        probing = self.manifest.probing
        if cap is None:
            return probing
        _check_whole("anchor_cap", cap)
        least = max(probing.anchor_floor, 1)
        if cap < least:
            raise ConfigError(f"anchor_cap is {cap}; the bundle's network passes at least {least} anchors")
        if cap > max(MOST_ANCHORS, probing.anchor_cap):
            raise ConfigError(f"anchor_cap is {cap}; no bundle can be exported for more than {MOST_ANCHORS}")
        if cap > probing.anchor_cap:
            raise ConfigError(
                f"anchor_cap is {cap}, and the bundle was exported for {probing.anchor_cap} at most; "
                f"{export_with(self.manifest, f'--anchor-cap {cap}')}"
            )
        if cap < probing.anchor_cap and not probing.cap_can_be_lowered:
            raise ConfigError(
                f"anchor_cap is {cap}, and the bundle is of a release whose cap of {probing.anchor_cap} is "
                f"fixed; {export_again(self.manifest)}"
            )
        return dataclasses.replace(probing, anchor_cap=cap)

    def _max_detections(self, most: int | None) -> int | None:
        if most is None:
            return None
        _check_whole("max_detections", most)
        exported = self.manifest.postprocessing.max_detections
        if most < 1:
            raise ConfigError(f"max_detections is {most}; expected at least 1")
        if most > exported:
            raise ConfigError(
                f"max_detections is {most}, and the bundle was exported for {exported} at most; "
                f"{export_with(self.manifest, f'--max-detections {most}')}"
            )
        return most


def _asked(options: CallOptions, name: str, default: Any) -> Any:
    value = options.get(name)
    return default if value is None else value


def _deadline(milliseconds: float | None) -> float | None:
    """Return a deadline that makes sense; None if there is none."""
    if milliseconds is None:
        return None
    _check_real("deadline_ms", milliseconds)
    if not milliseconds > 0:
        raise ConfigError(f"deadline_ms is {milliseconds:g}; expected more than 0 milliseconds, or None")
    return None if math.isinf(milliseconds) else float(milliseconds)


def _threshold(value: float | None) -> float:
    if value is None:
        return 0.0
    _check_real("threshold", value)
    if not 0 <= value <= 1:
        raise ConfigError(f"threshold is {value:g}; expected 0 to 1")
    return float(value)


def _explain(value: object) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise ConfigError(f"explain is {value!r}; expected True or False")
    return bool(value)


def _check_whole(name: str, value: object) -> None:
    if isinstance(value, bool) or not hasattr(value, "__index__") or np.ndim(value) > 0:  # type: ignore[arg-type]
        raise ConfigError(f"{name} is {value!r}; expected a whole number")


def _check_real(name: str, value: object) -> None:
    if isinstance(value, bool) or not hasattr(value, "__float__") or np.ndim(value) > 0:  # type: ignore[arg-type]
        raise ConfigError(f"{name} is {value!r}; expected a number")
    try:
        float(value)
    except OverflowError:
        raise ConfigError(f"{name} is too large a number") from None
