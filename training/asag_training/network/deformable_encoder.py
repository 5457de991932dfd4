"""The neck and encoder of Deformable DETR (Zhu et al., ICLR 2021, section 4.2), which make ASAG-D's maps.

B images, N cells of all maps, C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asag_training.network.config import AsagConfig
from asag_training.network.deformable import (
    MAPS,
    DeformableAttention,
    Geometry,
    cell_centres,
    geometry_of,
    join_maps,
    part_maps,
    sine_positions,
)
from asag_training.network.layers import group_norm


class MapProjections(nn.Module):
    """The neck: C3..C5 -> maps of strides 8, 16, 32 and 64, each (B, channels, h, w).

    Each is a 1x1 convolution of one of them, the last a 3x3 one of C5 with stride 2; GroupNorm follows.
    """

    def __init__(self, channels_in: tuple[int, ...], config: AsagConfig) -> None:
        super().__init__()
        dim = config.hidden_dim
        convolutions = [nn.Conv2d(c, dim, 1) for c in channels_in[1:]]
        convolutions.append(nn.Conv2d(channels_in[-1], dim, 3, stride=2, padding=1))
        for convolution in convolutions:
            nn.init.xavier_uniform_(convolution.weight)
            assert convolution.bias is not None
            nn.init.zeros_(convolution.bias)
        self.input_proj = nn.ModuleList(nn.Sequential(c, group_norm(dim)) for c in convolutions)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Take C2..C5, of which C2 is not used."""
        *_, c5 = used = features[1:]
        return [project(feature) for project, feature in zip(self.input_proj, [*used, c5], strict=True)]


class EncoderLayer(nn.Module):
    """Every cell attends to points around it on all maps; then an FFN."""

    def __init__(self, config: AsagConfig) -> None:
        super().__init__()
        dim, inner = config.hidden_dim, config.deformable_ffn_dim
        self.self_attn = DeformableAttention(dim, config.attention_heads, config.deformable_points)
        self.norm1 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, inner)
        self.linear2 = nn.Linear(inner, dim)
        self.norm2 = nn.LayerNorm(dim)
        for linear in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(linear.weight)

    def forward(
        self, cells: Tensor, position: Tensor, centre: Tensor, reach: Tensor, geometry: Geometry
    ) -> Tensor:
        """Refine cells (B, N, C), whose positions are embedded as (B, N, C), around centre (B, N, L, 2)."""
        attended = self.self_attn(cells + position, centre, reach, cells, geometry)
        cells = self.norm1(cells + attended)
        inner = self.linear2(F.relu(self.linear1(cells)))
        return self.norm2(cells + inner)  # type: ignore[no-any-return]


class DeformableEncoder(nn.Module):
    """Layers that let the cells of all maps see each other, whatever their scale."""

    def __init__(self, config: AsagConfig) -> None:
        super().__init__()
        self.level_embed = nn.Parameter(torch.empty(MAPS, config.hidden_dim))
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        nn.init.normal_(self.level_embed)

    def forward(self, maps: list[Tensor], image_size: Tensor, canvas: tuple[int, int]) -> list[Tensor]:
        """Turn the neck's maps into those that are read: four (B, h, w, C) -> E3..E6, of the same sizes.

        image_size: int (B, 2) valid heights and widths in pixels; canvas: height and width of the batch.
        """
        geometry = geometry_of(maps, image_size, canvas)
        cells = join_maps(maps)
        position = self.positions(geometry).to(cells.dtype)
        centre = cell_centres(geometry)[:, :, None] * geometry.ratio[:, None]
        reach = (geometry.ratio / geometry.covered)[:, None]  # a cell's size relative to its map
        for layer in self.layers:
            cells = layer(cells, position, centre, reach, geometry)
        return part_maps(cells, geometry.sizes)

    def positions(self, geometry: Geometry) -> Tensor:
        """Embed where each cell is, and on which map: float32 (B, N, C)."""
        by_map = sine_positions(geometry, self.level_embed.shape[1])
        levels = self.level_embed.float()
        return torch.cat([place + levels[i] for i, place in enumerate(by_map)], dim=1)
