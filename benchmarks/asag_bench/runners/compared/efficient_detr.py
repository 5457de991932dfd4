"""Efficient DETR (Yao et al., arXiv 2104.01318): queries found among the encoder's cells, one decoder layer.

Written from its paper, for its authors published no code: the larger of its networks, which the paper of ASAG
compares with.

B images, N cells of all maps, Q queries, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from asag_bench.runners.compared.deformable_detr import deformable_config, encode
from asag_bench.runners.compared.detector import (
    ComparedDetector,
    backbone_channels,
    backbone_names,
    take_rows,
)
from asag_training.network.config import AsagConfig
from asag_training.network.deformable import Geometry, cell_centres
from asag_training.network.deformable_decoder import DeformableStage, around_boxes, inverse_sigmoid
from asag_training.network.deformable_encoder import DeformableEncoder, MapProjections
from asag_training.network.layers import Mlp, sine_embedding
from asag_training.network.pyramid import box_cell
from asag_training.network.relation_block import relative_to_xyzr

ENCODER_LAYERS = 6
_SIDE = 0.05
"""Of the box that a cell of the finest map begins with, relative to the image; each map doubles it."""


class DenseQueries(nn.Module):
    """A class and a box for every cell; the cells that score best are the queries."""

    def __init__(self, config: AsagConfig, queries: int) -> None:
        super().__init__()
        dim = config.hidden_dim
        self.queries = queries
        self.project = nn.Sequential(nn.Linear(dim, dim), nn.LayerNorm(dim))
        self.classify = nn.Linear(dim, config.num_classes)
        self.box = Mlp((dim, dim, dim, 4), "relu")

    def forward(self, cells: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
        """Return content (B, Q, C) and boxes (B, Q, 4), cxcywh relative to the image, of cells (B, N, C)."""
        content = self.project(cells.masked_fill(geometry.padding, 0.0))
        score = self.classify(content).float().amax(dim=-1).masked_fill(geometry.padding[..., 0], -torch.inf)
        count = torch.sym_min(self.queries, score.shape[1])  # type: ignore[no-untyped-call]
        _, best = torch.topk(score, count, dim=1)
        sides = [
            torch.full((h * w,), _SIDE * 2**i, device=cells.device) for i, (h, w) in enumerate(geometry.sizes)
        ]
        side = torch.cat(sides)[None, :, None].expand(cells.shape[0], -1, 2)
        boxes = torch.cat([cell_centres(geometry), side], dim=-1)
        delta = self.box(content).float()
        boxes = torch.sigmoid(inverse_sigmoid(take_rows(boxes, best)) + take_rows(delta, best))
        return take_rows(content, best), boxes


class EfficientDetr(ComparedDetector):
    """An encoder of six layers, queries found among its cells, and one decoder layer."""

    def __init__(self, config: AsagConfig, queries: int) -> None:
        """Take the settings of the network that it is compared with, and the number of queries."""
        own = deformable_config(config, layers=1, encoder_layers=ENCODER_LAYERS)
        super().__init__(own, backbone_names(3))
        self.neck = MapProjections(backbone_channels(own, backbone_names(2)), own)
        self.encoder = DeformableEncoder(own)
        self.generator = DenseQueries(own, queries)
        self.decoder = DeformableStage(own)
        self.cell = box_cell(own)

    def detect(self, maps: list[Tensor], image_size: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and boxes of the one layer, of maps C3..C5."""
        cells, geometry = encode(self.neck, self.encoder, maps, image_size)
        content, boxes = self.generator(cells, geometry)
        xyzr = relative_to_xyzr(boxes, self.cell, image_size)
        position = sine_embedding(xyzr, content.shape[-1]).to(content.dtype)
        around = around_boxes(boxes, geometry, self.decoder.cross_attn.points)
        bias = torch.zeros(1, 1, 1, 1, device=cells.device)
        content = self.decoder(content, position, around, bias, cells, geometry)
        logits, boxes = self.decoder.predict(content, boxes)
        return logits, boxes
