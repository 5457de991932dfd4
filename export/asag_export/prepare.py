"""A copy of a network as it is best exported: BatchNorm folded into the convolutions, weights in one type.

Precision is a property of the graph: the copy's weights decide it.  The blocks of the network compute in the
type of their weights and keep coordinates, logarithms and softmax in float32 by themselves.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from asag_deploy.bundle.manifest import Precision
from asag_training.network.backbone import FrozenBatchNorm2d
from asag_training.network.model import Asag

FULL_PRECISION = ("normalize",)
"""Stages that compute in float32 whatever the network's weights are in."""

_TYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16}


def prepare(model: Asag, precision: Precision) -> Asag:
    """A copy of `model` for export; the original is left as it is."""
    prepared = copy.deepcopy(model).eval().requires_grad_(False)
    for module in list(prepared.modules()):
        _fold_batch_norm(module)
    return prepared.to(_TYPES[precision])


def _fold_batch_norm(parent: nn.Module) -> None:
    """Fold every frozen BatchNorm among the children of `parent` into the convolution before it."""
    convolution: nn.Conv2d | None = None
    for name, child in parent.named_children():
        if isinstance(child, FrozenBatchNorm2d):
            assert convolution is not None, f"BatchNorm '{name}' follows no convolution"
            scale, shift = child.scale_and_shift()
            weight = convolution.weight * scale[:, None, None, None]
            convolution.weight = nn.Parameter(weight, requires_grad=False)
            convolution.bias = nn.Parameter(shift.clone(), requires_grad=False)
            setattr(parent, name, nn.Identity())
        convolution = child if isinstance(child, nn.Conv2d) else None
