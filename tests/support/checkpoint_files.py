"""Checkpoint files to test with: a small network written in full, and full-size ones of zeros."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from asag_deploy.bundle.manifest import Category
from asag_deploy.errors import CheckpointError
from asag_training.checkpoints import Checkpoint, load_checkpoint
from asag_training.network.config import AsagConfig, DecoderType, finest_map_of
from asag_training.network.model import Asag

CATEGORIES = tuple(Category(id=10 * i, name=name) for i, name in enumerate(("circle", "square", "star")))


def tiny_config(decoder: DecoderType = "adamixer", **changes: Any) -> AsagConfig:
    """A network of all parts, but narrow; no two of its sizes are equal, so none can pass for another."""
    config = AsagConfig(
        variant="tiny",
        decoder=decoder,
        finest_map=finest_map_of(decoder),
        backbone_width=4,
        num_classes=3,
        hidden_dim=24,
        ffn_dim=40,
        attention_heads=6,
        in_points=5,
        out_points=7,
        groups=2,
        dynamic_dim=9,
        encoder_layers=2,
        deformable_points=3,
        deformable_ffn_dim=36,
        patch_size=11,
        compress_dim=2,
        first_level_anchors=13,
        patch_anchors=17,
    )
    return config.with_changes(**changes)


def random_state(config: AsagConfig) -> dict[str, Tensor]:
    """Weights as they are initialised; every tensor is its own."""
    return dict(Asag(config).state_dict())


def tiny_checkpoint(**changes: Any) -> Checkpoint:
    config = tiny_config()
    values: dict[str, Any] = {
        "config": config,
        "state": random_state(config),
        "categories": CATEGORIES,
        **changes,
    }
    return Checkpoint(**values)


def zeros_of(layout: Path) -> dict[str, Tensor]:
    """A full-size checkpoint's tensors, each a single zero in memory and on disk."""
    shapes = json.loads(layout.read_text(encoding="utf-8"))
    return {name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}


def public_options(**changes: Any) -> argparse.Namespace:
    """As the public training script stores its command line."""
    values = {
        "lr": 2e-4,
        "num_query": "100",
        "activation": "gelu",
        "decoder_type": "AdaMixer",
        "dataset_file": "coco",
        "threshold1": 0.7,
        "threshold2": 0.1,
        "use_anchor_threshold": 0.1,
        "patch_nms_threshold": 0.25,
        "nms": False,
        "device": "cuda",
        "coco_path": None,
    }
    return argparse.Namespace(**{**values, **changes})


def save_public(path: Path, state: dict[str, Tensor], *, legacy: bool = False, **options: Any) -> Path:
    """Write the layout of the public training script."""
    momentum = {"step": torch.tensor(5.0), "exp_avg": torch.zeros(3)}
    content = {
        "model": state,
        "optimizer": {"state": {0: momentum}, "param_groups": [{"lr": 2e-4, "params": [0]}]},
        "lr_scheduler": {"milestones": [508, 511], "last_epoch": 12, "_last_lr": [2e-6]},
        "epoch": 11,
        "args": public_options(**options),
    }
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def refusal(path: Path, **options: Any) -> str:
    """What is said of a file that is refused: one line that names it."""
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert path.name in message
    return message
