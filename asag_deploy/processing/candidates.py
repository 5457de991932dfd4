"""The anchors that every level predicted, and what became of them: for traces that explain."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from asag_deploy.bundle.manifest import Probing
from asag_deploy.loop.probing import FIRST_PATCHES, LevelRun
from asag_deploy.loop.stages import Stages
from asag_deploy.loop.trace import LevelCandidates, LevelTrace, ProbingTrace
from asag_deploy.processing.boxes import anchors_of


class Predicted(NamedTuple):
    """The N anchors of a level of a batch of B images, on the host; N is of as many patches as any has."""

    anchors: NDArray[np.floating]
    """(B, N, 5) cx, cy, w, h in the network's pixels, and the score."""
    selected: NDArray[np.bool_]
    """(B, N)"""
    per_patch: int

    @classmethod
    def of(cls, network: Stages, probing: Probing, run: LevelRun) -> Predicted:
        """Bring the anchors of a level to the host."""
        anchors = network.download(run.anchors)
        asked = None if run.selected is None else network.download(run.selected)
        per_patch = {level.level: level.anchors_per_patch for level in probing.levels}
        return cls(
            anchors,
            np.zeros(anchors.shape[:2], dtype=np.bool_) if asked is None else asked,
            per_patch.get(run.level, anchors.shape[1] // FIRST_PATCHES),
        )


def explained(
    network: Stages,
    probing: Probing,
    levels: Sequence[LevelRun],
    traces: Sequence[ProbingTrace],
    decoded: NDArray[np.floating],
    scales: Sequence[tuple[float, float]],
) -> Iterator[ProbingTrace]:
    """Yield the trace of each image of a batch with every anchor that its levels predicted.

    decoded: (B, Q, 4) cx, cy, w, h, the anchors that reached the decoder; boxes are in pixels `scales[i]`
    (x, y) times larger than the network's.
    """
    predicted = [Predicted.of(network, probing, run) for run in levels]
    for image, trace in enumerate(traces):
        own = predicted[: len(trace.levels)]
        reached = decoded[image, : trace.anchor_count]
        found = _with_candidates(trace.levels, own, image, reached, scales[image])
        yield dataclasses.replace(trace, levels=tuple(found))


def _with_candidates(
    levels: Sequence[LevelTrace],
    predicted: Sequence[Predicted],
    image: int,
    decoded: NDArray[np.floating],
    scale: tuple[float, float],
) -> list[LevelTrace]:
    """Return the levels of an image's trace with every anchor that they predicted.

    predicted: of each of the levels; decoded: (q, 4) cx, cy, w, h, the anchors that reached the decoder;
    boxes are in pixels `scale` (x, y) times larger than the network's.
    """
    own = [
        each.anchors[image, : level.patches * each.per_patch]
        for level, each in zip(levels, predicted, strict=True)
    ]
    asked = [
        each.selected[image, : len(anchors)].astype(np.bool_)
        for each, anchors in zip(predicted, own, strict=True)
    ]
    # Those that asked for the last level that was run were not replaced.
    replaced = [mask & (number < len(levels) - 1) for number, mask in enumerate(asked)]
    all_anchors = np.concatenate(own)
    passed = _which(all_anchors, np.concatenate(replaced), decoded)
    ends = np.cumsum([len(anchors) for anchors in own])[:-1]
    return [
        dataclasses.replace(
            level,
            candidates=LevelCandidates(
                boxes=anchors_of(anchors[:, :4], scale),
                scores=anchors[:, 4].astype(np.float32),
                asked=of_level,
                passed=went_on,
                patch=np.arange(len(anchors), dtype=np.int64) // each.per_patch,
            ),
        )
        for level, each, anchors, of_level, went_on in zip(
            levels, predicted, own, asked, np.split(passed, ends), strict=True
        )
    ]


def _which(
    anchors: NDArray[np.floating], replaced: NDArray[np.bool_], decoded: NDArray[np.floating]
) -> NDArray[np.bool_]:
    """Return (n,) which of the anchors (n, 5) are the decoder's (q, 4), which are copies of them.

    Among equal boxes those that were not replaced come first, and then the best scored.
    """
    left = Counter(row.tobytes() for row in _rows(decoded))
    rows = _rows(anchors[:, :4])
    found = np.zeros(len(anchors), dtype=np.bool_)
    for i in np.lexsort((-anchors[:, 4], replaced)):
        row = rows[i].tobytes()
        if left[row] > 0:
            left[row] -= 1
            found[i] = True
    return found


def _rows(boxes: NDArray[np.floating]) -> NDArray[np.float32]:
    return np.ascontiguousarray(boxes, dtype=np.float32)
