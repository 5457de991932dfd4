"""Bipartite matching: which prediction answers for which object.

Costs are computed on the device for all patches and heads at once.  `solve` then brings every cost of a
training step to the host in one copy, and the matches back in another.

A predictions and T objects per problem; any number of leading axes (heads, images, patches) counts problems.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]
from torch import Tensor

from asag_training.losses.config import MatchingCosts
from asag_training.network.boxes import cxcywh_to_xyxy, pairwise_overlap

NO_MATCH = -1
_ALPHA = 0.25
_WORST = 1e6
"""Stands for a cost that is not a number, so that the losses and not the matching report it."""


@torch.no_grad()
def matching_cost(
    logits: Tensor, boxes: Tensor, target_boxes: Tensor, target_weight: Tensor, costs: MatchingCosts
) -> Tensor:
    """Compute what it would cost to let each prediction answer for each object.

    logits (..., A, T): each prediction's logit of each object's class, or (..., A, 1) where there is but one
    class; boxes (..., A, 4) and target_boxes (..., T, 4): cxcywh in the same units, 0..1; target_weight
    (..., T) multiplies an object's costs.  Leading axes broadcast.  Returns (..., A, T), all finite.
    """
    giou = pairwise_overlap(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(target_boxes)).giou
    distance = torch.cdist(boxes, target_boxes.expand(*boxes.shape[:-2], -1, -1), p=1.0)
    cost = costs.classes * focal_cost(logits) + costs.l1 * distance - costs.giou * giou
    return (cost * target_weight[..., None, :]).nan_to_num(_WORST, _WORST, -_WORST)


def focal_cost(logits: Tensor) -> Tensor:
    """Compute the focal loss (alpha 0.25, gamma 2) of a logit as positive, less that of it as negative."""
    p = logits.sigmoid()
    positive = _ALPHA * (1 - p).square() * -(p + 1e-8).log()
    negative = (1 - _ALPHA) * p.square() * -(1 - p + 1e-8).log()
    return positive - negative


def without(cost: Tensor, predictions: Tensor, targets: Tensor) -> Tensor:
    """Make the cost (..., A, T) infinite for pairs of which one does not exist.

    predictions: bool (..., A); targets: bool (..., T).
    """
    exists = predictions[..., :, None] & targets[..., None, :]
    return cost.masked_fill(~exists, torch.inf)


@torch.no_grad()
def solve(costs: Sequence[Tensor]) -> list[Tensor]:
    """Find the cheapest one-to-one matching of every problem.

    Each of `costs` is (..., A, T), infinite where a prediction or an object does not exist, and finite
    elsewhere.  Returns for each int64 (..., T), on its device: the prediction that answers for each object,
    or NO_MATCH for objects that do not exist or that were left over because predictions are fewer.
    """
    if not costs:
        return []
    flat = torch.cat([cost.float().flatten() for cost in costs]).cpu().numpy()
    ends = np.cumsum([cost.numel() for cost in costs])
    pieces = np.split(flat, ends[:-1])
    solved = [_solve_all(piece.reshape(cost.shape)) for piece, cost in zip(pieces, costs, strict=True)]
    matches = torch.from_numpy(np.concatenate([match.ravel() for match in solved])).to(costs[0].device)
    parts = torch.split(matches, [match.size for match in solved])
    return [part.view(match.shape) for part, match in zip(parts, solved, strict=True)]


def _solve_all(cost: NDArray[np.float32]) -> NDArray[np.int64]:
    """Solve problems of one size: (..., A, T) -> (..., T)."""
    problems = cost.reshape(-1, *cost.shape[-2:])
    exists = np.isfinite(problems)
    rows, columns = np.any(exists, axis=2), np.any(exists, axis=1)
    match = np.full((len(problems), cost.shape[-1]), NO_MATCH, dtype=np.int64)
    for i in np.flatnonzero(np.any(columns, axis=1)):
        row, column = np.flatnonzero(rows[i]), np.flatnonzero(columns[i])
        predictions, targets = linear_sum_assignment(problems[i][np.ix_(row, column)])
        match[i, column[targets]] = row[predictions]
    return match.reshape(*cost.shape[:-2], cost.shape[-1])
