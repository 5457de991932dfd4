"""Decoders of several layers in sequence (paper, table 8): what they compute, learn, and are stored as."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from asag_deploy.errors import ConfigError
from asag_training.checkpoints import load_checkpoint, save_checkpoint, select_head
from asag_training.losses.config import LossConfig
from asag_training.losses.criterion import Criterion
from asag_training.network.config import MAIN_HEAD, VARIANTS
from asag_training.network.model import Asag, HeadOutput, build
from asag_training.network.relation_block import Proposals
from asag_training.run.training_pass import training_pass
from asag_training.settings import TrainingSettings
from support.loss_samples import objects
from support.small_network import small_checkpoint, small_config

SIZE = torch.tensor([[96, 128], [96, 128]])
DECODERS = ("asag-a-r50-100", "asag-s-r50-100", "asag-d-r50-100")
FEW: dict[str, Any] = {"first_level_anchors": 10, "patch_anchors": 5, "anchor_cap": 20, "num_classes": 3}


def network(variant: str = DECODERS[0], layers: int = 2, heads: int = 2) -> Asag:
    checkpoint = small_checkpoint(variant, decoder_layers=layers, heads=heads, **FEW)
    return build(checkpoint.config, checkpoint.state).requires_grad_(False)


def inputs(model: Asag) -> tuple[list[Tensor], Proposals, Tensor]:
    features = [torch.randn(2, 24 >> i, 32 >> i, model.config.hidden_dim) for i in range(4)]
    anchors = torch.rand(2, 6, 4) * torch.tensor([128, 96, 60, 60]) + torch.tensor([0, 0, 4, 4])
    return features, *model.relate(features, anchors, torch.ones(2, 6, dtype=torch.bool), SIZE)


def test_layers_have_names() -> None:
    config = small_config(heads=2, decoder_layers=3)
    assert config.layer_names("main") == ("main_layer_0", "main_layer_1", "main")
    assert config.layer_names("aux_0") == ("aux_0_layer_0", "aux_0_layer_1", "aux_0")
    assert small_config().layer_names("main") == ("main",)
    with pytest.raises(ConfigError, match="decoder_layers 0 is not possible: expected 1 to "):
        small_config(decoder_layers=0)


@pytest.mark.parametrize("variant", DECODERS)
def test_each_layer_refines_what_the_one_before_it_made(variant: str) -> None:
    model = network(variant)
    features, proposals, blocked = inputs(model)
    for head in model.config.head_names:
        first, last = model.decode_layers(head, features, proposals, blocked, SIZE)
        assert torch.equal(model.decode(head, features, proposals, blocked, SIZE).boxes, last.boxes)
        assert not torch.allclose(first.boxes, last.boxes, atol=1e-3)

    # The first layer alone is a decoder of one layer; moving its boxes moves the second's.
    one = build(model.config.with_changes(heads=4, decoder_layers=1), model.state_dict())
    alone = one.decode("aux_0", features, proposals, blocked, SIZE)
    first, last = model.decode_layers("aux_0", features, proposals, blocked, SIZE)
    assert torch.equal(first.boxes, alone.boxes)
    assert torch.equal(first.logits, alone.logits)
    parallel = one.decode("aux_1", features, proposals, blocked, SIZE)
    assert not torch.allclose(last.boxes, parallel.boxes, atol=1e-3)


@pytest.mark.parametrize("variant", DECODERS)
def test_content_but_no_box_carries_gradients_from_layer_to_layer(variant: str) -> None:
    model = network(variant, heads=1).requires_grad_(True)
    features, proposals, blocked = inputs(model)
    first, last = model.decode_layers(MAIN_HEAD, features, proposals, blocked, SIZE)
    names = {
        "asag-a-r50-100": ("bbox_head.0.ffn.layers.0", "bbox_head.0.fc_reg"),
        "asag-s-r50-100": ("head_series.0.linear1", "head_series.0.bboxes_delta"),
        "asag-d-r50-100": ("layers.0.linear1", "layers.0.bbox_embed.layers.2"),
    }
    inner, box = (model.decoder.get_submodule(name).get_parameter("weight") for name in names[variant])
    gradients: Sequence[Tensor | None] = torch.autograd.grad(
        last.logits.square().sum(), [inner, box], allow_unused=True
    )
    through, past = gradients
    assert first.boxes.requires_grad
    assert past is None
    assert through is not None
    assert through.any()


@pytest.mark.parametrize("variant", DECODERS)
def test_every_layer_is_trained(variant: str) -> None:
    model = network(variant).requires_grad_(True)
    targets = [objects((0.4, 0.4, 0.3, 0.3), labels=[1]), objects((0.6, 0.6, 0.2, 0.4), labels=[2])]
    output = training_pass(
        model,
        torch.randn(2, 3, 96, 128),
        SIZE,
        targets=targets,
        settings=TrainingSettings(denoising_queries=4),
        epoch=1,
        generator=torch.Generator().manual_seed(0),
    )
    assert list(output.heads) == ["aux_0_layer_0", "aux_0", "main_layer_0", "main"]
    losses = Criterion(LossConfig(), model.config.patch_size)(output, targets)
    for suffix in ("", "_layer_0", "_0", "_0_layer_0", "_rpn"):
        for kind in ("loss_ce", "loss_bbox", "loss_giou"):
            assert losses.weights[f"{kind}{suffix}"] == losses.weights[kind]
            assert f"dn_{kind}{suffix}" in losses
    weighted = sum(losses.weights[name] * part.item() for name, part in losses.items())
    assert losses.total.item() == pytest.approx(weighted, rel=1e-4)
    torch.autograd.backward(losses.total)
    without = [n for n, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert without == []


@pytest.mark.parametrize("variant", DECODERS)
def test_one_decoder_keeps_all_its_layers(variant: str, tmp_path: Path) -> None:
    checkpoint = small_checkpoint(variant, heads=2, decoder_layers=2, **FEW)
    save_checkpoint(tmp_path / "two.safetensors", checkpoint)
    loaded = load_checkpoint(tmp_path / "two.safetensors")
    assert loaded.config == checkpoint.config
    one = select_head(loaded, "main")
    assert (one.config.heads, one.config.decoder_layers) == (1, 2)
    whole, alone = (build(each.config, each.state).requires_grad_(False) for each in (loaded, one))
    features, proposals, blocked = inputs(whole)
    expected: HeadOutput = whole.decode("main", features, proposals, blocked, SIZE)
    found = alone.decode("main", features, proposals, blocked, SIZE)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.boxes, expected.boxes)


def test_a_named_variant_keeps_the_layers_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = small_checkpoint(heads=2, decoder_layers=2, **FEW)
    monkeypatch.setitem(VARIANTS, "small", checkpoint.config.with_changes(heads=4, decoder_layers=1))
    save_checkpoint(tmp_path / "two.safetensors", checkpoint)
    loaded = load_checkpoint(tmp_path / "two.safetensors", variant="small")
    assert loaded.config == checkpoint.config
