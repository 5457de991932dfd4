"""What backbones share: BatchNorm with frozen statistics, and which of their weights are trained."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FrozenBatchNorm2d(nn.Module):
    """BatchNorm with fixed statistics; its scale and shift can be trained.

    With `learns_statistics` it is an ordinary BatchNorm while it is trained, and a fixed one otherwise.
    """

    running_mean: Tensor
    running_var: Tensor
    eps = 1e-5
    momentum = 0.1
    learns_statistics = False

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """Return the affine map it applies: two (channels,) vectors."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return scale, self.bias - self.running_mean * scale

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.learns_statistics:
            return self._normalise_batch(x)
        scale, shift = self.scale_and_shift()
        return x * scale[:, None, None] + shift[:, None, None]

    def _normalise_batch(self, x: Tensor) -> Tensor:
        mean, variance = self.running_mean, self.running_var
        return F.batch_norm(x, mean, variance, self.weight, self.bias, True, self.momentum, self.eps)


def convolve(convolution: nn.Conv2d, norm: nn.Module, x: Tensor) -> Tensor:
    """Apply convolution and norm; fixed statistics become part of the weights, which saves passes over the
    map."""
    if isinstance(norm, FrozenBatchNorm2d) and norm.training and not norm.learns_statistics:
        scale, shift = norm.scale_and_shift()
        weight = convolution.weight * scale[:, None, None, None]
        return convolution._conv_forward(x, weight, shift)  # type: ignore[no-any-return]
    return norm(convolution(x))  # type: ignore[no-any-return]


class Body(nn.Module):
    """Base of the backbones' networks: image (B, 3, H, W) -> C2..C5, each half as large as the one before."""

    channels: tuple[int, ...]
    """Of C2..C5."""
    stem: tuple[str, ...]
    """Beginnings of the names of what comes before C2 and makes it."""

    def learn_statistics(self) -> None:
        """Make every BatchNorm an ordinary one while it is trained: for a start from random weights."""
        for module in self.modules():
            if isinstance(module, FrozenBatchNorm2d):
                module.learns_statistics = True

    def freeze_stem(self) -> None:
        """Train only what makes C3, C4 and C5, as the public recipe does."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(not name.startswith(self.stem))
