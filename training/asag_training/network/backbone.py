"""ResNet-26, -50 and -101 with frozen BatchNorm statistics, and the feature pyramid over it.

Parameter names follow torchvision's, which the official checkpoints use.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_BLOCKS = {26: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
_TRAINED_LAYERS = ("layer2", "layer3", "layer4")


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


def _convolve(convolution: nn.Conv2d, norm: nn.Module, x: Tensor) -> Tensor:
    """Apply convolution and norm; fixed statistics become part of the weights, which saves passes over the
    map."""
    if isinstance(norm, FrozenBatchNorm2d) and norm.training and not norm.learns_statistics:
        scale, shift = norm.scale_and_shift()
        weight = convolution.weight * scale[:, None, None, None]
        return F.conv2d(x, weight, shift, convolution.stride, convolution.padding)
    return norm(convolution(x))  # type: ignore[no-any-return]


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions around a shortcut; the 3x3 one carries the stride."""

    expansion = 4

    def __init__(self, channels_in: int, width: int, stride: int) -> None:
        super().__init__()
        channels_out = width * self.expansion
        self.conv1 = nn.Conv2d(channels_in, width, 1, bias=False)
        self.bn1 = FrozenBatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = FrozenBatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, channels_out, 1, bias=False)
        self.bn3 = FrozenBatchNorm2d(channels_out)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or channels_in != channels_out:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), FrozenBatchNorm2d(channels_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self._shortcut(x)
        x = F.relu(_convolve(self.conv1, self.bn1, x))
        x = F.relu(_convolve(self.conv2, self.bn2, x))
        return F.relu(_convolve(self.conv3, self.bn3, x) + shortcut)

    def _shortcut(self, x: Tensor) -> Tensor:
        if self.downsample is None:
            return x
        convolution, norm = self.downsample
        return _convolve(cast(nn.Conv2d, convolution), norm, x)


class ResNet(nn.Module):
    """image (B, 3, H, W) -> C2..C5 (B, width * 4 * 2^i, H / 4 / 2^i, W / 4 / 2^i)."""

    def __init__(self, depth: int, width: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, padding=3, bias=False)
        self.bn1 = FrozenBatchNorm2d(width)
        channels = width
        for i, blocks in enumerate(_BLOCKS[depth]):
            stage, channels = _stage(channels, width << i, blocks, stride=1 if i == 0 else 2)
            self.add_module(f"layer{i + 1}", stage)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(module, Bottleneck):
                # Frozen statistics normalise nothing in a network that starts from random weights, so that
                # every block would add as much again; this keeps what comes out of the last one in bounds.
                nn.init.constant_(module.bn3.weight, 0.2)

    def forward(self, image: Tensor) -> list[Tensor]:
        x = F.relu(_convolve(self.conv1, self.bn1, image.to(self.conv1.weight.dtype)))
        x = F.max_pool2d(x, 3, 2, 1)
        outputs = []
        for i in range(4):
            x = getattr(self, f"layer{i + 1}")(x)
            outputs.append(x)
        return outputs

    def learn_statistics(self) -> None:
        """Make every BatchNorm an ordinary one while it is trained: for a start from random weights."""
        for module in self.modules():
            if isinstance(module, FrozenBatchNorm2d):
                module.learns_statistics = True

    def freeze_stem(self) -> None:
        """Train only what the public recipe trains: layer2 to layer4."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith(_TRAINED_LAYERS))


def _stage(channels: int, width: int, blocks: int, stride: int) -> tuple[nn.Sequential, int]:
    out = width * Bottleneck.expansion
    first = Bottleneck(channels, width, stride)
    return nn.Sequential(first, *(Bottleneck(out, width, 1) for _ in range(blocks - 1))), out


class Backbone(nn.Module):
    """Holds the ResNet under the name the official checkpoints use [backbone.0.body]."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.body = ResNet(depth, width)

    def forward(self, image: Tensor) -> list[Tensor]:
        return self.body(image)  # type: ignore[no-any-return]


class FeaturePyramid(nn.Module):
    """C2..C5 -> P2..P5, each (B, channels, h, w): lateral 1x1, top-down nearest upsampling, output 3x3."""

    def __init__(self, channels_in: list[int], channels: int) -> None:
        super().__init__()
        # Sequential, because the official names have an index more than the layer.
        self.inner_blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(c, channels, 1)) for c in channels_in)
        self.layer_blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1)) for _ in channels_in
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        above = self.inner_blocks[-1](features[-1])
        outputs = [self.layer_blocks[-1](above)]
        for i in range(len(features) - 2, -1, -1):
            lateral = self.inner_blocks[i](features[i])
            above = lateral + F.interpolate(above, size=lateral.shape[-2:], mode="nearest")
            outputs.insert(0, self.layer_blocks[i](above))
        return outputs
