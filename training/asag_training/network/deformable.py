"""Multi-scale deformable attention, and where the cells of several maps lie.

Zhu et al., Deformable DETR: Deformable Transformers for End-to-End Object Detection, ICLR 2021, section 4.1.

A query looks at a few points around a centre of its own on every map, not at all cells.  Images of a batch
are padded at the right and at the bottom: what is relative to an image is turned into what is relative to a
whole map by the share of the map that the image covers, its valid ratio.  It all is arithmetic on sizes.

B images, N cells of all maps, Q queries, G heads, L maps, P points per head and map, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from asag_training.network.operators import deformable_sample

MAPS = 4
"""As many maps are attended to: strides 8, 16, 32 and 64."""


class Geometry(NamedTuple):
    """The sizes of the maps of a batch, and how much of each is image."""

    sizes: tuple[tuple[int, int], ...]
    """Height and width of each map."""
    covered: Tensor
    """float32 (B, L, 2): columns and rows of each map that the image covers; whole numbers, at least 1."""
    ratio: Tensor
    """float32 (B, L, 2): the same as a share of the map, x and y."""
    padding: Tensor
    """bool (B, N, 1): cells that are of no image."""


def geometry_of(maps: Sequence[Tensor], image_size: Tensor, canvas: tuple[int, int]) -> Geometry:
    """Find out which cells of each map, (B, h, w, C), are of the images.

    image_size: int (B, 2) valid heights and widths in pixels; canvas: height and width they are padded to.
    As many rows count as a mask of the valid pixels has when it is resized to the map by nearest neighbours:
    row i of h is valid if pixel row floor(i H / h) of H is, so they are ceil(valid rows h / H).
    """
    height, width = image_size.float().unbind(-1)
    covered, ratios, paddings = [], [], []
    sizes = tuple((feature.shape[1], feature.shape[2]) for feature in maps)
    for h, w in sizes:
        # A whole number of cells must not become one more where a runtime multiplies by the inverse: half a
        # pixel is taken off, which leaves every other number of cells what it is.
        rows, columns = (
            torch.ceil((side * cells - 0.5) / padded)
            for side, cells, padded in zip((height, width), (h, w), canvas, strict=True)
        )
        covered.append(torch.stack([columns, rows], dim=-1))
        ratios.append(torch.stack([columns / w, rows / h], dim=-1))
        below = torch.arange(h, device=rows.device) >= rows[:, None]
        right = torch.arange(w, device=rows.device) >= columns[:, None]
        paddings.append((below[:, :, None] | right[:, None, :]).flatten(1))
    padding = torch.cat(paddings, dim=1)[..., None]
    return Geometry(sizes, torch.stack(covered, dim=1), torch.stack(ratios, dim=1), padding)


def cell_centres(geometry: Geometry) -> Tensor:
    """Return each cell's centre relative to the valid image: float32 (B, N, 2) x, y; over 1 in padding."""
    centres = []
    for i, (h, w) in enumerate(geometry.sizes):
        x, y = (_steps(n, geometry.covered[:, i, axis]) for axis, n in enumerate((w, h)))
        both = [x[:, None, :].expand(-1, h, -1), y[:, :, None].expand(-1, -1, w)]
        centres.append(torch.stack(both, dim=-1).flatten(1, 2))
    return torch.cat(centres, dim=1)


def sine_positions(geometry: Geometry, dim: int) -> list[Tensor]:
    """Embed the place of each cell in the valid image by sines: for each map float32 (B, h w, dim).

    The first half of the channels is of y, the second of x; even ones are sines, odd ones cosines; the image
    is 2 pi long, temperature 10000.
    """
    positions = []
    for i, (h, w) in enumerate(geometry.sizes):
        # A row's embedding is that of all its cells: sines are drawn along the axes only.
        x, y = (
            _sines(_steps(n, geometry.covered[:, i, axis] + 1e-6), dim // 2) for axis, n in enumerate((w, h))
        )
        both = [y[:, :, None].expand(-1, -1, w, -1), x[:, None].expand(-1, h, -1, -1)]
        positions.append(torch.cat(both, dim=-1).flatten(1, 2))
    return positions


def _steps(cells: int, count: Tensor) -> Tensor:
    """Return the centres of cells along an axis, in units of the `count` (B,) valid ones: (B, cells)."""
    step = torch.arange(cells, dtype=torch.float32, device=count.device) + 0.5
    return step / count[:, None]


def _sines(place: Tensor, channels: int) -> Tensor:
    """Embed places, 0 to 1, (B, n) -> (B, n, channels)."""
    pair = torch.arange(channels // 2, dtype=torch.float32, device=place.device)
    phase = place[..., None] * (2 * math.pi) / 10000.0 ** (2 * pair / channels)
    return torch.stack([phase.sin(), phase.cos()], dim=-1).flatten(-2)


def join_maps(maps: Sequence[Tensor]) -> Tensor:
    """Put the cells of maps (B, h, w, C) in one row: (B, N, C)."""
    return torch.cat([feature.flatten(1, 2) for feature in maps], dim=1)


def part_maps(cells: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Undo `join_maps`: (B, N, C) -> for each of the heights and widths a map (B, h, w, C)."""
    maps, start = [], 0
    for h, w in sizes:
        maps.append(torch.unflatten(cells.narrow(1, start, h * w), 1, (h, w)))
        start += h * w
    return maps


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention; parameters as the public Deformable DETR names them."""

    def __init__(self, dim: int, heads: int, points: int, maps: int = MAPS) -> None:
        super().__init__()
        self.heads, self.points, self.maps = heads, points, maps
        self.sampling_offsets = nn.Linear(dim, heads * maps * points * 2)
        self.attention_weights = nn.Linear(dim, heads * maps * points)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        self.init_weights()

    def init_weights(self) -> None:
        """Let each head look in a direction of its own, and its points lie 1, 2, 3, ... cells away (the
        paper's appendix A.4)."""
        angle = torch.arange(self.heads, dtype=torch.float32) * (2 * math.pi / self.heads)
        direction = torch.stack([angle.cos(), angle.sin()], dim=-1)
        direction = direction / direction.abs().amax(dim=-1, keepdim=True)
        distance = torch.arange(1.0, self.points + 1)[:, None]
        bias = (direction[:, None, None] * distance).expand(-1, self.maps, -1, -1)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(bias.flatten())
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for linear in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(
        self, query: Tensor, centre: Tensor, reach: Tensor, cells: Tensor, geometry: Geometry
    ) -> Tensor:
        """Attend to cells (B, N, C) for query (B, Q, C) -> (B, Q, C).

        centre: float32 (B, Q, L, 2) x, y relative to each whole map; reach: float32 (B, Q or 1, L, 2), how
        far an offset of 1 goes, likewise.  Cells of the padding count as zero.
        """
        value = self.value_proj(cells).masked_fill(geometry.padding, 0.0)
        by_map = (self.heads, self.maps, self.points)
        offset = torch.unflatten(self.sampling_offsets(query).float(), -1, (*by_map, 2))
        weight = torch.unflatten(self.attention_weights(query).float(), -1, (self.heads, -1))
        weight = torch.unflatten(torch.softmax(weight, dim=-1), -1, by_map[1:])
        centre, reach = (x.unsqueeze(2).unsqueeze(4) for x in (centre, reach))  # heads and points
        xy = centre + offset * reach
        sampled = deformable_sample(part_maps(value, geometry.sizes), xy, weight)
        return self.output_proj(sampled)  # type: ignore[no-any-return]
