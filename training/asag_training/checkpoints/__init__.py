"""Trained weights on disk: reading what others published, and reading and writing our own.

`load_checkpoint` takes the public layout (.pth), a bare state dict, what other tools make of these, or our
own .safetensors with its settings inside; it never runs code that a file brings along.  `load_backbone` takes
ImageNet weights.  `start_from` begins a run from a checkpoint of any classes.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asag_training.checkpoints.backbone import load_backbone
    from asag_training.checkpoints.checkpoint import Checkpoint, select_head, untrained_checkpoint
    from asag_training.checkpoints.loading import load_checkpoint
    from asag_training.checkpoints.native import FORMAT_VERSION, save_checkpoint
    from asag_training.checkpoints.starting_point import class_layers, start_from

__all__ = [
    "FORMAT_VERSION",
    "Checkpoint",
    "class_layers",
    "load_backbone",
    "load_checkpoint",
    "save_checkpoint",
    "select_head",
    "start_from",
    "untrained_checkpoint",
]

_MODULES = {
    "FORMAT_VERSION": "native",
    "Checkpoint": "checkpoint",
    "class_layers": "starting_point",
    "load_backbone": "backbone",
    "load_checkpoint": "loading",
    "save_checkpoint": "native",
    "select_head": "checkpoint",
    "start_from": "starting_point",
    "untrained_checkpoint": "checkpoint",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for, and PyTorch with it, which `pack --help` does without."""
    if name not in _MODULES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
