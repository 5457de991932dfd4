"""The Sparse R-CNN dynamic head, of which ASAG-S uses one (Sun et al., Sparse R-CNN, CVPR 2021).

B images, Q queries, C channels, D the inner width of the dynamic convolution.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asag_training.network import boxes as box_ops
from asag_training.network.config import AsagConfig
from asag_training.network.layers import (
    BiasedSelfAttention,
    activation,
    blocking_bias,
    init_detection_head,
    run,
    tower,
)
from asag_training.network.operators import ROI_SIZE, multiscale_roi_align
from asag_training.network.pyramid import pyramid_strides
from asag_training.network.relation_block import Proposals

_DELTA_SCALE = 2.0
"""Centre deltas are predicted at twice their size."""
_LOG_SIZE_LIMIT = math.log(100000.0 / 16)


class DynamicConv(nn.Module):
    """Two layers over a query's RoI features whose weights are made from the query."""

    def __init__(self, config: AsagConfig) -> None:
        super().__init__()
        dim, self.inner = config.hidden_dim, config.dynamic_dim
        self.dynamic_layer = nn.Linear(dim, 2 * dim * self.inner)
        self.norm1 = nn.LayerNorm(self.inner)
        self.norm2 = nn.LayerNorm(dim)
        self.out_layer = nn.Linear(dim * ROI_SIZE**2, dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, query: Tensor, roi: Tensor) -> Tensor:
        """Convolve roi (B, Q, 49, C) with weights made from query (B, Q, C) -> (B, Q, C)."""
        down, up = self.dynamic_layer(query).chunk(2, dim=-1)
        x = F.relu(self.norm1(roi @ down.unflatten(-1, (-1, self.inner))))
        x = F.relu(self.norm2(x @ up.unflatten(-1, (self.inner, -1))))
        return F.relu(self.norm3(self.out_layer(x.flatten(2))))


class SparseRcnnStage(nn.Module):
    """Self-attention, dynamic convolution, FFN, and the class and box heads."""

    def __init__(self, config: AsagConfig) -> None:
        super().__init__()
        dim = config.hidden_dim
        self.self_attn = BiasedSelfAttention(dim, config.attention_heads)
        self.inst_interact = DynamicConv(config)
        self.linear1 = nn.Linear(dim, config.ffn_dim)
        self.linear2 = nn.Linear(config.ffn_dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)
        self.act = activation(config.activation)
        self.cls_module = tower(dim, 1, config.activation)
        self.reg_module = tower(dim, config.box_layers, config.activation)
        self.class_logits = nn.Linear(dim, config.num_classes)
        self.bboxes_delta = nn.Linear(dim, 4)
        init_detection_head(self, self.class_logits, self.bboxes_delta)

    def forward(
        self, content: Tensor, roi: Tensor, boxes: Tensor, blocked: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits (B, Q, classes), refined boxes (B, Q, 4) cxcywh, and content (B, Q, C)."""
        content = self.interact(content, roi, blocked)
        content = self.norm3(content + self.linear2(self.act(self.linear1(content))))
        logits = self.class_logits(run(self.cls_module, content)).float()
        delta = self.bboxes_delta(run(self.reg_module, content)).float()
        return logits, _refine(boxes, delta), content

    def interact(self, content: Tensor, roi: Tensor, blocked: Tensor) -> Tensor:
        """Let queries (B, Q, C) see each other, and then what lies in their boxes: roi (B, Q, 49, C)."""
        content = self.norm1(content + self.self_attn(content, blocking_bias(blocked)))
        return self.norm2(content + self.inst_interact(content, roi.to(content.dtype)))  # type: ignore[no-any-return]


def _refine(boxes: Tensor, delta: Tensor) -> Tensor:
    """Move cxcywh boxes (B, Q, 4) by deltas relative to their size (R-CNN's parametrisation)."""
    size = boxes[..., 2:]
    centre = boxes[..., :2] + delta[..., :2] / _DELTA_SCALE * size
    return torch.cat([centre, delta[..., 2:].clamp(max=_LOG_SIZE_LIMIT).exp() * size], dim=-1)


class SparseRcnnDecoder(nn.Module):
    """The parallel decoders of ASAG-S, each of one Sparse R-CNN stage or a sequence of them; all refine the
    same proposals."""

    def __init__(self, config: AsagConfig) -> None:
        super().__init__()
        self.layers = config.decoder_layers
        self.strides = pyramid_strides(config)
        stages = config.heads * self.layers
        self.head_series = nn.ModuleList(SparseRcnnStage(config) for _ in range(stages))
        self.decoder_embedding = nn.Embedding(stages, config.hidden_dim)

    def forward(
        self, head: int, features: list[Tensor], proposals: Proposals, image_size: Tensor, blocked: Tensor
    ) -> list[tuple[Tensor, Tensor]]:
        """Run head `head`; return for each of its layers logits (B, Q, classes) and boxes (B, Q, 4) cxcywh
        relative to the valid image."""
        boxes, content = proposals.boxes, proposals.content
        predicted = []
        for stage in range(head * self.layers, (head + 1) * self.layers):
            boxes = boxes.detach()
            pixels = box_ops.cxcywh_to_xyxy(boxes) * box_ops.whwh(image_size)
            roi = multiscale_roi_align(features, pixels, self.strides).flatten(2, 3)
            query = content + self.decoder_embedding.weight[stage]
            logits, boxes, content = self.head_series[stage](query, roi, boxes, blocked)
            predicted.append((logits, boxes))
        return predicted
