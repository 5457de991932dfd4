"""Random weights, to try or to time a network that has not been trained."""

from __future__ import annotations

import torch

from asag_training.checkpoints import Checkpoint
from asag_training.network.config import AsagConfig, default_categories, variant_config
from asag_training.network.model import build


def untrained_checkpoint(variant: str | AsagConfig, seed: int = 0) -> Checkpoint:
    """Freshly initialised weights, the same for the same seed.

    Freshly initialised anchors are large, and none would be probed.  The last layer of both anchor predictors
    is drawn wider and moved, so that small boxes with uncertain scores come out and every stage has something
    to do, whatever the image.  Raises ConfigError for an unknown variant.
    """
    config = variant_config(variant) if isinstance(variant, str) else variant
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(config)
        for mlp in (model.anchor_generator.proj_all, model.anchor_generator.proj_patch):
            _spread(mlp.layers[-1])
    return Checkpoint(
        config=config, state=model.state_dict(), categories=default_categories(config), trained=False
    )


def _spread(last: torch.nn.Module) -> None:
    weight, bias = last.get_parameter("weight"), last.get_parameter("bias")
    torch.nn.init.normal_(weight, std=4.0 / weight.shape[1] ** 0.5)
    with torch.no_grad():
        bias.view(-1, 5)[:, 2:4] -= 2.5
        bias.view(-1, 5)[:, 4] -= 1.0
