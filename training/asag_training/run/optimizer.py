"""The optimiser of the published recipe: AdamW with a slower backbone, and clipped gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from asag_training.network.model import Asag
from asag_training.settings import Optimisation

_BACKBONE, _OFFSETS = "backbone.", ".sampling_offsets."


def parameter_groups(
    model: nn.Module, lr: float, backbone_factor: float, offsets_factor: float = 1.0
) -> list[dict[str, Any]]:
    """Return the trainable parameters, in the order of their names: the backbone's apart, at a lower rate.

    So are those that say where deformable attention samples (Deformable DETR, appendix A.4).
    Each group has a `name`, its `params`, and its `base_lr`, which a schedule multiplies.
    """
    factors = {"network": 1.0, "backbone": backbone_factor, "offsets": offsets_factor}
    members: dict[str, list[nn.Parameter]] = {group: [] for group in factors}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members[_group(name)].append(parameter)
    return [
        {"name": group, "params": members[group], "lr": lr * factor, "base_lr": lr * factor}
        for group, factor in factors.items()
        if members[group]
    ]


def _group(name: str) -> str:
    if name.startswith(_BACKBONE):
        return "backbone"
    return "offsets" if _OFFSETS in name else "network"


def build_optimizer(model: Asag, settings: Optimisation) -> torch.optim.AdamW:
    """Build AdamW over what is to be trained.

    `settings.freeze_stem` stops the backbone's stem and first stage from training, as the published recipe
    does with a pre-trained backbone; a backbone that starts from random weights needs them.
    """
    if settings.freeze_stem:
        model.backbone[0].body.freeze_stem()  # type: ignore[union-attr, operator]
    groups = parameter_groups(model, settings.lr, settings.backbone_factor, settings.offsets_factor)
    return torch.optim.AdamW(groups, lr=settings.lr, weight_decay=settings.weight_decay, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> dict[str, float]:
    """Give every group `factor` of its base rate; return the rates by group name."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    return {group["name"]: group["lr"] for group in optimizer.param_groups}


def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale all gradients together so that their norm is at most `max_norm`; return the norm before."""
    return torch.nn.utils.clip_grad_norm_(parameters, max_norm)
