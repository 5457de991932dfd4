"""Where the next level looks: greedy NMS over the square patches around the anchors that ask for it.

This is the version for the host, of paper section 4.2.  It takes the same decisions as `patch_nms` of
`plugins/`, for GPUs and for CPUs, and the reference `asag_training.network.operators.patch_nms`, in the same
float32 arithmetic.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


class PatchFinder(Protocol):
    """`patch_nms`, or what does the same faster."""

    def __call__(
        self,
        anchors: NDArray[np.floating],
        selected: NDArray[np.bool_],
        image_size: NDArray[np.int64],
        *,
        stride: int,
        patch_size: int,
        iou_threshold: float,
        capacity: int,
        max_candidates: int,
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return origins (B, capacity, 2) and counts (B,), as `patch_nms` does."""
        ...


def patch_nms(
    anchors: NDArray[np.floating],
    selected: NDArray[np.bool_],
    image_size: NDArray[np.int64],
    *,
    stride: int,
    patch_size: int,
    iou_threshold: float,
    capacity: int,
    max_candidates: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Keep the patches that no better-scored kept patch overlaps too much.

    anchors: (B, N, 5) cx, cy, w, h in pixels, and score; selected: (B, N); image_size: (B, 2) valid height
    and width in pixels.  A patch is `patch_size` cells of `stride` pixels wide and high, around an anchor's
    centre.  It suppresses those scored lower (ties: the later one) whose IoU with it is over the threshold.
    Only the best `max_candidates` selected anchors of an image are considered.

    Returns origins (B, capacity, 2): x, y of the kept patches in cells, best first, moved inside the image,
    zeros beyond the last; and counts (B,): how many were kept, which may exceed the capacity.
    """
    origins = np.zeros((len(anchors), capacity, 2), dtype=np.int64)
    counts = np.zeros(len(anchors), dtype=np.int64)
    half = np.float32(0.5 * stride * patch_size)
    for image in np.flatnonzero(selected.any(axis=1)):
        centres = _best_first(anchors[image], selected[image], max_candidates)
        kept = centres[_greedy(centres - half, centres + half, np.float32(iou_threshold))]
        counts[image] = len(kept)
        kept = kept[:capacity]
        cells = np.ceil(image_size[image, ::-1].astype(np.float32) / stride)  # width, height
        middle = ((kept - half) + (kept + half)) / 2 / stride
        corner = np.floor(middle - np.float32(patch_size / 2))
        origins[image, : len(kept)] = np.maximum(np.minimum(corner, cells - patch_size), 0)
    return origins, counts


def _best_first(anchors: NDArray[np.floating], selected: NDArray[np.bool_], most: int) -> Floats:
    """Return the centres (n, 2) of the best `most` selected anchors whose score is not negative or NaN."""
    candidates = anchors[selected & (anchors[:, 4] >= 0)].astype(np.float32)
    order = np.argsort(-candidates[:, 4], kind="stable")[:most]
    return candidates[order, :2]


def _greedy(low: Floats, high: Floats, iou_threshold: np.float32) -> list[int]:
    """Return which of the squares with corners (n, 2) are kept, best first."""
    # Rows of x and y: each step then reads memory in order.
    low, high = np.ascontiguousarray(low.T), np.ascontiguousarray(high.T)
    side = high - low
    area = side[0] * side[1]
    place = np.arange(len(area))
    kept = []
    while len(place):
        kept.append(int(place[0]))
        overlap = np.minimum(high[:, 1:], high[:, :1]) - np.maximum(low[:, 1:], low[:, :1])
        np.maximum(overlap, 0, out=overlap)
        shared = overlap[0] * overlap[1]
        stays = ~(shared / (area[1:] + area[0] - shared) > iou_threshold)
        place, area = place[1:][stays], area[1:][stays]
        low, high = low[:, 1:][:, stays], high[:, 1:][:, stays]
    return kept
