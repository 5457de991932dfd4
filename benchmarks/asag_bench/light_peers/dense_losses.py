"""How the dense peer learns: label assignment by SimOTA, and the losses of YOLOX (arXiv 2107.08430)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from asag_bench.light_peers.dense import Cells
from asag_training.losses.targets import Targets
from asag_training.network.boxes import cxcywh_to_xyxy, overlap, pairwise_overlap

_RADIUS = 2.5
"""Cells around an object's centre that may predict it (the paper's center sampling)."""
_BOX_COST, _ELSEWHERE = 3.0, 1e5
_MOST_CELLS = 10
"""The IoUs of so many cells decide how many an object gets."""
_BOX_WEIGHT = 5.0


def dense_losses(cells: Cells, targets: list[Targets], image_size: Tensor) -> dict[str, Tensor]:
    """Return the losses `box`, `box_l1`, `objectness` and `class`, weighted, to be added up.

    targets: boxes relative to each image's valid size, which is a row of image_size (B, 2), height and width.
    """
    positive, boxes, classes, offsets = [], [], [], []
    for i, target in enumerate(targets):
        objects = target.boxes * image_size[i].flip(0).repeat(2)
        chosen, of, quality = assign(_of_image(cells, i), cxcywh_to_xyxy(objects), target.labels)
        positive.append(chosen)
        boxes.append(objects[of])
        one_hot = F.one_hot(target.labels[of], cells.logits.shape[-1]).float()
        classes.append(one_hot * quality[:, None])
        offsets.append(_offsets(objects[of], cells.centres[chosen], cells.strides[chosen]))
    is_object = torch.stack(positive)
    count = is_object.sum().clamp(min=1)
    found = overlap(cxcywh_to_xyxy(cells.boxes[is_object]), cxcywh_to_xyxy(torch.cat(boxes)))
    return {
        "box": _BOX_WEIGHT * (1 - found.iou**2).sum() / count,
        "box_l1": (cells.offsets[is_object] - torch.cat(offsets)).abs().sum() / count,
        "objectness": _bce(cells.objectness, is_object.float()) / count,
        "class": _bce(cells.logits[is_object], torch.cat(classes)) / count,
    }


@torch.no_grad()
def assign(cells: Cells, objects: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the cells of one image that learn its objects (SimOTA, section 2.1 of the paper).

    cells: without the axis of images; objects (T, 4) xyxy in pixels; labels (T,).  Returns which cells learn
    an object (A,), and for those, in their order, which object (n,) and with what IoU (n,).

    A cell is a candidate if its centre lies in an object or near its centre.  What it would cost an object is
    its loss, and a great deal where it does not lie in both.  An object takes as many of the cheapest as its
    ten best IoUs add up to, and a cell that several take learns the one it is cheapest for.
    """
    inside, near = _in_objects(cells, objects)
    candidate = (inside | near).any(dim=1)
    at = candidate.nonzero()[:, 0]
    if not len(at):
        return candidate, at, at.float()
    boxes = cxcywh_to_xyxy(cells.boxes[at])
    ious = pairwise_overlap(boxes, objects).iou  # (n, T)
    score = (cells.logits[at].sigmoid() * cells.objectness[at].sigmoid()[:, None]).sqrt()
    cost = _class_cost(score, labels) - _BOX_COST * (ious + 1e-8).log() + _ELSEWHERE * ~(inside & near)[at]
    best = ious.topk(min(_MOST_CELLS, len(at)), dim=0).values.sum(dim=0)
    wanted = best.int().clamp(min=1)  # (T,)
    # The rank of each cell among those of an object: the cheapest is 0.
    rank = cost.argsort(dim=0).argsort(dim=0)
    taken = rank < wanted
    cheapest = cost.masked_fill(~taken, torch.inf).argmin(dim=1)
    learns = taken.any(dim=1)
    chosen = torch.zeros_like(candidate)
    chosen[at[learns]] = True
    of = cheapest[learns]
    return chosen, of, ious[learns, of]


def _in_objects(cells: Cells, objects: Tensor) -> tuple[Tensor, Tensor]:
    """Return whether each cell lies in each object, and near its centre: both (A, T)."""
    x, y = cells.centres[:, :1], cells.centres[:, 1:]
    inside = (x > objects[:, 0]) & (x < objects[:, 2]) & (y > objects[:, 1]) & (y < objects[:, 3])
    middle = (objects[:, :2] + objects[:, 2:]) / 2
    reach = _RADIUS * cells.strides[:, None]
    near = ((x - middle[:, 0]).abs() < reach) & ((y - middle[:, 1]).abs() < reach)
    return inside, near


def _class_cost(score: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy (n, T) of scores (n, classes) with each of the labels (T,), over all
    classes."""
    score = score.clamp(1e-6, 1 - 1e-6)
    others = -(1 - score).log()
    return others.sum(dim=1, keepdim=True) + (-score.log() - others)[:, labels]


def _offsets(objects: Tensor, centres: Tensor, strides: Tensor) -> Tensor:
    """Return what cells would have to predict (n, 4) for objects cxcywh in pixels (n, 4)."""
    scale = strides[:, None]
    sides = (objects[:, 2:] / scale).clamp(min=1e-8).log()
    return torch.cat([(objects[:, :2] - centres) / scale, sides], dim=1)


def _bce(logits: Tensor, wanted: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum")


def _of_image(cells: Cells, i: int) -> Cells:
    return Cells(
        cells.logits[i].detach(),
        cells.objectness[i].detach(),
        cells.boxes[i].detach(),
        cells.offsets[i].detach(),
        cells.centres,
        cells.strides,
    )
