"""The AdaMixer decoder stage, of which ASAG-A uses one (Gao et al., AdaMixer, CVPR 2022).

B images, Q queries, G groups, P points per group, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from asag_training.network import boxes as box_ops
from asag_training.network.config import AsagConfig
from asag_training.network.layers import (
    BiasedSelfAttention,
    Mlp,
    init_detection_head,
    run,
    sine_embedding,
    tower,
)
from asag_training.network.operators import adaptive_mixing, pyramid_sample
from asag_training.network.pyramid import pyramid_strides
from asag_training.network.relation_block import Proposals, overlap_bias, xyzr_to_relative

_LEVEL_TEMPERATURE = 2.0


class AdaptiveMixing(nn.Module):
    """Mixes sampled features over channels, then over points, with weights made from the query."""

    def __init__(self, config: AsagConfig) -> None:
        super().__init__()
        dim, groups = config.hidden_dim, config.groups
        self.out_points, self.activation = config.out_points, config.activation
        size = (dim // groups) ** 2 + config.in_points * config.out_points
        self.parameter_generator = nn.Sequential(nn.Linear(dim, groups * size))
        self.out_proj = nn.Linear(dim * config.out_points, dim)

    def forward(self, sampled: Tensor, query: Tensor) -> Tensor:
        """Mix sampled (B, Q, G, P, C/G) by query (B, Q, C) -> (B, Q, C)."""
        parameters = self.parameter_generator(query)
        mixed = adaptive_mixing(sampled, parameters, self.out_points, self.activation)
        return query + self.out_proj(mixed)  # type: ignore[no-any-return]


class AdaptiveSamplingMixing(nn.Module):
    """Samples points in space and scale around each query, and mixes them."""

    def __init__(self, config: AsagConfig) -> None:
        super().__init__()
        self.groups, self.points = config.groups, config.in_points
        self.strides = pyramid_strides(config)
        offsets = self.groups * self.points * 3
        self.sampling_offset_generator = nn.Sequential(nn.Linear(config.hidden_dim, offsets))
        self.norm = nn.LayerNorm(config.hidden_dim)
        self.adaptive_mixing = AdaptiveMixing(config)

    def init_weights(self) -> None:
        """Let points start spread over half the box, one level finer than the box's own."""
        offsets = self.sampling_offset_generator[0]
        nn.init.zeros_(offsets.get_parameter("weight"))
        bias = torch.empty(self.groups, self.points, 3).uniform_(-0.5, 0.5)
        bias[..., 2] = -1.0
        with torch.no_grad():
            offsets.get_parameter("bias").copy_(bias.flatten())
        nn.init.zeros_(self.adaptive_mixing.parameter_generator[0].get_parameter("weight"))

    def forward(self, features: list[Tensor], query: Tensor, xyzr: Tensor) -> Tensor:
        """Sample features, four maps (B, h, w, C), for query (B, Q, C) around xyzr (B, Q, 4) -> (B, Q, C)."""
        offset = self.sampling_offset_generator(query).float().unflatten(-1, (self.groups, self.points, 3))
        size = box_ops.xyzr_size(xyzr)[:, :, None, None]
        xy = (xyzr[:, :, None, None, :2] + offset[..., :2] * size) * self.strides[0]
        z = xyzr[:, :, None, None, 2] + offset[..., 2]
        sampled = sample_3d(features, xy, z, self.strides)
        return self.norm(self.adaptive_mixing(sampled.to(query.dtype), query))  # type: ignore[no-any-return]


def sample_3d(features: list[Tensor], xy: Tensor, z: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Sample the pyramid at points in space and scale; channel group g serves the points of group g.

    features: one (B, h, w, C) map for each of the strides; xy: (B, Q, G, P, 2) in pixels; z: (B, Q, G, P),
    where 0 is the finest map and 1 the one above it.  Levels are weighted by softmax of -(z - level)^2 / 2.
    Returns (B, Q, G, P, C / G).
    """
    level = torch.arange(len(features), dtype=torch.float32, device=z.device)
    weight = torch.softmax(-((z[..., None] - level) ** 2) / _LEVEL_TEMPERATURE, dim=-1)
    return pyramid_sample(features, xy, weight, strides)


class AdaMixerStage(nn.Module):
    """Self-attention, sampling and mixing, FFN, and the class and box heads."""

    def __init__(self, config: AsagConfig) -> None:
        super().__init__()
        dim = config.hidden_dim
        self.attention = BiasedSelfAttention(dim, config.attention_heads)
        self.attention_norm = nn.LayerNorm(dim)
        self.ffn = Mlp((dim, config.ffn_dim, dim), config.activation)
        self.ffn_norm = nn.LayerNorm(dim)
        self.cls_fcs = tower(dim, 1, config.activation)
        self.fc_cls = nn.Linear(dim, config.num_classes)
        self.reg_fcs = tower(dim, config.box_layers, config.activation)
        self.fc_reg = nn.Linear(dim, 4)
        self.sampling_n_mixing = AdaptiveSamplingMixing(config)
        self.iof_tau = nn.Parameter(torch.empty(config.attention_heads))
        init_detection_head(self, self.fc_cls, self.fc_reg)
        nn.init.uniform_(self.iof_tau, 0.0, 4.0)
        self.sampling_n_mixing.init_weights()

    def forward(
        self, features: list[Tensor], xyzr: Tensor, content: Tensor, blocked: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits (B, Q, classes), refined boxes (B, Q, 4) xyzr, and content (B, Q, C)."""
        bias = overlap_bias(xyzr, self.iof_tau, blocked)
        content = content + sine_embedding(xyzr, content.shape[-1]).to(content.dtype)
        content = self.attention_norm(self.attention(content, bias) + content)
        content = self.sampling_n_mixing(features, content, xyzr)
        content = self.ffn_norm(self.ffn(content) + content)
        logits = self.fc_cls(run(self.cls_fcs, content)).float()
        delta = self.fc_reg(run(self.reg_fcs, content)).float()
        return logits, box_ops.refine_xyzr(xyzr, delta), content


class AdaMixerDecoder(nn.Module):
    """The parallel decoders of ASAG-A, each of one AdaMixer stage or a sequence of them; all refine the same
    proposals."""

    def __init__(self, config: AsagConfig) -> None:
        super().__init__()
        self.layers = config.decoder_layers
        self.stride = pyramid_strides(config)[0]
        stages = config.heads * self.layers
        self.decoder_embedding = nn.Embedding(stages, config.hidden_dim)
        self.bbox_head = nn.ModuleList(AdaMixerStage(config) for _ in range(stages))

    def forward(
        self, head: int, features: list[Tensor], proposals: Proposals, image_size: Tensor, blocked: Tensor
    ) -> list[tuple[Tensor, Tensor]]:
        """Run head `head`; return for each of its layers logits (B, Q, classes) and boxes (B, Q, 4) cxcywh
        relative to the valid image."""
        xyzr, content = proposals.xyzr, proposals.content
        predicted = []
        for stage in range(head * self.layers, (head + 1) * self.layers):
            query = content + self.decoder_embedding.weight[stage]
            logits, xyzr, content = self.bbox_head[stage](features, xyzr.detach(), query, blocked)
            predicted.append((logits, xyzr_to_relative(xyzr, self.stride, image_size)))
        return predicted
