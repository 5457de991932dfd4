"""ResNet-26, -50 and -101 with frozen BatchNorm statistics.

Parameter names follow torchvision's, which the official checkpoints use.
"""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from asag_training.network.body import Body, FrozenBatchNorm2d, convolve

_BLOCKS = {26: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


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
        x = F.relu(convolve(self.conv1, self.bn1, x))
        x = F.relu(convolve(self.conv2, self.bn2, x))
        return F.relu(convolve(self.conv3, self.bn3, x) + shortcut)

    def _shortcut(self, x: Tensor) -> Tensor:
        if self.downsample is None:
            return x
        convolution, norm = self.downsample
        return convolve(cast(nn.Conv2d, convolution), norm, x)


class ResNet(Body):
    """image (B, 3, H, W) -> C2..C5 (B, width * 4 * 2^i, H / 4 / 2^i, W / 4 / 2^i)."""

    stem = ("conv1.", "bn1.", "layer1.")

    def __init__(self, depth: int, width: int = 64) -> None:
        super().__init__()
        self.channels = tuple(Bottleneck.expansion * width << i for i in range(4))
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
        x = F.relu(convolve(self.conv1, self.bn1, image.to(self.conv1.weight.dtype)))
        x = F.max_pool2d(x, 3, 2, 1)
        outputs = []
        for i in range(4):
            x = getattr(self, f"layer{i + 1}")(x)
            outputs.append(x)
        return outputs


def _stage(channels: int, width: int, blocks: int, stride: int) -> tuple[nn.Sequential, int]:
    out = width * Bottleneck.expansion
    first = Bottleneck(channels, width, stride)
    return nn.Sequential(first, *(Bottleneck(out, width, 1) for _ in range(blocks - 1))), out
