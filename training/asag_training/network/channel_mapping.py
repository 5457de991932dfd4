"""AdaMixer's neck: each map by itself to the same number of channels (Gao et al., CVPR 2022, 3.4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from asag_training.network.layers import group_norm


class ChannelMapping(nn.Module):
    """A 1x1 convolution for each map, and one GroupNorm for all: no map learns of another.

    Maps beyond those of the backbone are means of 3x3 cells of the one before, at every second.
    """

    def __init__(self, channels_in: Sequence[int], channels: int, levels: int) -> None:
        super().__init__()
        self.levels = levels
        self.lateral = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in channels_in)
        self.norm = group_norm(channels)
        for convolution in self.lateral:
            nn.init.xavier_uniform_(convolution.get_parameter("weight"))
            nn.init.zeros_(convolution.get_parameter("bias"))

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Map features, each (B, C_i, h, w), to `levels` maps (B, channels, h, w), the finest first."""
        maps = [convolution(x) for convolution, x in zip(self.lateral, features, strict=True)]
        while len(maps) < self.levels:
            maps.append(F.avg_pool2d(maps[-1], 3, 2, 1))
        return [self.norm(x) for x in maps]
