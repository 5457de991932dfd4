"""The feature pyramid: the neck that makes its maps, and which of them boxes are read from.

The finest comes first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from asag_training.network.config import AsagConfig

_LEVELS = 4
"""As many maps, each half the size of the one before, are read from."""
_STRIDES = {"P2": 4, "P3": 8}


def pyramid_strides(config: AsagConfig) -> tuple[int, ...]:
    """Return the pixels per cell of each map that boxes are read from: of P2 to P5, or of P3 to P6."""
    return tuple(_STRIDES[config.finest_map] << i for i in range(_LEVELS))


def box_cell(config: AsagConfig) -> int:
    """Return the pixels of the cell that xyzr boxes are measured in.

    It is that of the finest map; for ASAG-D that of P2, as in the other published networks.
    """
    return _STRIDES["P2"] if config.decoder == "deformable-detr" else pyramid_strides(config)[0]


def map_of(level: str, features: Sequence[Tensor], config: AsagConfig) -> Tensor:
    """Return the map of a level, such as 'P5', among those of the neck."""
    return features[int(level[1:]) - int(config.finest_map[1:])]


class FeaturePyramid(nn.Module):
    """The neck: C2..C5 -> P2..P5, or C3..C5 -> P3..P6, each (B, channels, h, w).

    Lateral 1x1 convolutions, top-down nearest upsampling, output 3x3 convolutions, which may be separable.
    P6 is every second cell of P5.
    """

    def __init__(self, channels_in: tuple[int, ...], config: AsagConfig) -> None:
        super().__init__()
        self.first = 0 if config.finest_map == "P2" else 1
        channels_in, channels = channels_in[self.first :], config.hidden_dim
        # Sequential, because the official names have an index more than the layer.
        self.inner_blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(c, channels, 1)) for c in channels_in)
        self.layer_blocks = nn.ModuleList(_output_layer(config) for _ in channels_in)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        features = features[self.first :]
        above = self.inner_blocks[-1](features[-1])
        outputs = [self.layer_blocks[-1](above)]
        for i in range(len(features) - 2, -1, -1):
            lateral = self.inner_blocks[i](features[i])
            above = lateral + F.interpolate(above, size=lateral.shape[-2:], mode="nearest")
            outputs.insert(0, self.layer_blocks[i](above))
        if self.first:
            outputs.append(outputs[-1][:, :, ::2, ::2])
        return outputs


def _output_layer(config: AsagConfig) -> nn.Sequential:
    channels = config.hidden_dim
    if not config.separable_neck:
        return nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1))
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, groups=channels), nn.Conv2d(channels, channels, 1)
    )
