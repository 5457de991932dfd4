"""MobileNetV4: as large and as deep as in the paper, and what the published implementation computes."""

from __future__ import annotations

import zlib

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from asag_training.network.body import FrozenBatchNorm2d, convolve
from asag_training.network.mobilenet import DepthwiseConv2d, MobileNet

SIZES = ("small", "medium")
PARAMETERS = {"small": 3_774_024, "medium": 9_715_512}
"""With the classifier: the paper's 3.8 and 9.7 million."""
GMAC = {"small": 0.2, "medium": 0.8}
"""Of an image of 224 pixels, with the classifier."""
_LAST, _HEAD, _CLASSES = 960, 1280, 1000
"""Channels of the classifier: a 1x1 convolution, another after pooling, both with BatchNorm; then classes."""

RECORDED = {
    "small": [
        ((1, 32, 17, 24), 0.13533, 0.13533, 0.33035),
        ((1, 64, 9, 12), 0.10692, 0.10692, 0.0),
        ((1, 96, 5, 6), 0.11331, 0.53999, -0.7991),
        ((1, 128, 3, 3), 0.07162, 0.56385, -0.66187),
    ],
    "medium": [
        ((1, 48, 17, 24), -0.01429, 0.27045, -0.57723),
        ((1, 80, 9, 12), -0.05186, 0.3764, 0.49622),
        ((1, 160, 5, 6), 0.00098, 0.72169, 1.5461),
        ((1, 256, 3, 3), 0.05951, 0.81772, 0.67028),
    ],
}
"""What timm 1.0.31 gives for `weights_by_name`: the shapes of C2..C5, means, mean sizes, and last values."""


def weights_by_name(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Draw every tensor from a seed of its own, which its name is: a misnamed one would be another."""

    def draw(name: str, shape: torch.Size) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        if name.endswith("running_var"):
            return torch.rand(shape, generator=generator) + 0.5
        values: Tensor = torch.randn(shape, generator=generator)
        if len(shape) == 4:
            scaled: Tensor = values * (2 / (shape[1] * shape[2] * shape[3])) ** 0.5
            return scaled
        return 0.5 + 0.1 * values if name.endswith("weight") else 0.2 * values

    return {name: draw(name, tensor.shape) for name, tensor in state.items()}


@pytest.mark.parametrize("size", SIZES)
def test_it_computes_what_the_published_implementation_does(size: str) -> None:
    body = MobileNet(size).eval()
    body.load_state_dict(weights_by_name(body.state_dict()))
    with torch.no_grad():
        maps = body(torch.randn(1, 3, 65, 96, generator=torch.Generator().manual_seed(0)))
    for found, (shape, mean, mean_size, last) in zip(maps, RECORDED[size], strict=True):
        assert tuple(found.shape) == shape
        measured = [float(found.mean()), float(found.abs().mean()), float(found[0, -1, -1, -1])]
        assert measured == pytest.approx([mean, mean_size, last], abs=1e-4)
    assert body.channels == tuple(shape[1] for shape, *_ in RECORDED[size])


@pytest.mark.parametrize("size", SIZES)
def test_size_and_cost_are_those_of_the_paper(size: str) -> None:
    body = MobileNet(size).eval()
    last = body.channels[-1]
    classifier = last * _LAST + 2 * _LAST + _LAST * _HEAD + 2 * _HEAD + _HEAD * _CLASSES + _CLASSES
    assert sum(p.numel() for p in body.parameters()) + classifier == PARAMETERS[size]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        body(torch.randn(1, 3, 224, 224))
    products = 7 * 7 * last * _LAST + _LAST * _HEAD + _HEAD * _CLASSES
    assert (counter.get_total_flops() / 2 + products) / 1e9 == pytest.approx(GMAC[size], rel=0.08)


def test_narrow_networks_keep_their_form() -> None:
    narrow, standard = MobileNet("medium", width=8), MobileNet("medium")
    assert narrow.state_dict().keys() == standard.state_dict().keys()
    assert narrow.channels == (16, 24, 40, 64)
    assert all(p.shape[0] % 8 == 0 for p in narrow.parameters())


@pytest.mark.parametrize("size", SIZES)
def test_random_weights_neither_explode_nor_vanish(size: str) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        maps = MobileNet(size).eval()(torch.randn(1, 3, 128, 160))
    assert all(0.3 < float(each.pow(2).mean().sqrt()) < 3 for each in maps)


def test_nothing_before_c2_trains_where_the_stem_is_frozen() -> None:
    body = MobileNet("small", width=8)
    body.freeze_stem()
    frozen = {name for name, p in body.named_parameters() if not p.requires_grad}
    assert {name.rpartition(".")[0].removesuffix(".conv").removesuffix(".bn1") for name in frozen} == {
        *("conv_stem", "bn1", "blocks.0.0", "blocks.0.1")
    }
    assert {name.split(".")[1] for name, p in body.named_parameters() if p.requires_grad} == {"1", "2", "3"}


@pytest.mark.parametrize("learned", [False, True])
def test_statistics_are_learned_if_wanted(learned: bool) -> None:
    body = MobileNet("small", width=8).train()
    if learned:
        body.learn_statistics()
    body(torch.randn(2, 3, 64, 64))
    norms = [module for module in body.modules() if isinstance(module, FrozenBatchNorm2d)]
    assert len(norms) == sum(isinstance(module, nn.Conv2d) for module in body.modules())
    assert {bool(norm.running_mean.any()) for norm in norms} == {learned}


@pytest.mark.parametrize(("kernel", "stride", "in_float32"), [(3, 1, False), (3, 2, True), (5, 1, True)])
@pytest.mark.parametrize("fixed", [False, True], ids=["statistics learned", "statistics fixed"])
def test_autocast_leaves_depthwise_convolutions_without_fast_gradients_in_float32(
    kernel: int, stride: int, in_float32: bool, fixed: bool
) -> None:
    torch.manual_seed(0)
    convolution, norm = DepthwiseConv2d(16, kernel, stride), FrozenBatchNorm2d(16)
    norm.learns_statistics = not fixed
    x = torch.randn(2, 16, 12, 12)

    def result(given: Tensor) -> tuple[Tensor, Tensor]:
        y = convolve(convolution, norm, given)
        (gradient,) = torch.autograd.grad(y.float().pow(2).sum(), convolution.weight)
        return y.detach(), gradient

    expected, expected_gradient = result(x.bfloat16().float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, gradient = result(x.bfloat16())
    assert y.dtype == (torch.float32 if in_float32 else torch.bfloat16)
    assert (torch.equal(y, expected) and torch.equal(gradient, expected_gradient)) == in_float32
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)
