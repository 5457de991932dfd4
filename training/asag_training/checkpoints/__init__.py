"""Trained weights on disk: reading what others published, and reading and writing our own.

`load_checkpoint` takes the public layout (.pth), a bare state dict, what other tools make of these, or our
own .safetensors with its settings inside; it never runs code that a file brings along.  `load_backbone` takes
ImageNet weights.  `start_from` begins a run from a checkpoint of any classes.
"""

from asag_training.checkpoints.backbone import load_backbone
from asag_training.checkpoints.checkpoint import Checkpoint, select_head, untrained_checkpoint
from asag_training.checkpoints.containers import CHOICES, Choice
from asag_training.checkpoints.loading import load_checkpoint
from asag_training.checkpoints.native import FORMAT_VERSION, save_checkpoint
from asag_training.checkpoints.starting_point import class_layers, start_from

__all__ = [
    "CHOICES",
    "FORMAT_VERSION",
    "Checkpoint",
    "Choice",
    "class_layers",
    "load_backbone",
    "load_checkpoint",
    "save_checkpoint",
    "select_head",
    "start_from",
    "untrained_checkpoint",
]
