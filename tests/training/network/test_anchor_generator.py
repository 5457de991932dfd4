"""The anchor generator: what it reads from the maps, and which anchors it lets through."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from asag_training.network.anchor_generator import AnchorGenerator, Prediction, resize_valid
from support.small_network import small_config

SIZE = small_config().patch_size


@pytest.fixture
def generator() -> AnchorGenerator:
    return AnchorGenerator(small_config()).eval().requires_grad_(False)


def maps(batch: int, height: int, width: int) -> Tensor:
    """Random channels-last features (B, h, w, C)."""
    return torch.randn(batch, height, width, small_config().hidden_dim)


def size_of(feature: Tensor) -> Tensor:
    """The height and width of a map, as the stages take them."""
    return torch.tensor(feature.shape[1:3])


def probe(generator: AnchorGenerator, level: str, feature: Tensor, *arguments: Tensor) -> Prediction:
    return generator.probe(level, feature, size_of(feature), *arguments)


def predict_always(generator: AnchorGenerator, head: str, anchors: list[list[float]]) -> None:
    """Make every patch predict these anchors: cx, cy, w, h relative to the patch, and score."""
    last = getattr(generator, head).layers[-1]
    values = torch.zeros(last.out_features // 5, 5)
    values[: len(anchors)] = torch.tensor(anchors).logit()
    torch.nn.init.zeros_(last.weight)
    last.bias.copy_(values.flatten())


@pytest.mark.parametrize(
    ("height", "width"),
    [(320, 416), (333, 417), (32, 32), (31, 500), (1, 1), (16, 48), (495, 17), (500, 500), (463, 81)],
)
def test_resize_valid_is_interpolation_of_the_valid_part(height: int, width: int) -> None:
    features = torch.randn(1, 3, 16, 16)
    valid = torch.round(torch.tensor([height, width]) / 32).int().clamp(min=1).tolist()
    cropped = features[:, :, : valid[0], : valid[1]]
    expected = F.interpolate(cropped, size=(30, 30), mode="bilinear", align_corners=False)
    actual = resize_valid(features, torch.tensor([[height, width]]), 32, 30)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_resize_valid_never_reads_padding() -> None:
    features = torch.full((1, 2, 12, 12), torch.finfo(torch.float32).max)
    features[:, :, :7, :5] = 1.0
    resized = resize_valid(features, torch.tensor([[224, 160]]), 32, 30)
    torch.testing.assert_close(resized, torch.ones(1, 2, 30, 30))


@pytest.mark.parametrize(
    ("height", "width", "origins"),
    [
        (40, 33, [(0, 0), (18, 25), (7, 11), (18, 0), (0, 25)]),  # all corners, and within
        (15, 15, [(0, 0)]),
        (9, 40, [(0, 0), (25, 0), (3, 0)]),  # lower than a patch
        (30, 4, [(0, 0), (0, 15)]),  # narrower
        (1, 1, [(0, 0)]),
    ],
)
@pytest.mark.parametrize("level", ["P4", "P3"])
def test_compressing_patches_is_compressing_the_map(
    generator: AnchorGenerator, level: str, height: int, width: int, origins: list[tuple[int, int]]
) -> None:
    feature = maps(2, height, width)
    whole = generator.compress[{"P3": 0, "P4": 1}[level]](feature.permute(0, 3, 1, 2))
    padded = F.pad(whole, (0, SIZE, 0, SIZE))
    tokens = generator._compress_patches(
        level, feature, size_of(feature), torch.tensor([origins, origins[::-1]])
    )
    for image, of_image in enumerate((origins, origins[::-1])):
        for patch, (x, y) in enumerate(of_image):
            expected = padded[image, :, y : y + SIZE, x : x + SIZE].flatten(1).T
            torch.testing.assert_close(tokens[image, patch], expected, atol=2e-5, rtol=0)


def above(value: float) -> float:
    return float(np.nextafter(np.float32(value), np.float32(np.inf)))


def below(value: float) -> float:
    return float(np.nextafter(np.float32(value), np.float32(-np.inf)))


@pytest.mark.parametrize(
    ("score", "selected", "passes"),
    [
        *((0.1, False, False), (above(0.1), True, True), (0.4, True, True)),
        *((below(0.7), True, True), (0.7, False, True), (0.0, False, False), (1.0, False, True)),
    ],
)
def test_thresholds_are_strict(
    generator: AnchorGenerator, score: float, selected: bool, passes: bool
) -> None:
    anchor = torch.tensor([[[50.0, 50.0, 20.0, 30.0, score]]])
    assert generator.select(anchor, "P4").tolist() == [[selected]]
    assert generator.passes(anchor).tolist() == [[passes]]


@pytest.mark.parametrize(("level", "half"), [("P4", 120.0), ("P3", 60.0)])
def test_only_anchors_smaller_than_half_a_patch_are_selected(
    generator: AnchorGenerator, level: str, half: float
) -> None:
    sides = [(below(half), below(half)), (half, 10.0), (10.0, half), (10.0, below(half)), (300.0, 300.0)]
    anchors = torch.tensor([[[50.0, 50.0, w, h, 0.5] for w, h in sides]])
    assert generator.select(anchors, level).tolist() == [[True, False, False, True, False]]


def test_first_level_anchors_lie_in_their_patches(generator: AnchorGenerator) -> None:
    predict_always(generator, "proj_all", [[0.5, 0.25, 0.5, 0.1, 0.6]])
    prediction = generator.first_level(maps(1, 10, 13), torch.tensor([[320, 400]]))
    per_patch = generator.config.first_level_anchors
    expected = torch.tensor(
        [
            [100.0, 40.0, 100.0, 16.0, 0.6],  # top left
            [300.0, 40.0, 100.0, 16.0, 0.6],
            [100.0, 200.0, 100.0, 16.0, 0.6],
            [300.0, 200.0, 100.0, 16.0, 0.6],
            [200.0, 80.0, 200.0, 32.0, 0.6],  # the whole image
        ]
    )
    assert prediction.raw.shape == (1, 5, per_patch, 5)
    torch.testing.assert_close(prediction.anchors[0, ::per_patch], expected)


def test_the_first_level_has_a_size_of_its_own() -> None:
    """As in the public code, where other patches of P4 and P3 leave P5 as it is."""
    usual, other = (
        AnchorGenerator(small_config().with_changes(**changes)).eval().requires_grad_(False)
        for changes in ({}, {"patch_size": 9, "first_level_size": 2 * SIZE})
    )
    shared = {
        name: tensor
        for name, tensor in usual.state_dict().items()
        if not name.startswith(
            ("proj_patch", "layernorm.1", "layernorm.2", "pos_embedding.1", "pos_embedding.2")
        )
    }
    missing = other.load_state_dict(shared, strict=False)
    assert missing.missing_keys
    assert not missing.unexpected_keys
    p5, sizes = maps(2, 10, 12), torch.tensor([[320, 384], [256, 300]])
    first, same = (generator.first_level(p5, sizes, flips=((True, False),)) for generator in (usual, other))
    assert torch.equal(first.raw, same.raw)
    assert torch.equal(first.anchors, same.anchors)
    origins = torch.tensor([[[2, 3]], [[0, 1]]])
    probed = probe(other, "P4", maps(2, 20, 24), sizes, origins, torch.tensor([1, 1]))
    inside = probed.anchors[..., :2] / 16 - origins.float()
    assert ((inside >= 0) & (inside <= 9)).all()


def test_small_anchors_score_nothing(generator: AnchorGenerator) -> None:
    side = 300
    shapes = [(2.99, 50), (50, 2.99), (3.01, 3.01), (50, 50)]
    predict_always(generator, "proj_all", [[0.5, 0.5, w / side, h / side, 0.6] for w, h in shapes])
    anchors = generator.first_level(maps(1, 10, 10), torch.tensor([[side, side]])).anchors
    whole_image = torch.unflatten(anchors, 1, (5, -1))[0, 4]
    torch.testing.assert_close(whole_image[:4, 4], torch.tensor([0.0, 0.0, 0.6, 0.6]))
    quadrant = torch.unflatten(anchors, 1, (5, -1))[0, 0]  # where they are half as large
    torch.testing.assert_close(quadrant[:4, 4], torch.tensor([0.0, 0.0, 0.0, 0.6]))


@pytest.mark.parametrize(("level", "stride"), [("P4", 16), ("P3", 8)])
def test_probed_anchors(generator: AnchorGenerator, level: str, stride: int) -> None:
    side = stride * SIZE
    shapes = [(0.5, 0.5, 0.25, 0.5), (0.9, 0.1, 0.1, 0.1), (0.5, 0.5, 2.9 / side, 0.5)]
    predict_always(generator, "proj_patch", [[*shape, 0.4] for shape in shapes])
    image_size = torch.tensor([[20 * stride, int(19.3 * stride)]])
    origins = torch.tensor([[[0, 0], [5, 3]]])
    anchors = probe(generator, level, maps(1, 20, 20), image_size, origins, torch.tensor([2])).anchors
    first, second = torch.unflatten(anchors, 1, (2, -1))[0, :, :3] / torch.tensor([stride] * 4 + [1])
    expected = torch.tensor(
        [[7.5, 7.5, 3.75, 7.5, 0.4], [13.5, 1.5, 1.5, 1.5, 0.4], [7.5, 7.5, 2.9 / stride, 7.5, 0.0]]
    )
    torch.testing.assert_close(first, expected, atol=1e-5, rtol=1e-5)
    expected[:, :2] += torch.tensor([5, 3])
    torch.testing.assert_close(second, expected, atol=1e-5, rtol=1e-5)


def test_anchors_centred_beyond_the_image_score_nothing(generator: AnchorGenerator) -> None:
    centres = [(0.4, 0.4), (0.42, 0.4), (0.4, 0.7), (0.4, 0.65)]
    predict_always(generator, "proj_patch", [[*centre, 0.3, 0.3, 0.4] for centre in centres])
    # The image ends at 100 x 160 pixels, which is 0.4166... and 0.666... of a patch.
    image_size = torch.tensor([[160, 100]])
    arguments = image_size, torch.zeros(1, 1, 2).long(), torch.tensor([1])
    anchors = probe(generator, "P4", maps(1, 10, 7), *arguments).anchors
    torch.testing.assert_close(anchors[0, :4, 4], torch.tensor([0.4, 0.0, 0.0, 0.4]))


def test_padding_patches_score_nothing(generator: AnchorGenerator) -> None:
    feature, image_size = maps(2, 30, 30), torch.tensor([[480, 480], [470, 300]])
    origins = torch.randint(0, 16, (2, 4, 2))
    count = torch.tensor([3, 0])
    prediction = probe(generator, "P4", feature, image_size, origins, count)
    per_patch = generator.config.patch_anchors
    assert prediction.raw.shape == (2, 4, per_patch, 5)
    score = torch.unflatten(prediction.anchors[..., 4], 1, (4, per_patch))
    assert (score.amax(dim=-1) > 0).tolist() == [[True, True, True, False], [False] * 4]

    origins[0, 3:] = origins[1] = 0
    again = probe(generator, "P4", feature, image_size, origins, count)
    torch.testing.assert_close(again.anchors[0, : 3 * per_patch], prediction.anchors[0, : 3 * per_patch])
    assert not again.anchors[1, :, 4].any()


def test_batch_is_its_images(generator: AnchorGenerator) -> None:
    image_size = torch.tensor([[480, 640], [470, 333], [33, 21]])
    p5, p4 = maps(3, 15, 20), maps(3, 30, 40)
    first = generator.first_level(p5, image_size).anchors
    origins, count = torch.randint(0, 15, (3, 6, 2)), torch.tensor([6, 2, 1])
    probed = probe(generator, "P4", p4, image_size, origins, count).anchors
    for i in range(3):
        one = slice(i, i + 1)
        alone = generator.first_level(p5[one], image_size[one]).anchors
        torch.testing.assert_close(alone, first[one], atol=1e-3, rtol=1e-5)
        alone = probe(generator, "P4", p4[one], image_size[one], origins[one], count[one]).anchors
        torch.testing.assert_close(alone, probed[one], atol=1e-3, rtol=1e-5)


def test_gradients_reach_what_was_predicted_but_not_the_anchors() -> None:
    generator = AnchorGenerator(small_config())
    p5, p3 = maps(1, 10, 12).requires_grad_(), maps(1, 40, 48).requires_grad_()
    image_size = torch.tensor([[320, 384]])
    first = generator.first_level(p5, image_size)
    probed = probe(generator, "P3", p3, image_size, torch.tensor([[[2, 3]]]), torch.tensor([1]))
    assert not first.anchors.requires_grad
    assert not probed.anchors.requires_grad

    names = {name for name, _ in generator.named_parameters()}
    reached = set()
    for raw, feature in ((first.raw, p5), (probed.raw, p3)):
        inputs = dict(generator.named_parameters())
        gradients = torch.autograd.grad(raw.square().sum(), [feature, *inputs.values()], allow_unused=True)
        assert gradients[0] is not None
        assert gradients[0].any()
        reached |= {name for name, g in zip(inputs, gradients[1:], strict=True) if g is not None and g.any()}
    # The level that was not probed has parameters of its own.
    of_p4 = ("compress.1.", "layernorm.1.", "pos_embedding.1.")
    assert names - reached == {name for name in names if name.startswith(of_p4)}
