"""MobileNetV4-Conv-Small and -Medium (Qin et al., MobileNetV4, arXiv 2404.10518), without their classifiers.

Convolutions, BatchNorm and ReLU, and nothing else.  Parameter names are those of the published PyTorch
weights (timm's).  What the paper's tables list after the last block at stride 32, a 1x1 convolution to 960
channels and all that follows, serves classification and is left out.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asag_training.network.body import Body, FrozenBatchNorm2d, convolve

STANDARD_WIDTH = 32
"""Channels of the stem, of both sizes."""
_DIVISOR = 8
_WITHOUT_RELU = ("dw_start.conv", "pw_proj.conv", "conv_pwl")
"""Convolutions that no ReLU follows."""


class Plain(NamedTuple):
    """An ordinary convolution (tables 11 and 12 of the paper: Conv2D)."""

    kernel: int
    channels: int
    stride: int = 1


class Fused(NamedTuple):
    """A fused inverted bottleneck: one convolution expands, a 1x1 projects (FusedIB)."""

    kernel: int
    expanded: int
    channels: int
    stride: int = 1


class Universal(NamedTuple):
    """A universal inverted bottleneck.

    Two depthwise convolutions are optional: one before the expansion (`start`) and one after it (`middle`);
    0 is none.  Both: ExtraDW; the first: ConvNext; the second: IB; neither: FFN.
    """

    start: int
    middle: int
    expanded: int
    channels: int
    stride: int = 1


_Block = Plain | Fused | Universal

# A row for each stage; the stages' ends are C2, C3, C4 and C5.
_STAGES: dict[str, tuple[tuple[_Block, ...], ...]] = {
    "small": (
        (Plain(3, 32, 2), Plain(1, 32)),
        (Plain(3, 96, 2), Plain(1, 64)),
        (
            Universal(5, 5, 192, 96, 2),
            *(Universal(0, 3, 192, 96),) * 4,
            Universal(3, 0, 384, 96),
        ),
        (
            Universal(3, 3, 576, 128, 2),
            Universal(5, 5, 512, 128),
            Universal(0, 5, 512, 128),
            Universal(0, 5, 384, 128),
            *(Universal(0, 3, 512, 128),) * 2,
        ),
    ),
    "medium": (
        (Fused(3, 128, 48, 2),),
        (Universal(3, 5, 192, 80, 2), Universal(3, 3, 160, 80)),
        (
            Universal(3, 5, 480, 160, 2),
            *(Universal(3, 3, 640, 160),) * 2,
            Universal(3, 5, 640, 160),
            Universal(3, 3, 640, 160),
            Universal(3, 0, 640, 160),
            Universal(0, 0, 320, 160),
            Universal(3, 0, 640, 160),
        ),
        (
            Universal(5, 5, 960, 256, 2),
            Universal(5, 5, 1024, 256),
            *(Universal(3, 5, 1024, 256),) * 2,
            Universal(0, 0, 1024, 256),
            Universal(3, 0, 1024, 256),
            Universal(3, 5, 512, 256),
            Universal(5, 5, 1024, 256),
            *(Universal(0, 0, 1024, 256),) * 2,
            Universal(5, 0, 512, 256),
        ),
    ),
}


class MobileNet(Body):
    """image (B, 3, H, W) -> C2..C5, the maps at strides 4, 8, 16 and 32.

    `width` is the stem's channels; all others grow and shrink with them.
    """

    stem = ("conv_stem.", "bn1.", "blocks.0.")

    def __init__(self, size: str, width: int = STANDARD_WIDTH) -> None:
        super().__init__()
        self.conv_stem = _convolution(3, width, 3, 2)
        self.bn1 = FrozenBatchNorm2d(width)
        self.blocks = nn.ModuleList()
        channels, ends = width, list[int]()
        for specification in _STAGES[size]:
            stage = []
            for block in specification:
                block = _at_width(block, width)
                stage.append(_build(channels, block))
                channels = block.channels
            self.blocks.append(nn.Sequential(*stage))
            ends.append(channels)
        self.channels = tuple(ends)
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d):
                linear = name.endswith(_WITHOUT_RELU)
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear" if linear else "relu")
            if isinstance(module, UniversalBottleneck) and module.has_shortcut:
                # As in the ResNet: what every block adds is bounded, though nothing is normalised at first.
                nn.init.constant_(module.pw_proj.bn.weight, 0.2)

    def forward(self, image: Tensor) -> list[Tensor]:
        x = F.relu(convolve(self.conv_stem, self.bn1, image.to(self.conv_stem.weight.dtype)))
        outputs = []
        for stage in self.blocks:
            x = stage(x)
            outputs.append(x)
        return outputs


class PlainConvolution(nn.Module):
    """Convolution, BatchNorm, ReLU."""

    def __init__(self, channels_in: int, block: Plain) -> None:
        super().__init__()
        self.conv = _convolution(channels_in, block.channels, block.kernel, block.stride)
        self.bn1 = FrozenBatchNorm2d(block.channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(convolve(self.conv, self.bn1, x))


class FusedBottleneck(nn.Module):
    """A convolution that expands, and a 1x1 one that projects, without activation."""

    def __init__(self, channels_in: int, block: Fused) -> None:
        super().__init__()
        self.conv_exp = _convolution(channels_in, block.expanded, block.kernel, block.stride)
        self.bn1 = FrozenBatchNorm2d(block.expanded)
        self.conv_pwl = _convolution(block.expanded, block.channels, 1)
        self.bn2 = FrozenBatchNorm2d(block.channels)
        self.has_shortcut = block.stride == 1 and channels_in == block.channels

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(convolve(self.conv_exp, self.bn1, x))
        projected = convolve(self.conv_pwl, self.bn2, hidden)
        return projected + x if self.has_shortcut else projected


class UniversalBottleneck(nn.Module):
    """Depthwise (optional), 1x1 expansion, depthwise (optional), 1x1 projection, and a shortcut.

    The stride is the second depthwise convolution's if there is one, else the first's.
    """

    def __init__(self, channels_in: int, block: Universal) -> None:
        super().__init__()
        start_stride, middle_stride = (1, block.stride) if block.middle else (block.stride, 1)
        self.dw_start = _depthwise(channels_in, block.start, start_stride)
        self.pw_exp = _Normalised(_convolution(channels_in, block.expanded, 1))
        self.dw_mid = _depthwise(block.expanded, block.middle, middle_stride)
        self.pw_proj = _Normalised(_convolution(block.expanded, block.channels, 1))
        self.has_shortcut = block.stride == 1 and channels_in == block.channels

    def forward(self, x: Tensor) -> Tensor:
        hidden = x if self.dw_start is None else self.dw_start(x)
        hidden = F.relu(self.pw_exp(hidden))
        if self.dw_mid is not None:
            hidden = F.relu(self.dw_mid(hidden))
        projected: Tensor = self.pw_proj(hidden)
        return projected + x if self.has_shortcut else projected


class DepthwiseConv2d(nn.Conv2d):
    """A convolution of each channel for itself.

    Under autocast on a CPU one of 5x5, or of stride 2, computes in float32 all the same: oneDNN has fast
    gradients in bfloat16 for the others only, and these take 3 to 30 times as long without.
    """

    def __init__(self, channels: int, kernel: int, stride: int) -> None:
        super().__init__(channels, channels, kernel, stride, padding=kernel // 2, groups=channels, bias=False)
        self._has_fast_bfloat16 = kernel == 3 and stride == 1

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        device = input.device.type
        convolve_as = super()._conv_forward
        if self._has_fast_bfloat16 or device != "cpu" or not torch.is_autocast_enabled(device):
            return cast(Tensor, convolve_as(input, weight, bias))
        with torch.autocast(device, enabled=False):
            return cast(Tensor, convolve_as(input.to(weight.dtype), weight, bias))


class _Normalised(nn.Module):
    """Convolution and BatchNorm."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.conv = convolution
        self.bn = FrozenBatchNorm2d(convolution.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return convolve(self.conv, self.bn, x)


def _build(channels_in: int, block: _Block) -> nn.Module:
    if isinstance(block, Plain):
        return PlainConvolution(channels_in, block)
    if isinstance(block, Fused):
        return FusedBottleneck(channels_in, block)
    return UniversalBottleneck(channels_in, block)


def _convolution(channels_in: int, channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels, kernel, stride, padding=kernel // 2, bias=False)


def _depthwise(channels: int, kernel: int, stride: int) -> _Normalised | None:
    if kernel == 0:
        return None
    return _Normalised(DepthwiseConv2d(channels, kernel, stride))


def _at_width(block: _Block, width: int) -> _Block:
    """Return the block with its channels scaled to another width of the stem."""
    scaled = block._replace(channels=_scaled(block.channels, width))
    if isinstance(scaled, Plain):
        return scaled
    return scaled._replace(expanded=_scaled(scaled.expanded, width))


def _scaled(channels: int, width: int) -> int:
    """Round up to a multiple of 8; at the standard width nothing changes."""
    return -(-channels * width // (STANDARD_WIDTH * _DIVISOR)) * _DIVISOR
