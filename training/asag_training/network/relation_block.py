"""The relation block: anchors become queries that know each other (paper, section 4.1; 'rpn' in checkpoints).

B images, Q queries, C channels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asag_training.network import boxes as box_ops
from asag_training.network.config import AsagConfig
from asag_training.network.layers import (
    BiasedSelfAttention,
    Mlp,
    blocking_bias,
    init_detection_head,
    run,
    sine_embedding,
    tower,
)
from asag_training.network.operators import ROI_SIZE, multiscale_roi_align
from asag_training.network.pyramid import box_cell, pyramid_strides


class Proposals(NamedTuple):
    """The proposals that the relation block hands to a decoder."""

    logits: Tensor
    """(B, Q, classes)."""
    boxes: Tensor
    """(B, Q, 4) cxcywh relative to the valid image."""
    xyzr: Tensor
    """(B, Q, 4) the same boxes as xyzr in cells of the finest map (see `box_cell`)."""
    content: Tensor
    """(B, Q, C) query features."""


def overlap_bias(xyzr: Tensor, tau: Tensor, blocked: Tensor) -> Tensor:
    """Compute the attention bias tau_h log(IoF) of boxes (B, Q, 4) xyzr: float32 (B, heads, Q, Q), -inf where
    blocked."""
    overlap = torch.log(box_ops.iof(box_ops.xyzr_to_xyxy(xyzr)) + 1e-7)
    return overlap[:, None] * tau.float().view(1, -1, 1, 1) + blocking_bias(blocked)


def xyzr_to_relative(xyzr: Tensor, stride: int, image_size: Tensor) -> Tensor:
    """Convert (B, Q, 4) xyzr in cells of `stride` pixels to cxcywh relative to the valid image."""
    pixels = box_ops.xyzr_to_xyxy(xyzr) * stride
    return box_ops.xyxy_to_cxcywh(pixels / box_ops.whwh(image_size))


def relative_to_xyzr(boxes: Tensor, stride: int, image_size: Tensor) -> Tensor:
    """Convert (B, Q, 4) cxcywh relative to the valid image to xyzr in cells of `stride` pixels."""
    pixels = box_ops.cxcywh_to_xyxy(boxes) * box_ops.whwh(image_size)
    return box_ops.xyxy_to_xyzr(pixels / stride)


class RelationBlock(nn.Module):
    """RoI features of the anchors, one self-attention among them, and a first refinement."""

    def __init__(self, config: AsagConfig) -> None:
        super().__init__()
        dim = config.hidden_dim
        self.strides, self.cell = pyramid_strides(config), box_cell(config)
        self.roi = nn.Linear(dim * ROI_SIZE**2, dim)
        self.tokens_norm1 = nn.LayerNorm(dim)
        self.tokens_proj = Mlp((dim, config.ffn_dim, dim), config.activation)
        self.tokens_norm2 = nn.LayerNorm(dim)
        self.attn = BiasedSelfAttention(dim, config.attention_heads)
        self.iof_tau = nn.Parameter(torch.empty(config.attention_heads))
        self.tokens_norm3 = nn.LayerNorm(dim)
        self.cls_fcs = tower(dim, 1, config.activation)
        self.fc_cls = nn.Linear(dim, config.num_classes)
        self.reg_fcs = tower(dim, 3, config.activation)
        self.fc_reg = nn.Linear(dim, 4)
        init_detection_head(self, self.fc_cls, self.fc_reg)
        nn.init.uniform_(self.iof_tau, 0.0, 4.0)

    def forward(
        self, features: list[Tensor], anchors: Tensor, image_size: Tensor, blocked: Tensor
    ) -> Proposals:
        """Turn anchors into proposals.

        features: P2..P5 or P3..P6, each (B, h, w, C); anchors: (B, Q, 4) cxcywh in pixels; blocked: bool
        (B, Q, Q), which query (row) must not see which (column).
        """
        boxes = box_ops.cxcywh_to_xyxy(anchors)
        content = self._roi_content(multiscale_roi_align(features, boxes, self.strides))

        with torch.no_grad():
            xyzr = box_ops.xyxy_to_xyzr(boxes / self.cell)
            position = sine_embedding(xyzr, content.shape[-1])
        bias = overlap_bias(xyzr, self.iof_tau, blocked)
        content = content + position.to(content.dtype)
        content = self.tokens_norm3(self.attn(content, bias) + content)
        content = self.tokens_norm2(self.tokens_proj(content) + content)

        logits = self.fc_cls(run(self.cls_fcs, content)).float()
        delta = self.fc_reg(run(self.reg_fcs, content)).float()
        refined = box_ops.refine_xyzr(xyzr, delta)
        return Proposals(logits, xyzr_to_relative(refined, self.cell, image_size), refined, content)

    def _roi_content(self, roi: Tensor) -> Tensor:
        """Turn RoI features (B, Q, 7, 7, C) into (B, Q, C)."""
        # The checkpoints flatten channels first; turning the weight once is cheaper than turning every RoI.
        weight = torch.unflatten(self.roi.weight, 1, (-1, ROI_SIZE**2)).transpose(1, 2).flatten(1)
        content = F.linear(roi.flatten(2).to(weight.dtype), weight, self.roi.bias)
        return self.tokens_norm1(content)  # type: ignore[no-any-return]
