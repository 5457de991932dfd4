"""How well two boxes agree: IoU and generalised IoU, pair by pair or for all pairs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from asag_training.network.boxes import area

_TINY = 1e-12
"""Keeps boxes without area from dividing 0 by 0; far below the area of any box that can be seen."""


class Overlap(NamedTuple):
    """Agreement of boxes."""

    iou: Tensor
    """Intersection over union, 0..1."""
    giou: Tensor
    """Generalised IoU, -1..1: IoU less the share of the enclosing box that neither covers."""


def overlap(a: Tensor, b: Tensor) -> Overlap:
    """xyxy boxes (..., 4), which may broadcast against each other -> IoU and GIoU (...)."""
    inner = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    outer = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    shared, enclosing = _product(inner.clamp(min=0)), _product(outer.clamp(min=0))
    union = area(a) + area(b) - shared
    iou = shared / union.clamp(min=_TINY)
    return Overlap(iou, iou - (enclosing - union) / enclosing.clamp(min=_TINY))


def _product(side: Tensor) -> Tensor:
    # Not `prod`, whose gradient waits for the device to look for zeros.
    return side[..., 0] * side[..., 1]


def pairwise_overlap(a: Tensor, b: Tensor) -> Overlap:
    """Each xyxy box of `a` (..., N, 4) with each of `b` (..., M, 4) -> IoU and GIoU (..., N, M)."""
    return overlap(a[..., :, None, :], b[..., None, :, :])
