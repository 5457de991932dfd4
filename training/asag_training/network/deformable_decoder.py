"""The decoder layer of Deformable DETR, of which ASAG-D uses one (Zhu et al., ICLR 2021, section 4.2).

Boxes are refined as in its iterative bounding box refinement (appendix A.4).

B images, Q queries, N cells of all maps, L maps, C channels.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asag_training.network.config import AsagConfig
from asag_training.network.deformable import DeformableAttention, Geometry, geometry_of, join_maps
from asag_training.network.layers import (
    BiasedSelfAttention,
    Mlp,
    blocking_bias,
    init_detection_head,
    sine_embedding,
)
from asag_training.network.pyramid import box_cell, pyramid_strides
from asag_training.network.relation_block import Proposals, relative_to_xyzr

_EDGE = 1e-5
"""Coordinates are kept so far from 0 and 1 where their logits are taken."""


class Around(NamedTuple):
    """Where queries look on each map: see `DeformableAttention`."""

    centre: Tensor
    """float32 (B, Q, L, 2)."""
    reach: Tensor
    """float32 (B, Q or 1, L, 2)."""


def around_boxes(boxes: Tensor, geometry: Geometry, points: int) -> Around:
    """Look around in boxes (B, Q, 4), cxcywh relative to the valid image, with so many points."""
    on_maps = boxes[:, :, None] * torch.cat([geometry.ratio, geometry.ratio], dim=-1)[:, None]
    # The last point starts at the edge of the box.
    return Around(on_maps[..., :2], on_maps[..., 2:] * (0.5 / points))


def around_points(places: Tensor, geometry: Geometry) -> Around:
    """Look around places (B, Q, 2), x, y relative to the valid image, in steps of a cell."""
    return Around(places[:, :, None] * geometry.ratio[:, None], (geometry.ratio / geometry.covered)[:, None])


class DecoderLayer(nn.Module):
    """Self-attention among the queries, deformable attention to the maps around each, and an FFN.

    Parameters have the names of the public Deformable DETR, whose norms are not numbered in their order.
    """

    def __init__(self, config: AsagConfig) -> None:
        super().__init__()
        dim, inner = config.hidden_dim, config.deformable_ffn_dim
        self.self_attn = BiasedSelfAttention(dim, config.attention_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.cross_attn = DeformableAttention(dim, config.attention_heads, config.deformable_points)
        self.norm1 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, inner)
        self.linear2 = nn.Linear(inner, dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(
        self,
        content: Tensor,
        position: Tensor,
        around: Around,
        bias: Tensor,
        cells: Tensor,
        geometry: Geometry,
    ) -> Tensor:
        """Refine what queries know, content (B, Q, C), with the embedding of their positions (B, Q, C).

        around: where they look; bias: float32 (B, 1, Q, Q) of the self-attention, -inf for who must not be
        seen; cells: (B, N, C) of all maps.
        """
        content = self.norm2(content + self.self_attn(content, bias, position))
        attended = self.cross_attn(content + position, *around, cells, geometry)
        content = self.norm1(content + attended)
        inner = self.linear2(F.relu(self.linear1(content)))
        return self.norm3(content + inner)  # type: ignore[no-any-return]


class DeformableStage(DecoderLayer):
    """A decoder layer with its class and box heads."""

    def __init__(self, config: AsagConfig) -> None:
        super().__init__(config)
        dim = config.hidden_dim
        self.class_embed = nn.Linear(dim, config.num_classes)
        self.bbox_embed = Mlp((dim, dim, dim, 4), "relu")
        init_detection_head(self, self.class_embed, cast(nn.Linear, self.bbox_embed.layers[-1]))
        self.cross_attn.init_weights()

    def predict(self, content: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (B, Q, classes) and refined boxes (B, Q, 4), cxcywh relative to the valid image."""
        delta = self.bbox_embed(content).float()
        return self.class_embed(content).float(), torch.sigmoid(inverse_sigmoid(boxes) + delta)


def inverse_sigmoid(x: Tensor) -> Tensor:
    """Return the logits of numbers of 0 to 1, beyond which they are clamped."""
    x = x.clamp(0.0, 1.0)
    return torch.log(x.clamp(min=_EDGE) / (1 - x).clamp(min=_EDGE))


class DeformableDecoder(nn.Module):
    """The parallel decoders of ASAG-D, each of one layer or a sequence of them; all refine the same
    proposals."""

    def __init__(self, config: AsagConfig) -> None:
        super().__init__()
        self.sequence = config.decoder_layers
        self.cell, self.stride = box_cell(config), pyramid_strides(config)[0]
        stages = config.heads * self.sequence
        self.decoder_embedding = nn.Embedding(stages, config.hidden_dim)
        self.layers = nn.ModuleList(DeformableStage(config) for _ in range(stages))

    def forward(
        self, head: int, features: list[Tensor], proposals: Proposals, image_size: Tensor, blocked: Tensor
    ) -> list[tuple[Tensor, Tensor]]:
        """Run head `head`; return for each of its layers logits (B, Q, classes) and boxes (B, Q, 4) cxcywh
        relative to the valid image."""
        # What the batch was padded to is not known here; it is what the finest map covers, as all are padded
        # to multiples of its stride.
        canvas = features[0].shape[1] * self.stride, features[0].shape[2] * self.stride
        geometry, cells = geometry_of(features, image_size, canvas), join_maps(features)
        bias = blocking_bias(blocked)
        boxes, content = proposals.boxes.detach(), proposals.content
        xyzr = proposals.xyzr.detach()
        predicted: list[tuple[Tensor, Tensor]] = []
        for stage in range(head * self.sequence, (head + 1) * self.sequence):
            if predicted:
                boxes = boxes.detach()
                xyzr = relative_to_xyzr(boxes, self.cell, image_size)
            layer = cast(DeformableStage, self.layers[stage])
            position = sine_embedding(xyzr, content.shape[-1]).to(content.dtype)
            query = content + self.decoder_embedding.weight[stage]
            around = around_boxes(boxes, geometry, layer.cross_attn.points)
            content = layer(query, position, around, bias, cells, geometry)
            logits, boxes = layer.predict(content, boxes)
            predicted.append((logits, boxes))
        return predicted
