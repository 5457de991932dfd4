"""Deformable attention, encoder and decoder layer equal the public Deformable DETR; and what holds beyond."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from asag_training.network import deformable
from asag_training.network.config import AsagConfig, variant_config
from asag_training.network.deformable import (
    DeformableAttention,
    Geometry,
    cell_centres,
    geometry_of,
    join_maps,
    part_maps,
)
from asag_training.network.deformable_decoder import DeformableStage, around_boxes, inverse_sigmoid
from asag_training.network.deformable_encoder import DeformableEncoder, EncoderLayer, MapProjections
from asag_training.network.layers import group_norm
from asag_training.network.model import Asag
from asag_training.network.operators import deformable_sample
from asag_training.network.relation_block import Proposals
from support.checkpoint_files import tiny_config

CASES = ("padded_to_32", "odd_canvas")


class Case:
    """What the public code computes for weights and maps of a batch; see `tests/reference/README.md`."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as stored:
            self.arrays = {name: torch.from_numpy(stored[name]) for name in stored.files}
        self.maps = [self.arrays[f"map{i}"] for i in range(4)]
        height, width = self.arrays["canvas"].tolist()
        self.canvas = (height, width)
        self.valid = self.arrays["valid"]
        self.config = tiny_config(
            "deformable-detr",
            hidden_dim=self.maps[0].shape[-1],
            attention_heads=int(self["heads"]),
            deformable_points=int(self["points"]),
            deformable_ffn_dim=len(self["encoder/layers.0.linear1.bias"]),
            num_classes=len(self["decoder/class_embed.bias"]),
        )

    def __getitem__(self, name: str) -> Tensor:
        return self.arrays[name]

    def state(self, prefix: str) -> dict[str, Tensor]:
        start = len(prefix)
        return {name[start:]: array for name, array in self.arrays.items() if name.startswith(prefix)}

    def geometry(self) -> Geometry:
        return geometry_of(self.maps, self["sizes"], self.canvas)

    def encoder(self) -> DeformableEncoder:
        encoder = DeformableEncoder(self.config)
        encoder.load_state_dict(self.state("encoder/"))
        return encoder

    def stage(self) -> DeformableStage:
        stage = DeformableStage(self.config)
        stage.load_state_dict(self.state("decoder/"))
        return stage


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, reference_dir: Path) -> Case:
    return Case(reference_dir / "deformable_cases" / f"{request.param}.npz")


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def around(geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Where the cells of the encoder look: centres on every map, and how far an offset goes."""
    centre = cell_centres(geometry)[:, :, None] * geometry.ratio[:, None]
    return centre, (geometry.ratio / geometry.covered)[:, None]


def test_places_are_the_public_ones(case: Case) -> None:
    geometry = case.geometry()
    assert torch.equal(~geometry.padding[..., 0], case.valid)
    close(geometry.ratio, case["ratios"], 1e-6)
    close(around(geometry)[0], case["references"], 1e-6)
    positions = case.encoder().positions(geometry).detach()
    close(positions[case.valid], case["positions"][case.valid])
    assert torch.isfinite(positions).all()


def test_attention_is_the_public_one(case: Case) -> None:
    encoder, geometry = case.encoder(), case.geometry()
    cells, (centre, reach) = join_maps(case.maps), around(geometry)
    position = encoder.positions(geometry)
    layer = encoder.layers[0]
    assert isinstance(layer, EncoderLayer)
    with torch.no_grad():
        attended = layer.self_attn(cells + position, centre, reach, cells, geometry)
        whole = layer(cells, position, centre, reach, geometry)
    close(attended[case.valid], case["attention"][case.valid])
    close(whole[case.valid], case["layer"][case.valid])


def test_encoder_and_its_gradients_are_the_public_ones(case: Case) -> None:
    encoder = case.encoder()
    finest = case.maps[0].requires_grad_()
    encoded = join_maps(encoder([finest, *case.maps[1:]], case["sizes"], case.canvas))
    close(encoded.detach()[case.valid], case["encoder"][case.valid])
    wanted = dict(encoder.named_parameters())
    gradients = torch.autograd.grad((encoded * case["pull"]).sum(), [*wanted.values(), finest])
    for name, gradient in zip([*wanted, "map0"], gradients, strict=True):
        expected = case[f"gradient/{name}"]
        close(gradient, expected, 1e-5 * max(1.0, float(expected.abs().max())))


def test_decoder_layer_and_its_gradients_are_the_public_ones(case: Case) -> None:
    stage, geometry = case.stage(), case.geometry()
    content, memory = case["content"].requires_grad_(), case["encoder"].requires_grad_()
    boxes, position = case["boxes"], case["query_position"]
    nobody = torch.zeros(1, 1, 1, 1)
    around = around_boxes(boxes, geometry, stage.cross_attn.points)
    decoded = stage(content, position, around, nobody, memory, geometry)
    logits, refined = stage.predict(decoded, boxes)
    close(decoded.detach(), case["decoded"])
    close(logits.detach(), case["logits"])
    close(refined.detach(), case["refined"])

    wanted = {n: p for n, p in stage.named_parameters() if not n.startswith("class_embed")}
    inputs = [*wanted.values(), content, memory]
    gradients = torch.autograd.grad((refined * case["decoder_pull"]).sum(), inputs)
    names = [*(f"decoder/{name}" for name in wanted), "content", "memory"]
    for name, gradient in zip(names, gradients, strict=True):
        close(gradient, case[f"gradient/{name}"])


def by_mask(image_size: Tensor, canvas: tuple[int, int], height: int, width: int) -> Tensor:
    """Which cells of a map are valid, by a mask of pixels that is resized: bool (B, h, w)."""
    rows = torch.arange(canvas[0]) < image_size[:, :1]
    columns = torch.arange(canvas[1]) < image_size[:, 1:]
    mask = (rows[:, :, None] & columns[:, None, :]).float()
    return F.interpolate(mask[None], size=(height, width))[0].bool()


@pytest.mark.parametrize("canvas", [(64, 64), (97, 131), (128, 1333), (800, 1344), (224, 96), (101, 83)])
def test_valid_cells_are_those_of_a_mask(canvas: tuple[int, int]) -> None:
    sizes = torch.stack([torch.randint(1, side + 1, (40,)) for side in canvas], dim=1)
    sizes[0] = torch.tensor(canvas)
    shapes = [tuple(-(-side // stride) for side in canvas) for stride in (8, 16, 32, 64)]
    maps = [torch.zeros(40, *shape, 1) for shape in shapes]
    geometry = geometry_of(maps, sizes, canvas)
    expected = [by_mask(sizes, canvas, *shape) for shape in shapes]
    assert torch.equal(~geometry.padding[..., 0], torch.cat([mask.flatten(1) for mask in expected], dim=1))
    for i, mask in enumerate(expected):
        assert torch.equal(geometry.covered[:, i, 0], mask.any(dim=1).sum(dim=1).float())
        assert torch.equal(geometry.covered[:, i, 1], mask.any(dim=2).sum(dim=1).float())


def test_more_padding_does_not_matter() -> None:
    encoder = DeformableEncoder(narrow()).requires_grad_(False)
    _stir(encoder)
    sizes = torch.tensor([[64, 128], [128, 64]])
    maps = [torch.randn(2, 16 >> i, 16 >> i, 24) for i in range(4)]
    wider = [torch.cat([m, torch.randn(2, m.shape[1], m.shape[2] // 2, 24)], dim=2) for m in maps]
    found = encoder(wider, sizes, (128, 192))
    for small, large in zip(encoder(maps, sizes, (128, 128)), found, strict=True):
        h, w = small.shape[1:3]
        close(large[0, : h // 2, :w], small[0, : h // 2])
        close(large[1, :, : w // 2], small[1, :, : w // 2])


def test_padding_cells_are_not_seen() -> None:
    encoder = DeformableEncoder(narrow()).requires_grad_(False)
    _stir(encoder)
    sizes = torch.tensor([[40, 70]])
    maps = [torch.randn(1, 8 >> i, 16 >> i, 24) for i in range(4)]
    before = join_maps(encoder(maps, sizes, (64, 128)))
    padding = geometry_of(maps, sizes, (64, 128)).padding
    cells = torch.where(padding, torch.randn(1, 170, 24), join_maps(maps))
    other = part_maps(cells, [(m.shape[1], m.shape[2]) for m in maps])
    after = join_maps(encoder(other, sizes, (64, 128)))
    valid = ~padding[..., 0]
    close(after[valid], before[valid])
    assert not torch.allclose(after[~valid], before[~valid])


def test_heads_begin_by_looking_around() -> None:
    attention = DeformableAttention(16, heads=8, points=4)
    with torch.no_grad():
        offsets = attention.sampling_offsets(torch.randn(1, 16)).view(8, 4, 4, 2)
        weights = attention.attention_weights(torch.randn(1, 16))
    assert not weights.any()
    for head in range(8):
        angle = head * math.pi / 4
        direction = torch.tensor([round(math.cos(angle)), round(math.sin(angle))], dtype=torch.float32)
        for point in range(4):
            close(offsets[head, :, point], (direction * (point + 1)).expand(4, 2), 1e-6)


def test_decoder_begins_at_the_proposals_with_rare_objects() -> None:
    stage = DeformableStage(narrow()).requires_grad_(False)
    boxes, content = torch.rand(1, 5, 4) * 0.8 + 0.1, torch.randn(1, 5, 24)
    logits, refined = stage.predict(content, boxes)
    close(refined, boxes)
    close(stage.predict(0 * content, boxes)[0].sigmoid(), torch.full_like(logits, 0.01), 1e-6)
    assert torch.isfinite(inverse_sigmoid(torch.tensor([-0.5, 0.0, 1.0, 1.5]))).all()


def test_neck_makes_four_maps_of_three() -> None:
    neck = MapProjections((8, 16, 32, 64), narrow()).requires_grad_(False)
    features = [torch.randn(2, 8 << i, 28 >> i, 20 >> i) for i in range(4)]
    maps = neck(features)
    assert [tuple(m.shape) for m in maps] == [(2, 24, 14, 10), (2, 24, 7, 5), (2, 24, 3, 2), (2, 24, 2, 1)]
    features[0] = torch.randn_like(features[0])
    assert all(torch.equal(a, b) for a, b in zip(neck(features), maps, strict=True))
    convolutions = [module for module in neck.modules() if isinstance(module, nn.Conv2d)]
    assert [c.kernel_size[0] for c in convolutions] == [1, 1, 1, 3]
    assert not any(c.bias.any() for c in convolutions if c.bias is not None)


@pytest.mark.parametrize(("channels", "groups"), [(24, 1), (32, 4), (96, 4), (128, 16), (256, 32), (512, 32)])
def test_no_group_that_is_normalised_is_a_single_number(channels: int, groups: int) -> None:
    """Not even on a map of one cell, on which PyTorch refuses it."""
    neck = MapProjections((8, 16, 32, 64), narrow(hidden_dim=channels, attention_heads=8))
    assert {module.num_groups for module in neck.modules() if isinstance(module, nn.GroupNorm)} == {groups}
    maps = neck.requires_grad_(False)([torch.randn(1, 8 << i, 8 >> i, 8 >> i) for i in range(4)])
    assert maps[-1].shape == (1, channels, 1, 1)
    assert maps[-1].any()


@pytest.mark.parametrize("how", ["autocast", "half weights"])
def test_places_and_shares_keep_their_precision(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a number of places would be off by half a cell on a large map."""
    seen: list[tuple[torch.dtype, ...]] = []

    def sample(features: list[Tensor], xy: Tensor, weight: Tensor) -> Tensor:
        seen.append((features[0].dtype, xy.dtype, weight.dtype))
        assert torch.allclose(weight.sum(dim=(-2, -1)), torch.ones(1), atol=1e-6)
        return deformable_sample(features, xy, weight)

    monkeypatch.setattr(deformable, "deformable_sample", sample)
    encoder = DeformableEncoder(narrow()).requires_grad_(False)
    _stir(encoder)
    maps, sizes = [torch.randn(1, 8 >> i, 16 >> i, 24) for i in range(4)], torch.tensor([[50, 101]])
    exact = join_maps(encoder(maps, sizes, (64, 128)))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        if how == "half weights":
            encoder, maps = encoder.half(), [feature.half() for feature in maps]
        found = join_maps(encoder(maps, sizes, (64, 128)))
    kind = torch.bfloat16 if how == "autocast" else torch.float16
    assert seen == [(torch.float32,) * 3] * 2 + [(kind, torch.float32, torch.float32)] * 2
    assert float((found.float() - exact).abs().mean()) < 0.05


def test_what_asag_d_costs() -> None:
    """Multiply-accumulates on the mean image of the paper, 800x1134, with its 253 anchors."""
    with torch.device("meta"):
        model = Asag(variant_config("asag-d-r50-300").with_changes(heads=1)).requires_grad_(False)
        image, size = torch.empty(1, 3, 800, 1134), torch.empty(1, 2, dtype=torch.int64)
        anchors, valid = torch.empty(1, 253, 4), torch.empty(1, 253, dtype=torch.bool)
    with FlopCounterMode(display=False) as counter:
        features = model.features(image, size)
        model.anchor_generator.first_level(features[2], size)
        proposals = Proposals(anchors, anchors, anchors, torch.empty(1, 253, 256, device="meta"))
        model.decode("main", features, proposals, valid[:, :, None] & valid[:, None], size)
    whole = counter.get_total_flops() / 2e9
    assert whole == pytest.approx(165.57, abs=0.01)  # and 1.25 for the relation block, 0.15 for ten patches
    encoder = counter.get_flop_counts()["DeformableEncoder"]
    assert sum(encoder.values()) / 2e9 == pytest.approx(85.39, abs=0.01)


def narrow(**changes: Any) -> AsagConfig:
    return tiny_config("deformable-detr", **changes)


def _stir(module: nn.Module) -> None:
    """Give every weight that starts at zero a value, so that all of them matter."""
    for parameter in module.parameters():
        if parameter.dim() > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.3)


@pytest.mark.parametrize("channels", [8, 32, 96, 200, 256])
def test_a_neck_of_any_width_is_normalised(channels: int) -> None:
    """In 32 groups as published, and never in groups of a single number."""
    norm = group_norm(channels)
    assert channels % norm.num_groups == 0
    assert channels // norm.num_groups >= 8
    assert group_norm(256).num_groups == 32
    assert norm(torch.randn(2, channels, 1, 1)).shape == (2, channels, 1, 1)
