"""The objects to be found, of images and of patches.

B images, K patches per image, T objects (padded to the most of any image, and at least 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from asag_training.losses.network_output import LevelOutput
from asag_training.network import boxes as box_ops
from asag_training.network.anchor_generator import QUADRANTS, STRIDES

_FILLER = 0.5
"""Coordinate of the boxes that only fill up: any box that has an area."""


class Targets(NamedTuple):
    """The objects of one image."""

    boxes: Tensor
    """float32 (T, 4) cxcywh relative to the image's valid size."""
    labels: Tensor
    """int64 (T,) class indices."""


class PaddedTargets(NamedTuple):
    """The objects of a batch."""

    boxes: Tensor
    """(B, T, 4) cxcywh relative to the image."""
    labels: Tensor
    """int64 (B, T)."""
    present: Tensor
    """bool (B, T): objects that exist."""


class PatchTargets(NamedTuple):
    """The objects of each patch."""

    boxes: Tensor
    """(B, K, T, 4) cxcywh relative to the patch and cut at its border."""
    present: Tensor
    """bool (B, K, T): objects that are to be found in the patch."""
    weight: Tensor
    """(B, K, T) area weights."""


def pad_targets(targets: Sequence[Targets], device: torch.device) -> PaddedTargets:
    """Put the objects of all images in one tensor."""
    most = max([1, *(len(target.labels) for target in targets)])
    batch = len(targets)
    boxes = torch.full((batch, most, 4), _FILLER, device=device)
    labels = torch.zeros((batch, most), dtype=torch.int64, device=device)
    counts = [len(target.labels) for target in targets]
    for i, (target, count) in enumerate(zip(targets, counts, strict=True)):
        boxes[i, :count] = target.boxes.to(device, torch.float32, non_blocking=True)
        labels[i, :count] = target.labels.to(device, non_blocking=True)
    present = torch.arange(most, device=device) < torch.tensor(counts, device=device)[:, None]
    return PaddedTargets(boxes, labels, present)


def area_weight(boxes: Tensor, most: float, large_first: bool = False) -> Tensor:
    """Weigh cxcywh relative boxes (..., 4) -> (...): from `most` for the smallest to 1 for what fills the
    frame.

    With `large_first` the reverse, for P6, whose business are the large objects.
    """
    side = (boxes[..., 2] * boxes[..., 3]).sqrt()
    return 1 + (most - 1) * (side if large_first else 1 - side)


def patch_targets(
    level: LevelOutput, targets: PaddedTargets, image_size: Tensor, patch_size: int, most: float
) -> PatchTargets:
    """Find the objects whose centre lies in each patch of `level`, as seen from the patch.

    On P4 and P3 only objects no larger than a patch; on P6 flipped as its patches are.  image_size: (B, 2)
    height and width in pixels; most: the area weight of the smallest objects.
    """
    begin, side = _frames(level, image_size, patch_size)
    boxes = targets.boxes[:, None]  # (B, 1, T, 4)
    end = begin + side
    present = ((boxes[..., :2] >= begin) & (boxes[..., :2] <= end)).all(dim=-1)
    if level.origins is not None:
        present = present & (boxes[..., 2:] <= side).all(dim=-1)
    present = present & targets.present[:, None] & level.real[..., None]

    corners = box_ops.cxcywh_to_xyxy(boxes)
    top_left = (torch.maximum(corners[..., :2], begin) - begin) / side
    bottom_right = (torch.minimum(corners[..., 2:], end) - begin) / side
    inside = box_ops.xyxy_to_cxcywh(torch.cat([top_left, bottom_right], dim=-1))
    relative = torch.where(present[..., None], inside, _FILLER)
    if level.flips is not None:
        relative = _flip(relative, level.flips)
    return PatchTargets(relative, present, area_weight(relative, most, large_first=level.level == "P6"))


def _frames(level: LevelOutput, image_size: Tensor, patch_size: int) -> tuple[Tensor, Tensor]:
    """Return where patches begin (x, y), and their width and height, relative to the image: each broadcasts
    with (B, K, 1, 2)."""
    device = level.raw.device
    if level.origins is not None:
        image = image_size.flip(-1).float()[:, None, None, :]
        stride = STRIDES[level.level]
        begin = level.origins[:, :, None] * stride / image
        return begin, torch.full_like(image, patch_size * stride) / image
    if level.level == "P5":
        quadrants = torch.tensor([[column, row] for row, column in QUADRANTS], device=device)
        return quadrants.view(1, -1, 1, 2) * 0.5, torch.full((1, 1, 1, 2), 0.5, device=device)
    count = level.raw.shape[1]
    return torch.zeros((1, count, 1, 2), device=device), torch.ones((1, 1, 1, 2), device=device)


def _flip(boxes: Tensor, flips: tuple[tuple[bool, bool], ...]) -> Tensor:
    """Mirror the centres of (B, K, T, 4) boxes: for each patch (horizontally, vertically)."""
    mirrored = torch.tensor(flips, device=boxes.device).view(1, -1, 1, 2)
    centres = torch.where(mirrored, 1 - boxes[..., :2], boxes[..., :2])
    return torch.cat([centres, boxes[..., 2:]], dim=-1)
