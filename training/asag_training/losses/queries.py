"""The losses of queries: relation block, parallel decoders and denoising (paper, section 4.3, appendix A).

H heads that answer for the same objects, B images, Q queries, T objects.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from asag_training.losses.config import LossConfig
from asag_training.losses.matching import NO_MATCH, matching_cost, without
from asag_training.losses.network_output import Denoising
from asag_training.losses.query_weighting import negative_weight, positive_weight
from asag_training.losses.targets import PaddedTargets, area_weight
from asag_training.network.boxes import cxcywh_to_xyxy, overlap

_ALPHA = 0.25


class Predictions(NamedTuple):
    """The predictions of the heads."""

    logits: Tensor
    """(H, B, Q, classes)."""
    boxes: Tensor
    """(H, B, Q, 4) cxcywh relative to the image."""
    valid: Tensor
    """bool (B, Q): queries that are real."""


class QueryLosses(NamedTuple):
    """Sums per head, each (H,), and the mean over matched queries of what is worth watching, each (H,)."""

    ce: Tensor
    l1: Tensor
    giou: Tensor
    class_error: Tensor
    """Percentage of matched queries that score another class best; 100 when nothing was matched."""
    positive_weight: Tensor
    negative_weight: Tensor


class _Matched(NamedTuple):
    """Per object: its query's values."""

    logit: Tensor
    """(H, B, T) of the object's class."""
    iou: Tensor
    giou: Tensor
    distance: Tensor
    """(H, B, T) L1."""
    right: Tensor
    """bool (H, B, T): the object's class is the query's best."""


def query_cost(predictions: Predictions, targets: PaddedTargets, config: LossConfig) -> Tensor:
    """Compute the matching costs (H, B, Q, T) of queries with objects."""
    heads, _, queries, _ = predictions.logits.shape
    labels = targets.labels[None, :, None, :].expand(heads, -1, queries, -1)
    weight = area_weight(targets.boxes, config.area_weight)
    logits = predictions.logits.detach().gather(-1, labels)
    cost = matching_cost(logits, predictions.boxes.detach(), targets.boxes, weight, config.matching)
    return without(cost, predictions.valid, targets.present)


def query_losses(
    predictions: Predictions, targets: PaddedTargets, match: Tensor, config: LossConfig
) -> QueryLosses:
    """Sum up the losses of every head; match (H, B, T) is the query of each object, or NO_MATCH."""
    matched = match != NO_MATCH
    found = _at_targets(predictions, targets, match)
    area = area_weight(targets.boxes, config.area_weight)
    with torch.no_grad():
        score = found.logit.sigmoid()
        w_pos = positive_weight(score, found.iou, config.gamma1, config.gamma2)
        w_neg = negative_weight(score, found.iou, config.gamma1, config.gamma2)

    if config.query_weighting:
        positive = w_pos * F.softplus(-found.logit) + w_neg * F.softplus(found.logit)
        share, box_weight = 1.0, w_pos * area
    else:
        positive = _ALPHA * F.softplus(-found.logit) * (-found.logit).sigmoid().square()
        share, box_weight = 1 - _ALPHA, area.expand_as(w_pos)
    everything = _as_negative(predictions.logits).sum(dim=-1)
    everything = torch.where(predictions.valid, everything, 0.0).sum(dim=(1, 2))
    # Every score was counted as negative; the matched ones are exchanged.
    exchanged = _sum(positive * area - share * _as_negative(found.logit), matched)
    return QueryLosses(
        ce=share * everything + exchanged,
        l1=_sum(box_weight * found.distance, matched),
        giou=_sum(box_weight * (1 - found.giou), matched),
        class_error=100 - 100 * _mean(found.right.float(), matched),
        positive_weight=_mean(w_pos, matched),
        negative_weight=_mean(w_neg, matched),
    )


def denoising_targets(
    denoising: Denoising, targets: PaddedTargets, heads: int
) -> tuple[PaddedTargets, Tensor]:
    """Give each denoising query its object, and the match that says so: ((B, N) objects, match (heads, B,
    N))."""
    real = denoising.target >= 0
    index = denoising.target.clamp(min=0)
    own = PaddedTargets(
        boxes=targets.boxes.gather(1, index[..., None].expand(-1, -1, 4)),
        labels=targets.labels.gather(1, index),
        present=real,
    )
    query = torch.arange(denoising.count, device=real.device)
    return own, torch.where(real, query, NO_MATCH).expand(heads, -1, -1)


def _at_targets(predictions: Predictions, targets: PaddedTargets, match: Tensor) -> _Matched:
    index = match.clamp(min=0)[..., None]  # (H, B, T, 1)
    boxes = predictions.boxes.gather(2, index.expand(-1, -1, -1, 4))
    logits = predictions.logits.gather(2, index.expand(-1, -1, -1, predictions.logits.shape[-1]))
    labels = targets.labels.expand(match.shape)
    iou, giou = overlap(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(targets.boxes))
    return _Matched(
        logit=logits.gather(-1, labels[..., None])[..., 0],
        iou=iou.detach(),
        giou=giou,
        distance=(boxes - targets.boxes).abs().sum(dim=-1),
        right=logits.detach().argmax(dim=-1) == labels,
    )


def _as_negative(logits: Tensor) -> Tensor:
    """Compute the loss of a score that should be 0: focal, with gamma 2."""
    return F.softplus(logits) * logits.sigmoid().square()


def _sum(values: Tensor, matched: Tensor) -> Tensor:
    """Sum up what is matched: (H, B, T) -> (H,)."""
    return torch.where(matched, values, 0.0).sum(dim=(1, 2))


def _mean(values: Tensor, matched: Tensor) -> Tensor:
    """Average what is matched: (H, B, T) -> (H,); 0 where nothing is."""
    return _sum(values.detach(), matched) / matched.sum(dim=(1, 2)).clamp(min=1)
