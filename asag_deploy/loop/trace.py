"""The probing trace: what the network decided for one image, level by level."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asag_deploy.bundle.manifest import Level


class StopReason(StrEnum):
    """Why probing went no further for an image."""

    NOTHING_SELECTED = "nothing selected"
    """Early stop: no anchor asked for a closer look."""
    FEW_SELECTED = "few selected"
    """Early stop of `fast` mode: fewer than 3 anchors asked for one."""
    MAX_LEVEL = "max level"
    """The manual stop: deeper levels were ruled out by the caller."""
    DEADLINE = "deadline"
    """The time allowed had passed."""
    LAST_LEVEL = "last level"
    """P3 was probed; there is none below it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LevelCandidates:
    """The n anchors that a level predicted for an image, whatever became of them."""

    boxes: NDArray[np.float32]
    """(n, 4) x1, y1, x2, y2 in the pixels that patches are in; they may reach beyond the image."""
    scores: NDArray[np.float32]
    """(n,) from 0 to 1."""
    asked: NDArray[np.bool_]
    """(n,) which were uncertain and small enough to ask for a closer look on the next level."""
    passed: NDArray[np.bool_]
    """(n,) which reached the decoder; of those that asked none, if the next level was probed."""
    patch: NDArray[np.int64]
    """(n,) which of the level's patches predicted each: an index into `LevelTrace.patch_boxes`."""

    def to_dict(self) -> dict[str, Any]:
        """Return them as plain JSON values."""
        return {
            "boxes": [[round(float(v), 2) for v in box] for box in self.boxes],
            "scores": [round(float(score), 6) for score in self.scores],
            "asked": self.asked.tolist(),
            "passed": self.passed.tolist(),
            "patch": self.patch.tolist(),
        }


@dataclass(frozen=True, kw_only=True)
class LevelTrace:
    """One level that was run for an image."""

    level: Level
    patches: int
    """Patches predicted on: 5 on the first level (four of P5 and one of P6)."""
    patches_dropped: int
    """Patches that would have been probed but for the level's limit or capacity; 0 means nothing was lost.
    A selected anchor that patch NMS had no room for counts as one, so this may be too many, never too few."""
    anchors: int
    """Anchors this level passed on."""
    selected: int
    """Anchors that asked for a closer look on the next level."""
    patch_boxes: NDArray[np.float32]
    """Where the patches lay, (patches, 4) x1, y1, x2, y2 in pixels; of the original image in `Detections`."""
    candidates: LevelCandidates | None = None
    """Every anchor it predicted, if the call asked to `explain`."""

    def to_dict(self) -> dict[str, Any]:
        """Return the level as plain JSON values."""
        plain: dict[str, Any] = {
            "level": self.level,
            "patches": self.patches,
            "patches_dropped": self.patches_dropped,
            "anchors": self.anchors,
            "selected": self.selected,
            "patch_boxes": [[round(float(v), 2) for v in box] for box in self.patch_boxes],
        }
        return plain if self.candidates is None else plain | {"candidates": self.candidates.to_dict()}


@dataclass(frozen=True, kw_only=True)
class ProbingTrace:
    """What happened to one image on its way through the anchor generator."""

    levels: tuple[LevelTrace, ...]
    stop: StopReason
    anchor_count: int
    """Anchors that reached the decoder, after floor and cap."""

    @property
    def exit_level(self) -> Level:
        """The deepest level that was run."""
        return self.levels[-1].level

    def to_dict(self) -> dict[str, Any]:
        """Return the trace as plain JSON values."""
        return {
            "exit_level": self.exit_level,
            "stop": self.stop.value,
            "anchor_count": self.anchor_count,
            "levels": [level.to_dict() for level in self.levels],
        }
