"""Box arithmetic.  Boxes are (..., 4); the name of a function says which format it takes.

xyxy    x1, y1, x2, y2
cxcywh  centre x, centre y, width, height
xyzr    centre x, centre y, z = log2 sqrt(w h), r = log2(h / w) / 2, in cells of P2 (AdaMixer's query format)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_TINY = 1e-12
"""Keeps boxes without area from dividing 0 by 0; far below the area of any box that can be seen."""


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Convert (..., 4) cxcywh to (..., 4) xyxy."""
    cx, cy, w, h = boxes.unbind(-1)
    return torch.stack([cx - 0.5 * w, cy - 0.5 * h, cx + 0.5 * w, cy + 0.5 * h], dim=-1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Convert (..., 4) xyxy to (..., 4) cxcywh."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], dim=-1)


def area(boxes: Tensor) -> Tensor:
    """Return the area (...) of xyxy boxes (..., 4)."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def intersection(a: Tensor, b: Tensor) -> Tensor:
    """Return the area that each of `a` (..., N, 4) shares with each of `b` (..., M, 4), both xyxy -> (..., N,
    M)."""
    # Axis by axis: CPUs read rows of M numbers several times as fast as rows of pairs.
    (left, top, right, bottom), others = a[..., :, None, :].unbind(-1), b[..., None, :, :].unbind(-1)
    width = (torch.minimum(right, others[2]) - torch.maximum(left, others[0])).clamp(min=0)
    height = (torch.minimum(bottom, others[3]) - torch.maximum(top, others[1])).clamp(min=0)
    return width * height


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Return intersection over union of xyxy boxes (..., N, 4) and (..., M, 4) -> (..., N, M)."""
    shared = intersection(a, b)
    return shared / (area(a)[..., :, None] + area(b)[..., None, :] - shared)


def iof(boxes: Tensor) -> Tensor:
    """Return intersection over the first box's own area, for every pair of xyxy boxes (..., N, 4) -> (..., N,
    N)."""
    return intersection(boxes, boxes) / area(boxes)[..., :, None].clamp(min=1e-6)


class Overlap(NamedTuple):
    """Agreement of boxes."""

    iou: Tensor
    """Intersection over union, 0..1."""
    giou: Tensor
    """Generalised IoU, -1..1: IoU less the share of the enclosing box that neither covers."""


def overlap(a: Tensor, b: Tensor) -> Overlap:
    """Return IoU and GIoU (...) of xyxy boxes (..., 4), which may broadcast against each other."""
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
    """Return IoU and GIoU (..., N, M) of each xyxy box of `a` (..., N, 4) with each of `b` (..., M, 4)."""
    return overlap(a[..., :, None, :], b[..., None, :, :])


def whwh(image_size: Tensor) -> Tensor:
    """Convert valid (height, width) (B, 2) to width, height, width, height as float32 (B, 1, 4)."""
    h, w = image_size.float().unbind(-1)
    return torch.stack([w, h, w, h], dim=-1)[:, None]


def xyxy_to_xyzr(boxes: Tensor) -> Tensor:
    """Convert (..., 4) xyxy in cells of P2 to (..., 4) xyzr."""
    xy = 0.5 * (boxes[..., 0:2] + boxes[..., 2:4])
    wh = boxes[..., 2:4] - boxes[..., 0:2]
    w, h = wh[..., 0:1], wh[..., 1:2]
    z = (w * h + 1e-7).log2() / 2
    r = (h / (w + 1e-7) + 1e-7).log2() / 2
    return torch.cat([xy, z, r], dim=-1)


def xyzr_size(boxes: Tensor) -> Tensor:
    """Return width and height (..., 2) in cells of P2 of xyzr boxes (..., 4)."""
    z, r = boxes[..., 2:3], boxes[..., 3:4]
    return torch.exp2(z) * torch.exp2(torch.cat([-r, r], dim=-1))


def xyzr_to_xyxy(boxes: Tensor) -> Tensor:
    """Convert (..., 4) xyzr to (..., 4) xyxy in cells of P2."""
    xy, half = boxes[..., 0:2], 0.5 * xyzr_size(boxes)
    return torch.cat([xy - half, xy + half], dim=-1)


def refine_xyzr(boxes: Tensor, delta: Tensor) -> Tensor:
    """Move xyzr boxes (..., 4) by predicted deltas: centres in units of the box scale, z and r directly."""
    xy = boxes[..., 0:2] + delta[..., 0:2] * torch.exp2(boxes[..., 2:3])
    return torch.cat([xy, boxes[..., 2:4] + delta[..., 2:4]], dim=-1)
