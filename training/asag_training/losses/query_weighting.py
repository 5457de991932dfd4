"""Query Weighting: how much a matched query counts (paper, section 4.3, equations 1 to 3).

Anchors change from step to step, so a query that fits its object badly says little about either class or
box.  Both weights grow from the class score s and the IoU with the matched object; neither carries gradients.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_SLOPE, _CENTRE = 4.5, 1 / 3
_HALF = 0.5


def norm(x: Tensor) -> Tensor:
    """Compute equation 1: the product of score and IoU, 0..1 -> a weight from 0.19 to 1, rising steeply from
    0."""
    return torch.sigmoid((x - _CENTRE) * _SLOPE) / _sigmoid(3.0)


def negative_share(x: Tensor) -> Tensor:
    """Compute P_neg: 1 while an IoU is below 0.5, then falling to 0 at 1: a well-placed query is no
    negative."""
    return torch.where(x < _HALF, 1.0, (1 - x.square()) / (1 - _HALF**2))


@torch.no_grad()
def positive_weight(score: Tensor, iou: Tensor, gamma1: float, gamma2: float) -> Tensor:
    """Compute equation 2, w_pos: scores and IoUs 0..1 (...) -> (...), from 0.19 to 1."""
    return norm(score**gamma1 * iou**gamma2)


@torch.no_grad()
def negative_weight(score: Tensor, iou: Tensor, gamma1: float, gamma2: float) -> Tensor:
    """Compute equation 3, w_neg: scores and IoUs 0..1 (...) -> (...), from 0 to 0.81.

    What is taken off is the least value of `norm`, so that a query without score is no negative at all.
    """
    return norm(score**gamma1 * negative_share(iou**gamma2)) - _sigmoid(-_SLOPE * _CENTRE) / _sigmoid(3.0)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))
