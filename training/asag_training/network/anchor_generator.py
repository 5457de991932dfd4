"""The anchor generator: sparse anchors from patches, level by level (paper, section 4.2).

One call predicts one level; who decides whether and where to look next is the loop in
`asag_deploy.loop.probing`.  Feature maps are channels-last, (B, h, w, C).  A patch is `patch_size` x
`patch_size` cells (`first_patch_size`, on P5 and P6) compressed to a few channels, flattened to tokens and
read by an MLP that predicts all its anchors.

B images, K patches per image, A anchors per patch, T tokens (a patch's cells), c = compress_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asag_training.network import boxes as box_ops
from asag_training.network.config import AsagConfig
from asag_training.network.layers import Mlp, activation, weight_type

STRIDES = {"P5": 32, "P4": 16, "P3": 8}
_COMPRESS = {"P3": 0, "P4": 1, "P5": 2}
"""Index of a level in `compress`, which the official checkpoints order by resolution."""
_TOKENS = {"P5": 0, "P4": 1, "P3": 2}
"""Index of a level in `layernorm` and `pos_embedding`, which they order by probing."""

QUADRANTS = ((0, 0), (0, 1), (1, 0), (1, 1))
"""Row and column of the four P5 patches; the P6 patch, which is the whole image, is the fifth."""
FIRST_LEVEL_PATCHES = len(QUADRANTS) + 1


class Prediction(NamedTuple):
    """The prediction of a level."""

    raw: Tensor
    """(B, K, A, 5) as predicted: cx, cy, w, h relative to the patch, and a score logit.  Has gradients."""
    anchors: Tensor
    """(B, K * A, 5) cx, cy, w, h in pixels of the image, and score 0..1; 0 for anchors of no use.  Detached.
    None are of patches that were flipped."""


class AnchorGenerator(nn.Module):
    """Predicts anchors on the first level, and on patches of P4 and P3."""

    def __init__(self, config: AsagConfig) -> None:
        super().__init__()
        dim, c = config.hidden_dim, config.compress_dim
        first, tokens = config.first_patch_size**2, config.patch_size**2
        self.config = config
        self.compress = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(dim, dim // 2, 1),
                activation(config.activation),
                nn.Conv2d(dim // 2, c, 3, padding=1),
            )
            for _ in _COMPRESS
        )
        self.P6 = nn.Conv2d(c, c, 3, stride=2, padding=2, dilation=2)
        counts = (first, tokens, tokens)  # as `_TOKENS` has them
        self.layernorm = nn.ModuleList(nn.LayerNorm((count, c)) for count in counts)
        self.pos_embedding = nn.ModuleList(nn.Embedding(count, c) for count in counts)
        inner = (125 * c, 125 * c)
        self.proj_all = Mlp((first * c, *inner, 5 * config.first_level_anchors), config.activation)
        self.proj_patch = Mlp((tokens * c, *inner, 5 * config.patch_anchors), config.activation)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        # Two-dimensional, they would be drawn as matrices are, and all but silence the patches at the start.
        for norm in self.layernorm:
            nn.init.ones_(norm.get_parameter("weight"))
        for embedding in self.pos_embedding:
            nn.init.zeros_(embedding.get_parameter("weight"))

    def first_level(
        self, p5: Tensor, image_size: Tensor, *, flips: Sequence[tuple[bool, bool]] = ()
    ) -> Prediction:
        """Predict the anchors of the four P5 patches and the P6 patch, in that order: K = 5.

        Training appends copies of the P6 patch to them, flipped as `flips` says: (horizontally, vertically).
        """
        size = self.config.first_patch_size
        layer = self._compressor("P5")
        compressed = layer(p5.to(weight_type(layer)).permute(0, 3, 1, 2)).float()
        resized = resize_valid(compressed, image_size, STRIDES["P5"], 2 * size)
        quadrants = [
            resized[:, :, row * size : (row + 1) * size, column * size : (column + 1) * size]
            for row, column in QUADRANTS
        ]
        whole = self.P6(F.relu(resized).to(self.P6.weight.dtype)).float()
        flipped = [_flip(whole, *flip) for flip in flips]
        patches = torch.stack([*quadrants, whole, *flipped], dim=1)  # (B, K, c, size, size)
        tokens = patches.flatten(3).transpose(2, 3)
        raw = self._predict(tokens, "P5", self.proj_all)
        upright = raw[:, :FIRST_LEVEL_PATCHES] if flips else raw

        # From patch to image: quadrants are half of it and begin where their row and column do.
        own = upright.detach()[..., :4]
        relative = torch.cat([own[:, : len(QUADRANTS)] * 0.5, own[:, len(QUADRANTS) :]], dim=1)
        begin = _first_corners(raw.device)
        centres = relative[..., :2] + begin[:, None]
        boxes = torch.cat([centres, relative[..., 2:]], dim=-1) * box_ops.whwh(image_size)[:, None]
        return Prediction(raw, self._score(upright, boxes, torch.ones_like(boxes[..., 0], dtype=torch.bool)))

    def probe(
        self,
        level: str,
        feature: Tensor,
        feature_size: Tensor,
        image_size: Tensor,
        origins: Tensor,
        patch_count: Tensor,
    ) -> Prediction:
        """Predict the anchors of patches of `level` ('P4' or 'P3').

        feature: (B, h, w, C), that level's map; feature_size: int64 (2,), its h and w, which on a GPU must
        not come from the host while a graph decides; origins: int64 (B, K, 2) x, y of each patch in cells;
        patch_count: int64 (B,), how many of an image's K patches are real: the rest score 0.
        """
        tokens = self._compress_patches(level, feature, feature_size, origins)
        raw = self._predict(tokens, level, self.proj_patch)

        cells = box_ops.whwh(image_size)[:, None] / STRIDES[level]  # the image's size in cells, (B, 1, 1, 4)
        relative = raw.detach()[..., :4] * (self.config.patch_size / cells)
        centres = relative[..., :2] + origins[:, :, None] / cells[..., :2]
        real = torch.arange(origins.shape[1], device=origins.device) < patch_count[:, None]
        usable = (centres < 1).all(dim=-1) & real[..., None]
        boxes = torch.cat([centres, relative[..., 2:]], dim=-1) * box_ops.whwh(image_size)[:, None]
        return Prediction(raw, self._score(raw, boxes, usable))

    def select(self, anchors: Tensor, level: str) -> Tensor:
        """Return which anchors ask for a closer look on `level` ('P4' or 'P3'): (B, N, 5) -> bool (B, N).

        Those scored as neither object nor noise, and smaller than half a patch of that level.
        """
        config = self.config
        half = STRIDES[level] * config.patch_size / 2
        score = anchors[..., 4]
        uncertain = (score > config.score_low) & (score < config.score_high)
        return uncertain & (anchors[..., 2] < half) & (anchors[..., 3] < half)

    def passes(self, anchors: Tensor) -> Tensor:
        """Return which anchors are scored high enough for the decoder: (B, N, 5) -> bool (B, N)."""
        return anchors[..., 4] > self.config.score_pass

    def _compressor(self, level: str) -> nn.Sequential:
        """Return convolution 1x1, activation, convolution 3x3."""
        return cast(nn.Sequential, self.compress[_COMPRESS[level]])

    def _predict(self, tokens: Tensor, level: str, head: Mlp) -> Tensor:
        """Predict from tokens (B, K, T, c) raw anchors float32 (B, K, A, 5)."""
        norm, position = self.layernorm[_TOKENS[level]], self.pos_embedding[_TOKENS[level]]
        tokens = norm(tokens.to(weight_type(norm))) + position.get_parameter("weight")
        raw: Tensor = head(tokens.flatten(2)).float().unflatten(-1, (-1, 5))
        return torch.cat([raw[..., :4].sigmoid(), raw[..., 4:]], dim=-1)

    def _score(self, raw: Tensor, boxes: Tensor, usable: Tensor) -> Tensor:
        """Join boxes (B, K, A, 4) in pixels with their scores; unusable or tiny ones score 0."""
        side = self.config.min_anchor_side
        usable = usable & (boxes[..., 2] >= side) & (boxes[..., 3] >= side)
        score = torch.where(usable, raw.detach()[..., 4].sigmoid(), 0.0)
        return torch.cat([boxes, score[..., None]], dim=-1).flatten(1, 2)

    def _compress_patches(self, level: str, feature: Tensor, feature_size: Tensor, origins: Tensor) -> Tensor:
        """Crop patches and compress them: (B, h, w, C), (B, K, 2) -> tokens (B, K, T, c).

        Equals compressing the whole map and cropping, but touches only the patches and the ring of one cell
        that the 3x3 convolution reads.  Cells outside the map are 0, as the convolution pads.
        """
        layer = self._compressor(level)
        pointwise, spatial = cast(nn.Conv2d, layer[0]), cast(nn.Conv2d, layer[2])
        size = self.config.patch_size
        height, width = feature_size.unbind()
        offset = torch.arange(-1, size + 1, device=feature.device)
        columns, rows = origins[..., 0:1] + offset, origins[..., 1:2] + offset  # (B, K, size + 2)
        inside = _within(rows, height)[..., :, None] & _within(columns, width)[..., None, :]
        image = torch.arange(len(origins), device=feature.device)[:, None, None, None] * (height * width)
        row, column = _clamp(rows, height), _clamp(columns, width)
        index = image + row[..., :, None] * width + column[..., None, :]

        cells = torch.unflatten(feature.flatten(0, 2)[index.flatten()], 0, index.shape)
        cells = cells.to(weight_type(pointwise))  # (B, K, size + 2, size + 2, C)
        hidden = layer[1](F.linear(cells, pointwise.weight.flatten(1), pointwise.bias))
        compressed = _conv3x3_valid(hidden, inside, spatial.weight) + spatial.get_parameter("bias")
        return (compressed * inside[..., 1:-1, 1:-1, None]).flatten(2, 3)


def resize_valid(features: Tensor, image_size: Tensor, stride: int, size: int) -> Tensor:
    """Resize the valid part of each map (B, c, h, w) bilinearly to (B, c, size, size).

    The valid part is round(image size / stride) cells, from the top left.  Pixel centres are aligned, corners
    are not.  Written as two small matrix products so that every image of a batch can have its own valid part
    while all shapes stay static.
    """
    height, width = features.shape[-2:]
    cells = torch.round(image_size.float() / stride)
    rows = _interpolation(cells[:, 0], height, size)  # (B, size, h)
    columns = _interpolation(cells[:, 1], width, size)  # (B, size, w)
    return rows[:, None] @ features @ columns[:, None].transpose(-1, -2)


def _interpolation(valid: Tensor, cells: int, size: int) -> Tensor:
    """Return weights (B, size, cells) that resample the first `valid` (B,) of `cells` cells to `size`."""
    valid = valid.clamp(1, cells)[:, None]
    step = torch.arange(size, dtype=torch.float32, device=valid.device) + 0.5
    source = torch.minimum((step * valid / size - 0.5).clamp(min=0), valid - 1)  # (B, size)
    cell = torch.arange(cells, dtype=torch.float32, device=valid.device)
    return (1 - (source[..., None] - cell).abs()).clamp(min=0)


def _first_corners(device: torch.device) -> Tensor:
    """Return (5, 2) x, y where the patches of the first level begin, relative to the image: `QUADRANTS`, then
    P6.

    Computed, since a copy from the host could not be captured in a CUDA graph.
    """
    patch = torch.arange(FIRST_LEVEL_PATCHES, device=device)
    row, column = torch.div(patch, 2, rounding_mode="floor") % 2, patch % 2
    return torch.stack([column, row], dim=-1) * 0.5


def _flip(patch: Tensor, horizontally: bool, vertically: bool) -> Tensor:
    """Mirror (B, c, h, w) along the axes asked for."""
    axes = [axis for axis, asked in ((-1, horizontally), (-2, vertically)) if asked]
    return patch.flip(axes)


def _within(index: Tensor, size: Tensor) -> Tensor:
    return (index >= 0) & (index < size)


def _clamp(index: Tensor, size: Tensor) -> Tensor:
    return torch.minimum(index.clamp(min=0), size - 1)


def _conv3x3_valid(x: Tensor, inside: Tensor, weight: Tensor) -> Tensor:
    """Convolve 3x3 without padding, channels last: (..., h, w, C), (c, C, 3, 3) -> (..., h - 2, w - 2, c).

    Cells that are not `inside`, bool (..., h, w), count as 0.  One product with all nine taps, then shifted
    sums over rows and over columns: far less memory traffic than gathering windows, since c is small.
    """
    taps = (x @ weight.permute(1, 2, 3, 0).flatten(1)) * inside[..., None]  # (..., h, w, 9 * c)
    above, same, below = taps.chunk(3, dim=-1)
    rows = above[..., :-2, :, :] + same[..., 1:-1, :, :] + below[..., 2:, :, :]  # (..., h - 2, w, 3 * c)
    left, middle, right = rows.chunk(3, dim=-1)
    return left[..., :-2, :] + middle[..., 1:-1, :] + right[..., 2:, :]
