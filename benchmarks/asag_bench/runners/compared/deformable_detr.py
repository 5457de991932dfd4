"""Deformable DETR with six layers each (Zhu et al., ICLR 2021): what ASAG-D is compared with.

Boxes are refined layer by layer (appendix A.4), which the paper's figures are of.

B images, Q queries, C channels.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from asag_bench.runners.compared.detector import (
    ComparedDetector,
    backbone_channels,
    backbone_names,
    channels_last,
)
from asag_training.network.config import DEFORMABLE, AsagConfig
from asag_training.network.deformable import Geometry, geometry_of, join_maps
from asag_training.network.deformable_decoder import (
    DeformableStage,
    around_boxes,
    around_points,
    inverse_sigmoid,
)
from asag_training.network.deformable_encoder import DeformableEncoder, MapProjections

LAYERS = 6
_STRIDE = 8
"""Of C3, to multiples of which images are padded."""


def encode(
    neck: MapProjections, encoder: DeformableEncoder, maps: list[Tensor], image_size: Tensor
) -> tuple[Tensor, Geometry]:
    """Turn C3..C5, each (B, C_i, h, w), into the cells of E3..E6 (B, N, C), and say where they lie."""
    c3 = maps[0]
    canvas = c3.shape[2] * _STRIDE, c3.shape[3] * _STRIDE
    projected = channels_last(neck([c3, *maps]))  # which leaves the first one out
    encoded = encoder(projected, image_size, canvas)
    return join_maps(encoded), geometry_of(encoded, image_size, canvas)


class PlacedQueries(nn.Module):
    """Learned contents and positions, and the place in the image that belongs to each position."""

    def __init__(self, count: int, channels: int) -> None:
        super().__init__()
        self.content = nn.Embedding(count, channels)
        self.position = nn.Embedding(count, channels)
        self.reference_points = nn.Linear(channels, 2)

    def forward(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return contents and positions, each (B, Q, C), and places (B, Q, 2), x, y relative to the image."""
        content, position = (x.weight.expand(batch, -1, -1) for x in (self.content, self.position))
        return content, position, self.reference_points(position).float().sigmoid()


class DeformableDetr(ComparedDetector):
    """Learned queries with places of their own, and six layers in sequence over encoded maps."""

    def __init__(self, config: AsagConfig, queries: int) -> None:
        """Take the settings of the network that it is compared with, and the number of queries."""
        own = deformable_config(config, layers=LAYERS, encoder_layers=LAYERS)
        super().__init__(own, backbone_names(3))
        self.neck = MapProjections(backbone_channels(own, backbone_names(2)), own)
        self.encoder = DeformableEncoder(own)
        self.learned = PlacedQueries(queries, own.hidden_dim)
        self.decoder = nn.ModuleList(DeformableStage(own) for _ in range(LAYERS))

    def detect(self, maps: list[Tensor], image_size: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and boxes of the sixth layer, of maps C3..C5."""
        cells, geometry = encode(self.neck, self.encoder, maps, image_size)
        content, position, places = self.learned(image_size.shape[0])
        bias = torch.zeros(1, 1, 1, 1, device=cells.device)
        around, boxes, logits = around_points(places, geometry), places, content
        for i, module in enumerate(self.decoder):
            layer = cast(DeformableStage, module)
            if i:
                around = around_boxes(boxes, geometry, layer.cross_attn.points)
            content = layer(content, position, around, bias, cells, geometry)
            if i:
                logits, boxes = layer.predict(content, boxes)
            else:
                logits, boxes = _first_boxes(layer, content, places)
        return logits, boxes


def _first_boxes(layer: DeformableStage, content: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Predict logits and boxes of queries that have places (B, Q, 2) and no sizes yet."""
    delta = layer.bbox_embed(content).float()
    centre = inverse_sigmoid(places) + delta[..., :2]
    return layer.class_embed(content).float(), torch.sigmoid(torch.cat([centre, delta[..., 2:]], dim=-1))


def deformable_config(config: AsagConfig, layers: int, encoder_layers: int) -> AsagConfig:
    """Return the settings of a deformable detector beside a network: its backbone, width and classes."""
    return config.with_changes(
        decoder=DEFORMABLE,
        decoder_layers=layers,
        heads=1,
        encoder_layers=encoder_layers,
        finest_map="P3",
        separable_neck=False,
    )
