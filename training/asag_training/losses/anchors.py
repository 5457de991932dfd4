"""The losses of the anchor generator: class-agnostic, patch by patch (paper, section 4.2 and appendix A).

B images, K patches per image, A anchors per patch, T objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from asag_training.losses.config import LossConfig
from asag_training.losses.matching import NO_MATCH, matching_cost, without
from asag_training.losses.network_output import LevelOutput
from asag_training.losses.query_weighting import positive_weight
from asag_training.losses.targets import PaddedTargets, PatchTargets, patch_targets
from asag_training.network.boxes import cxcywh_to_xyxy, overlap, pairwise_overlap


class Patches(NamedTuple):
    """Patches with as many anchors each, and their objects."""

    raw: Tensor
    """(B, K, A, 5): cxcywh relative to the patch, and a score logit."""
    real: Tensor
    """bool (B, K): patches that exist."""
    targets: PatchTargets


class AnchorLosses(NamedTuple):
    """Sums over all patches, and what they came from."""

    ce: Tensor
    l1: Tensor
    giou: Tensor
    iou: Tensor
    """(B, K, T) IoU of each object with its anchor; 0 for objects that have none."""
    matched: Tensor
    """bool (B, K, T): objects that have an anchor."""


def gather_patches(
    levels: Sequence[LevelOutput],
    targets: PaddedTargets,
    image_size: Tensor,
    patch_size: int,
    area_weight: float,
) -> Patches:
    """Put the patches of `levels`, of which there must be one or more, side by side."""
    found = [patch_targets(level, targets, image_size, patch_size, area_weight) for level in levels]
    return Patches(
        raw=torch.cat([level.raw.float() for level in levels], dim=1),
        real=torch.cat([level.real for level in levels], dim=1),
        targets=PatchTargets(*(torch.cat(tensors, dim=1) for tensors in zip(*found, strict=True))),
    )


def anchor_cost(patches: Patches, config: LossConfig) -> Tensor:
    """Compute the matching costs (B, K, A, T) of the anchors of each patch with its objects."""
    targets, boxes, logits = patches.targets, patches.raw[..., :4], patches.raw[..., 4:]
    cost = matching_cost(logits, boxes, targets.boxes, targets.weight, config.matching)
    return without(cost, patches.real[..., None].expand(patches.raw.shape[:-1]), targets.present)


def anchor_losses(patches: Patches, match: Tensor, config: LossConfig) -> AnchorLosses:
    """Sum up the losses of all patches; match (B, K, T) is the anchor of each object, or NO_MATCH."""
    boxes, logits, targets = patches.raw[..., :4], patches.raw[..., 4], patches.targets
    matched = match != NO_MATCH
    index = match.clamp(min=0)
    found = boxes.gather(-2, index[..., None].expand(*index.shape, 4))
    iou, giou = overlap(cxcywh_to_xyxy(found), cxcywh_to_xyxy(targets.boxes))
    iou = iou.detach()

    ce = _score_loss(patches, match, iou, config.ignore_iou)
    weight = targets.weight
    if config.query_weighting:
        score = logits.detach().gather(-1, index).sigmoid()
        weight = weight * positive_weight(score, iou, config.gamma1, config.gamma2)
    distance = (found - targets.boxes).abs().sum(dim=-1)
    l1 = torch.where(matched, weight * distance, 0.0).sum()
    return AnchorLosses(
        ce=ce,
        l1=l1,
        giou=torch.where(matched, weight * (1 - giou), 0.0).sum(),
        iou=torch.where(matched, iou, 0.0),
        matched=matched,
    )


def _score_loss(patches: Patches, match: Tensor, iou: Tensor, ignore_iou: float) -> Tensor:
    """Compute quality focal loss: scores go towards the IoU with the matched object, and towards 0 without
    one."""
    boxes, logits, targets = patches.raw[..., :4], patches.raw[..., 4], patches.targets
    quality = _at_anchors(iou, match, logits.shape[-1], 0.0)
    weight = _at_anchors(targets.weight, match, logits.shape[-1], 1.0)
    matched = _at_anchors(torch.ones_like(iou), match, logits.shape[-1], 0.0) > 0
    with torch.no_grad():
        every = pairwise_overlap(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(targets.boxes)).iou
        best = torch.where(targets.present[..., None, :], every, 0.0).amax(dim=-1)
        counts = (matched | (best < ignore_iou)) & patches.real[..., None]
    loss = F.binary_cross_entropy_with_logits(logits, quality, reduction="none")
    loss = loss * (quality - logits.sigmoid()).square() * weight
    return torch.where(counts, loss, 0.0).sum()


def _at_anchors(values: Tensor, match: Tensor, anchors: int, otherwise: float) -> Tensor:
    """Move values of objects (B, K, T) to the anchors that answer for them: (B, K, anchors)."""
    # Objects without an anchor all write to one slot more, which is then dropped.
    slot = torch.where(match == NO_MATCH, anchors, match)
    full = values.new_full((*values.shape[:-1], anchors + 1), otherwise)
    return full.scatter(-1, slot, values)[..., :anchors]
