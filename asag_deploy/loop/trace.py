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
            "levels": [
                {
                    "level": level.level,
                    "patches": level.patches,
                    "patches_dropped": level.patches_dropped,
                    "anchors": level.anchors,
                    "selected": level.selected,
                    "patch_boxes": [[round(float(v), 2) for v in box] for box in level.patch_boxes],
                }
                for level in self.levels
            ],
        }
