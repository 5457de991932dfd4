"""When probing stops: the rule, and the decision for each image of a batch (paper, sections 4.2 and 5.1)."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from asag_deploy.bundle.manifest import FIRST_LEVEL, Level, Manifest, Mode
from asag_deploy.bundle.manifest_json import export_with
from asag_deploy.errors import ConfigError
from asag_deploy.loop.stages import Counts
from asag_deploy.loop.trace import StopReason

FAST_MIN_SELECTED = 3
FAST_MAX_PATCHES = 15
_DEPTH: dict[Level, int] = {"P5": 0, "P4": 1, "P3": 2}


@dataclass(frozen=True, kw_only=True)
class StopRule:
    """When to stop (paper, section 5.1: fast inference stops below 3 selected, 15 patches a level)."""

    min_selected: int = 1
    max_patches: int | None = None
    max_level: Level = "P3"
    deadline: float | None = None
    """A `time.perf_counter()` value after which no further level is begun."""

    def allows(self, level: Level) -> bool:
        """Tell whether the manual stop lets `level` be probed."""
        return _DEPTH[level] <= _DEPTH[self.max_level]


def stop_rule(manifest: Manifest, mode: Mode | None, max_level: Level | None) -> StopRule:
    """Make the rule by which a bundle's probing stops, from what `Detector.load` was asked.

    Raises ConfigError for what the bundle cannot do.
    """
    probing = manifest.probing
    mode = probing.mode if mode is None else mode
    if mode not in ("exact", "fast"):
        raise ConfigError(f"unknown mode '{mode}'; expected 'exact' or 'fast'")
    if mode == "exact" and probing.mode == "fast":
        raise ConfigError(
            "the bundle was exported for mode 'fast' and cannot run in mode 'exact'; "
            f"{export_with(manifest, '--mode exact')}"
        )
    levels: list[Level] = [FIRST_LEVEL, *(level.level for level in probing.levels)]
    deepest = levels[-1] if max_level is None else max_level
    if deepest not in ("P5", "P4", "P3"):
        raise ConfigError(f"unknown max_level '{deepest}'; expected 'P5', 'P4' or 'P3'")
    if deepest not in levels:
        raise ConfigError(
            f"max_level '{deepest}' is beyond the bundle, which was exported up to {levels[-1]}; "
            f"{export_with(manifest, f'--levels {deepest.lower()}-p6')}"
        )
    if mode == "exact":
        return StopRule(max_patches=probing.max_patches, max_level=deepest)
    most = min(FAST_MAX_PATCHES, probing.max_patches or FAST_MAX_PATCHES)
    return StopRule(min_selected=FAST_MIN_SELECTED, max_patches=most, max_level=deepest)


class Decisions:
    """Which image goes on to the next level, and why the others do not."""

    def __init__(self, batch: int) -> None:
        self._stop: list[StopReason | None] = [None] * batch
        self._probed: list[NDArray[np.bool_]] = []

    def who_goes_on(self, rule: StopRule, level: Level, counts: Counts) -> NDArray[np.bool_]:
        """Return (B,) which images are to be probed on `level`, by what the level before it reported."""
        for i, selected in enumerate(counts.selected):
            if selected < rule.min_selected:
                self._note(i, StopReason.FEW_SELECTED if selected else StopReason.NOTHING_SELECTED)
        if not rule.allows(level):
            self._note_all(StopReason.MAX_LEVEL)
        if rule.deadline is not None and time.perf_counter() > rule.deadline:
            self._note_all(StopReason.DEADLINE)
        self._probed.append(np.array([reason is None for reason in self._stop]))
        return self._probed[-1]

    def probed(self, levels: int) -> NDArray[np.bool_]:
        """Return (B, levels) which image was probed on which level."""
        missing = [np.zeros(len(self._stop), dtype=np.bool_)] * (levels - len(self._probed))
        columns = [*self._probed, *missing]
        return np.stack(columns, axis=1) if columns else np.zeros((len(self._stop), 0), dtype=np.bool_)

    def reasons(self, deepest: Level) -> list[StopReason]:
        """Return (B,) why each image went no further; `deepest` is the last level that was run."""
        at_the_end = StopReason.LAST_LEVEL if deepest == "P3" else StopReason.MAX_LEVEL
        return [reason or at_the_end for reason in self._stop]

    def _note(self, image: int, reason: StopReason) -> None:
        self._stop[image] = self._stop[image] or reason

    def _note_all(self, reason: StopReason) -> None:
        for i in range(len(self._stop)):
            self._note(i, reason)
