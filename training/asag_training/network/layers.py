"""Building blocks that several parts of the network share.

Every block takes its input in any floating type and computes in the type of its own weights, so that a
network whose weights were cast to half precision needs no other change.  Coordinates, logarithms and softmax
are float32 whatever the weights are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asag_training.network.config import Activation

_GROUPS, _PER_GROUP = 32, 8
_ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU}


def activation(name: Activation) -> nn.Module:
    """Return the activation layer of that name."""
    return _ACTIVATIONS[name]()


def weight_type(module: nn.Module) -> torch.dtype:
    """Return the type a block's weights have, and so the one it computes in."""
    return next(module.parameters()).dtype


class Mlp(nn.Module):
    """Linear layers with an activation between them: sizes[0] -> sizes[1] -> ... -> sizes[-1]."""

    def __init__(self, sizes: Sequence[int], act: Activation) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(n, m) for n, m in pairwise(sizes))
        self.act = activation(act)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(weight_type(self))
        for layer in self.layers[:-1]:
            x = self.act(layer(x))
        return self.layers[-1](x)  # type: ignore[no-any-return]


class BiasedSelfAttention(nn.Module):
    """Multi-head self-attention whose logits take an additive bias; parameters as nn.MultiheadAttention's."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, bias: Tensor, position: Tensor | None = None) -> Tensor:
        """Attend over x (B, Q, C), with bias float32 (B, heads or 1, Q, Q) -> (B, Q, C).

        `position` (B, Q, C) is added where queries and keys are made, but not to the values.
        """
        b, q, c = x.shape
        weight, shift = self.in_proj_weight, self.in_proj_bias
        if position is None:
            qkv = F.linear(x, weight, shift)
        else:
            seen = F.linear(x + position, weight[: 2 * c], shift[: 2 * c])
            qkv = torch.cat([seen, F.linear(x, weight[2 * c :], shift[2 * c :])], dim=-1)
        query, key, value = qkv.reshape(b, q, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        logits = (query * (c // self.heads) ** -0.5) @ key.transpose(-1, -2)
        share = torch.softmax(logits.float() + bias, dim=-1).to(value.dtype)
        return self.out_proj((share @ value).transpose(1, 2).reshape(b, q, c))  # type: ignore[no-any-return]


def blocking_bias(blocked: Tensor) -> Tensor:
    """Return -inf where a query (row) must not see another (column): bool (B, Q, Q) -> float32 (B, 1, Q,
    Q)."""
    return torch.zeros_like(blocked, dtype=torch.float32).masked_fill(blocked, -math.inf)[:, None]


def padding_blocked(valid: Tensor) -> Tensor:
    """Block padding from valid queries: valid bool (B, Q) -> bool (B, Q, Q); padding queries see all."""
    return valid[:, :, None] & ~valid[:, None, :]


def sine_embedding(xyzr: Tensor, dim: int) -> Tensor:
    """Embed xyzr boxes (B, Q, 4) by sines -> float32 (B, Q, dim), a quarter of it for each coordinate.

    Even channels are sines, odd ones cosines; centres are scaled by 1/1000 so that all four coordinates are
    of like size (AdaMixer).
    """
    channels = dim // 4
    # Nothing is copied from the host here, so that a CUDA graph can be captured.
    scaled = torch.cat([xyzr[..., :2] / 1000.0, xyzr[..., 2:]], dim=-1)
    pair = torch.arange(channels // 2, dtype=torch.float32, device=xyzr.device)
    wavelength = 10000.0 ** (2 * pair / channels)
    phase = scaled[..., None] / wavelength
    return torch.stack([phase.sin(), phase.cos()], dim=-1).flatten(-3)


def group_norm(channels: int) -> nn.GroupNorm:
    """Build the GroupNorm of a neck: 32 groups; fewer of less than 256 channels, so that a group has no less
    than 8."""
    return nn.GroupNorm(math.gcd(_GROUPS, channels // _PER_GROUP), channels)


def tower(dim: int, depth: int, act: Activation) -> nn.ModuleList:
    """Build `depth` times Linear without bias, LayerNorm, activation."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(dim, dim, bias=False), nn.LayerNorm(dim), activation(act)]
    return nn.ModuleList(layers)


def run(layers: nn.ModuleList, x: Tensor) -> Tensor:
    """Apply layers one after the other."""
    for layer in layers:
        x = layer(x)
    return x


def init_detection_head(module: nn.Module, classify: nn.Linear, regress: nn.Linear) -> None:
    """Draw Xavier weights; give every class a 1% prior, and let boxes start where the proposals are."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
    nn.init.constant_(classify.bias, -math.log((1 - 0.01) / 0.01))
    nn.init.zeros_(regress.weight)
    nn.init.zeros_(regress.bias)
