"""The network's output as the losses take it: everything it predicted, level by level and head by head.

B images, K patches per image, A anchors per patch, Q queries, N denoising queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from asag_training.network.model import HeadOutput


class LevelOutput(NamedTuple):
    """The anchors of one level, patch by patch, before anything was filtered."""

    level: str
    """'P6' (the whole image), 'P5' (its four quadrants), 'P4' or 'P3' (probed patches)."""
    raw: Tensor
    """(B, K, A, 5): sigmoid cx, cy, w, h relative to the patch, and a score logit."""
    origins: Tensor | None
    """int64 (B, K, 2) x, y of each patch in cells of the level, for P4 and P3; None for P5 and P6, whose
    patches are the same for every image (`asag_training.network.anchor_generator.QUADRANTS`)."""
    real: Tensor
    """bool (B, K): patches that exist; the rest only fill up the batch."""
    flips: tuple[tuple[bool, bool], ...] | None = None
    """For P6 in training, how each of the K patches was flipped: (horizontally, vertically); else None."""


@dataclass(frozen=True, eq=False)
class Denoising:
    """The denoising queries, which come before the anchors' in every head's output."""

    count: int
    """N, the same for every image."""
    target: Tensor
    """int64 (B, N): which target each query is a noised copy of; -1 for queries that only fill up."""


@dataclass(frozen=True, kw_only=True)
class NetworkOutput:
    """All that the losses look at."""

    image_size: Tensor
    """(B, 2) valid height and width in pixels."""
    levels: tuple[LevelOutput, ...]
    """P6, P5, and the probed levels that were run."""
    anchors: Tensor
    """(B, Q, 4) cxcywh in pixels: what the relation block started from, without denoising queries."""
    valid: Tensor
    """bool (B, Q): anchors that are real."""
    relation: HeadOutput
    """Logits (B, N + Q, classes) and boxes (B, N + Q, 4) of the relation block."""
    heads: dict[str, HeadOutput]
    """The same of each parallel decoder by name, and of its layers before the last where it has several
    (`AsagConfig.layer_names`)."""
    denoising: Denoising | None = None
