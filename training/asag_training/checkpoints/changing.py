"""Other settings for weights that are trained: thresholds and limits, which decide no shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from asag_deploy.errors import ConfigError
from asag_training.checkpoints.checkpoint import Checkpoint
from asag_training.checkpoints.layout import expected_layout
from asag_training.network.config import AsagConfig
from asag_training.setting_changes import with_changes


@dataclass(frozen=True)
class _Settings:
    network: AsagConfig


def change_settings(checkpoint: Checkpoint, changes: Iterable[str]) -> Checkpoint:
    """The checkpoint with other network settings, such as `score_low=0.2`, which makes it probe less.

    Raises ConfigError for an unknown setting, a bad value, or one that the weights do not fit.
    """
    changes = list(changes)
    config = with_changes(_Settings(checkpoint.config), [f"network.{change}" for change in changes]).network
    if expected_layout(config) != expected_layout(checkpoint.config):
        raise ConfigError(
            f"the settings {', '.join(changes)} need other weights than these: change those only "
            "that decide no shape, such as score_low, score_high, score_pass, patch_nms_iou or anchor_cap"
        )
    return dataclasses.replace(checkpoint, config=config)
