"""A dense peer: the decoupled head of YOLOX (arXiv 2107.08430) on the light network's backbone and neck.

Every cell of P3, P4 and P5 predicts one box, without anchors.  The head's 3x3 convolutions are depthwise with
a 1x1 after each, as in the paper's smallest network (section 2.2, YOLOX-Nano).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asag_training.network.backbone import Backbone
from asag_training.network.config import AsagConfig
from asag_training.network.pyramid import FeaturePyramid

STRIDES = (8, 16, 32)
_PRIOR = 0.01
"""What scores begin as: nearly every cell is background."""


class Cells(NamedTuple):
    """What A cells of all levels predict for each of B images."""

    logits: Tensor
    """(B, A, classes)"""
    objectness: Tensor
    """(B, A) logits of there being an object at all."""
    boxes: Tensor
    """(B, A, 4) cxcywh in pixels."""
    offsets: Tensor
    """(B, A, 4) the same as they are predicted: centres in cells from the cell's, logarithms of sides in
    cells."""
    centres: Tensor
    """(A, 2) x and y of each cell's centre in pixels."""
    strides: Tensor
    """(A,) pixels a cell."""


class DenseDetector(nn.Module):
    """image (B, 3, H, W), normalised -> `Cells`."""

    def __init__(self, config: AsagConfig) -> None:
        super().__init__()
        self.backbone = Backbone(config)
        self.backbone.body.learn_statistics()
        self.neck = FeaturePyramid(self.backbone.body.channels, config.with_changes(finest_map="P3"))
        self.heads = nn.ModuleList(_Head(config.hidden_dim, config.num_classes) for _ in STRIDES)

    def forward(self, image: Tensor) -> Cells:
        maps = self.neck(self.backbone(image))[: len(STRIDES)]
        predicted = [head(features) for head, features in zip(self.heads, maps, strict=True)]
        centres, strides = _grid([(p.shape[-2], p.shape[-1]) for p in predicted], image.device)
        flat = torch.cat([p.flatten(2) for p in predicted], dim=2).transpose(1, 2)
        offsets, objectness, logits = flat[..., :4], flat[..., 4], flat[..., 5:]
        scale = strides[:, None]
        middle = centres + offsets[..., :2] * scale
        # Untrained weights must not overflow; a side of 400 cells is larger than any picture here.
        sides = offsets[..., 2:].clamp(max=6).exp() * scale
        return Cells(logits, objectness, torch.cat([middle, sides], dim=-1), offsets, centres, strides)


class _Head(nn.Module):
    """features (B, channels, h, w) -> (B, 4 + 1 + classes, h, w): box, objectness, classes."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.stem = _Convolution(channels, channels, 1)
        self.class_branch = nn.Sequential(*(_separable(channels) for _ in range(2)))
        self.box_branch = nn.Sequential(*(_separable(channels) for _ in range(2)))
        self.classes = nn.Conv2d(channels, classes, 1)
        self.box = nn.Conv2d(channels, 4, 1)
        self.objectness = nn.Conv2d(channels, 1, 1)
        for layer in (self.classes, self.objectness):
            assert layer.bias is not None
            nn.init.constant_(layer.bias, -math.log((1 - _PRIOR) / _PRIOR))

    def forward(self, features: Tensor) -> Tensor:
        x = self.stem(features)
        of_class, of_box = self.class_branch(x), self.box_branch(x)
        return torch.cat([self.box(of_box), self.objectness(of_box), self.classes(of_class)], dim=1)


class _Convolution(nn.Module):
    """Convolution, BatchNorm, ReLU: the activation that backbone and neck have."""

    def __init__(self, channels_in: int, channels: int, kernel: int, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels, kernel, padding=kernel // 2, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


def _separable(channels: int) -> nn.Sequential:
    return nn.Sequential(
        _Convolution(channels, channels, 3, groups=channels), _Convolution(channels, channels, 1)
    )


def _grid(shapes: list[tuple[int, int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the centres (A, 2) in pixels and the strides (A,) of all cells, level by level."""
    centres, strides = [], []
    for (height, width), stride in zip(shapes, STRIDES, strict=True):
        y, x = torch.meshgrid(
            torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij"
        )
        centres.append((torch.stack([x, y], dim=-1).flatten(0, 1) + 0.5) * stride)
        strides.append(torch.full((height * width,), float(stride), device=device))
    return torch.cat(centres), torch.cat(strides)
