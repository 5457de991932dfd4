"""A network of every part but few channels: what most export tests run on."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from asag_deploy.bundle import Bundle
from asag_export.bundle_export import export_bundle
from asag_export.untrained import untrained_checkpoint
from asag_training.checkpoints import Checkpoint
from asag_training.config import AsagConfig, variant_config


def small_config(variant: str = "asag-a-r50-100", **changes: Any) -> AsagConfig:
    """The variant, narrowed."""
    narrow = {"hidden_dim": 32, "backbone_width": 8, "ffn_dim": 64, "out_points": 16, "in_points": 8}
    return variant_config(variant).with_changes(**{**narrow, **changes})


def small_checkpoint(variant: str = "asag-a-r50-100", **changes: Any) -> Checkpoint:
    """Random weights for it, whose anchors differ: every decision there is to make goes either way."""
    checkpoint = untrained_checkpoint(small_config(variant, **changes))
    norms = [f"anchor_generator.layernorm.{i}.weight" for i in range(3)]
    # Drawn around 0 they would take the picture out of the tokens, and all anchors would be alike.
    spread = {name: torch.ones_like(checkpoint.state[name]) for name in norms}
    return dataclasses.replace(checkpoint, state={**checkpoint.state, **spread})


def export_small(path: Path, variant: str = "asag-a-r50-100", **options: Any) -> Bundle:
    """Export it, gate included."""
    return export_bundle(small_checkpoint(variant), path, **options).bundle
