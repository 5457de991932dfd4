"""Which network a checkpoint's weights are, and what is said of those that are none."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from asag_deploy.bundle.manifest import Preprocessing
from asag_deploy.errors import CheckpointError, ConfigError
from asag_evaluation.data.coco import COCO_CATEGORIES
from asag_evaluation.data.crowdhuman import CROWDHUMAN_CATEGORIES
from asag_training.checkpoints import load_backbone, load_checkpoint, select_head
from asag_training.checkpoints.layout import expected_layout, infer_config
from asag_training.network.config import (
    VARIANTS,
    AsagConfig,
    DecoderType,
    default_categories,
    variant_config,
)
from asag_training.network.model import Asag, build
from support.checkpoint_files import (
    CATEGORIES,
    random_state,
    save_public,
    tiny_checkpoint,
    tiny_config,
    zeros_of,
)

OFFICIAL = {
    "asag_a_r50_100": "asag-a-r50-100",
    "asag_a_r50_300": "asag-a-r50-300",
    "asag_a_r101_300": "asag-a-r101-300",
    "asag_s_r50_100": "asag-s-r50-100",
    "asag_s_r50_300": "asag-s-r50-300",
    "asag_s_crowdhuman": "asag-s-r50-crowdhuman",
}

DECODERS = ("adamixer", "sparse-rcnn", "deformable-detr")
OF_DECODER = {
    "adamixer": {"in_points", "out_points", "groups"},
    "sparse-rcnn": {"dynamic_dim"},
    "deformable-detr": {"encoder_layers", "deformable_points", "deformable_ffn_dim"},
}
"""Settings that no other network has weights of."""

INFERENCE_ONLY = {
    "variant", "activation", "anchor_floor", "anchor_cap", "score_low", "score_high", "score_pass",
    "patch_nms_iou", "min_anchor_side", "max_patches", "max_detections", "detection_nms_iou",
}  # fmt: skip
"""Settings that no shape shows."""


def refusal(action: Callable[[], object]) -> str:
    """What CheckpointError says, which must be a single line."""
    with pytest.raises(CheckpointError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def official(tmp_path: Path, reference_dir: Path) -> Callable[..., Path]:
    """Write a full-size file of the public layout."""

    def write(layout: str = "asag_a_r50_100", **options: Any) -> Path:
        state = zeros_of(reference_dir / f"layout_{layout}.json")
        return save_public(tmp_path / f"{layout}.pth", state, **options)

    return write


@pytest.mark.parametrize(("layout", "variant"), OFFICIAL.items())
def test_published_network_is_recognised(official: Callable[..., Path], layout: str, variant: str) -> None:
    config = variant_config(variant)
    crowdhuman = variant.endswith("crowdhuman")
    options = {
        "use_anchor_threshold": config.score_pass,
        "dataset_file": "crowdhuman" if crowdhuman else "coco",
    }
    checkpoint = load_checkpoint(official(layout, **options))
    assert checkpoint.config == config
    assert checkpoint.categories == (CROWDHUMAN_CATEGORIES if crowdhuman else COCO_CATEGORIES)
    assert checkpoint.head_names == ("aux_0", "aux_1", "aux_2", "main")
    assert (checkpoint.trained, checkpoint.epoch, checkpoint.head) == (True, 11, None)


def test_named_variant_is_the_published_one(official: Callable[..., Path]) -> None:
    path = official(threshold1=0.8)
    assert load_checkpoint(path, variant="asag-a-r50-100").config == variant_config("asag-a-r50-100")
    assert load_checkpoint(path).config.score_high == 0.8


def test_weights_are_kept_bit_for_bit(tmp_path: Path) -> None:
    state = random_state(tiny_config())
    for legacy in (False, True):
        path = save_public(tmp_path / "tiny.pth", state, legacy=legacy)
        checkpoint = load_checkpoint(path, variant=tiny_config())
        assert list(checkpoint.state) == list(state)
        assert all(torch.equal(checkpoint.state[name], tensor) for name, tensor in state.items())
        assert checkpoint.config == tiny_config()
        assert [category.name for category in checkpoint.categories] == ["class_0", "class_1", "class_2"]


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(
    "changes",
    [{}, {"backbone_depth": 101, "heads": 2}, {"first_level_anchors": 50}, {"first_level_size": 26}],
    ids=str,
)
def test_settings_of_an_own_network_are_read_off_its_shapes(
    tmp_path: Path, decoder: DecoderType, changes: dict[str, Any]
) -> None:
    config = tiny_config(decoder, **changes)
    path = save_public(tmp_path / "own.pth", random_state(config), activation="relu", threshold2=0.2)
    found = load_checkpoint(path).config
    not_used = set().union(*(names for name, names in OF_DECODER.items() if name != decoder))
    shapes_tell = {field.name for field in dataclasses.fields(AsagConfig)} - not_used - INFERENCE_ONLY
    assert {n: getattr(found, n) for n in shapes_tell} == {n: getattr(config, n) for n in shapes_tell}
    assert (found.activation, found.score_low, found.score_high) == ("relu", 0.2, 0.7)
    fifty = config.first_level_anchors == 50  # the public code's rule
    assert (found.anchor_floor, found.anchor_cap) == ((5, 200) if fifty else (50, 500))
    assert found.variant.endswith("-custom")


def test_crowdhuman_settings_come_from_the_options(tmp_path: Path) -> None:
    path = save_public(tmp_path / "own.pth", random_state(tiny_config()), dataset_file="crowdhuman")
    found = load_checkpoint(path).config
    assert (found.anchor_cap, found.max_patches, found.max_detections) == (600, 60, None)
    checkpoint = load_checkpoint(path)
    assert checkpoint.prepared == Preprocessing(shorter_side=800, longer_side=1500)
    assert "without other options, 800 to 1500 pixels" in checkpoint.assumed[0]


def test_one_class_is_not_crowdhuman_if_the_options_say_so(official: Callable[..., Path]) -> None:
    own = load_checkpoint(official("asag_s_crowdhuman", dataset_file="coco"))
    assert (own.config.anchor_cap, own.config.num_classes) == (500, 1)
    assert [category.name for category in own.categories] == ["class_0"]


def wrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"module.{name}": tensor for name, tensor in state.items()}


def counted(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**state, "backbone.0.body.bn1.num_batches_tracked": torch.tensor(7)}


def halved(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.half() for name, tensor in state.items()}


@pytest.mark.parametrize("change", [dict, wrapped, counted, halved])
def test_bare_state_dict(tmp_path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    state = random_state(tiny_config())
    torch.save(change(state), tmp_path / "bare.pth")
    checkpoint = load_checkpoint(tmp_path / "bare.pth", variant=tiny_config())
    assert checkpoint.epoch is None
    tolerance = 1e-3 if change is halved else 0.0
    for name, tensor in state.items():
        assert checkpoint.state[name].dtype == torch.float32
        torch.testing.assert_close(checkpoint.state[name], tensor, rtol=tolerance, atol=tolerance)


def test_metrics_stored_as_numpy_scalars(tmp_path: Path) -> None:
    path = tmp_path / "best.pth"
    content = {
        "model": random_state(tiny_config()),
        "mAP": np.float64(0.4),
        "best": np.float32(0.4),
        "epoch": 3,
    }
    torch.save({**content, "args": argparse.Namespace(seed=np.int64(1))}, path)
    assert load_checkpoint(path, variant=tiny_config()).epoch == 3


def test_another_variant_is_refused_with_the_one_that_fits(official: Callable[..., Path]) -> None:
    message = refusal(lambda: load_checkpoint(official(), variant="asag-a-r50-300"))
    assert "is not a checkpoint of asag-a-r50-300" in message
    assert (
        "misshapen: anchor_generator.proj_all.layers.2.weight (250, 1000) instead of (750, 1000)" in message
    )
    assert message.endswith("it is one of asag-a-r50-100")


def test_another_decoder_is_refused_naming_three_of_each_kind(official: Callable[..., Path]) -> None:
    message = refusal(lambda: load_checkpoint(official("asag_s_r50_300"), variant="asag-a-r50-300"))
    assert "missing: decoder.bbox_head.0.iof_tau, decoder.bbox_head.0.attention.in_proj_weight, " in message
    assert "unexpected: decoder.head_series.0.self_attn.in_proj_weight, " in message
    assert message.count(" more") == 2
    assert message.endswith("it is one of asag-s-r50-300")


def test_own_network_is_refused_as_a_published_one(tmp_path: Path) -> None:
    path = save_public(tmp_path / "own.pth", random_state(tiny_config()))
    assert refusal(lambda: load_checkpoint(path, variant="asag-a-r50-100")).endswith(
        "leave the variant out to use them"
    )


def test_incomplete_network(official: Callable[..., Path], tmp_path: Path, reference_dir: Path) -> None:
    state = zeros_of(reference_dir / "layout_asag_a_r50_100.json")
    del state["rpn.iof_tau"]
    state["rpn.extra"] = torch.zeros(1)
    path = save_public(tmp_path / "incomplete.pth", state)
    for variant in (None, "asag-a-r50-100"):
        message = refusal(lambda variant=variant: load_checkpoint(path, variant=variant))  # type: ignore[misc]
        assert "missing: rpn.iof_tau; unexpected: rpn.extra" in message
        assert "asag-a-r50-100" in message


def test_unknown_variant_is_refused_before_the_file_is_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown variant 'asag-x'"):
        load_checkpoint(tmp_path / "missing.pth", variant="asag-x")


def test_activation_of_a_named_variant_must_be_the_one_trained_with(official: Callable[..., Path]) -> None:
    path = official(activation="relu")
    message = refusal(lambda: load_checkpoint(path, variant="asag-a-r50-100"))
    assert "activation 'relu', but asag-a-r50-100 has 'gelu'" in message
    assert load_checkpoint(path).config.activation == "relu"


@pytest.mark.parametrize(
    "options", [{"activation": "tanh"}, {"threshold1": "high"}, {"threshold2": 0.9}], ids=str
)
def test_impossible_options(tmp_path: Path, options: dict[str, Any]) -> None:
    path = save_public(tmp_path / "own.pth", random_state(tiny_config()), **options)
    assert "the options stored in" in refusal(lambda: load_checkpoint(path))


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("head", ["aux_0", "aux_2", "main"])
def test_one_head_of_four_predicts_what_it_did_among_them(
    tmp_path: Path, decoder: DecoderType, head: str
) -> None:
    config = tiny_config(decoder)
    path = save_public(tmp_path / "four.pth", random_state(config))
    four = load_checkpoint(path, variant=config)
    one = load_checkpoint(path, variant=config, head=head)
    assert (one.config.heads, one.head, one.head_names) == (1, head, (head,))

    outputs = []
    for checkpoint, name in ((four, head), (one, "main")):
        network = build(checkpoint.config, dict(checkpoint.state))
        generator = torch.Generator().manual_seed(0)
        features = [
            torch.randn(1, 64 >> i, 64 >> i, config.hidden_dim, generator=generator) for i in range(4)
        ]
        anchors = torch.tensor([[[100.0, 90.0, 60.0, 80.0], [40.0, 200.0, 30.0, 30.0]]])
        size = torch.tensor([[256, 256]])
        proposals, blocked = network.relate(features, anchors, torch.ones(1, 2, dtype=torch.bool), size)
        outputs.append(network.decode(name, features, proposals, blocked, size))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=0)


def test_head_that_is_not_there() -> None:
    checkpoint = tiny_checkpoint()
    message = refusal(lambda: select_head(checkpoint, "aux_3"))
    assert message == "there is no head 'aux_3' in the checkpoint; it has aux_0, aux_1, aux_2, main"
    chosen = select_head(checkpoint, "aux_1")
    assert select_head(chosen, "aux_1").head == "aux_1"
    assert refusal(lambda: select_head(chosen, "main")).endswith("it has aux_1")


def test_file_of_one_head_as_a_named_variant(tmp_path: Path, reference_dir: Path) -> None:
    state = zeros_of(reference_dir / "layout_asag_a_r50_100.json")
    state = {name: tensor for name, tensor in state.items() if not name.startswith("decoder.bbox_head.")} | {
        name: tensor for name, tensor in state.items() if name.startswith("decoder.bbox_head.0.")
    }
    state["decoder.decoder_embedding.weight"] = torch.zeros(1).expand(1, 256)
    path = save_public(tmp_path / "one.pth", state)
    for variant in (None, "asag-a-r50-100"):
        config = load_checkpoint(path, variant=variant, head="main").config
        assert config == variant_config("asag-a-r50-100").with_changes(heads=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"categories": CATEGORIES[:2]}, "2 class names were given for a network of 3 classes"),
        ({"categories": (*CATEGORIES[:2], CATEGORIES[0])}, "two classes have the same id"),
        ({"head": "main"}, "head 'main' cannot be selected while there are 4 heads"),
        ({"state": {}}, "missing: backbone.0.body.conv1.weight"),
        ({"config": tiny_config(num_classes=4)}, r"misshapen: rpn.fc_cls.weight (3, 24) instead of (4, 24)"),
    ],
    ids=str,
)
def test_checkpoint_that_contradicts_itself(change: dict[str, Any], message: str) -> None:
    checkpoint = tiny_checkpoint()
    assert message in refusal(lambda: dataclasses.replace(checkpoint, **change))


def torchvision_state(config: AsagConfig) -> dict[str, Tensor]:
    prefix = "backbone.0.body."
    state = {
        name.removeprefix(prefix): torch.rand_like(tensor)
        for name, tensor in random_state(config).items()
        if name.startswith(prefix)
    }
    counters = {
        name.replace("running_var", "num_batches_tracked"): torch.tensor(0)
        for name in state
        if "running_var" in name
    }
    return {**state, **counters, "fc.weight": torch.zeros(10, 128), "fc.bias": torch.zeros(10)}


def test_backbone_takes_torchvision_weights(tmp_path: Path) -> None:
    model = Asag(tiny_config())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torchvision_state(model.config)
    torch.save(state, tmp_path / "resnet50.pth")
    load_backbone(model, tmp_path / "resnet50.pth")
    for name, tensor in model.state_dict().items():
        expected = (
            state[name.removeprefix("backbone.0.body.")] if name.startswith("backbone") else before[name]
        )
        assert torch.equal(tensor, expected), name


def timm_state(config: AsagConfig) -> dict[str, Tensor]:
    """The backbone's weights with the classifier's, as timm has them."""
    heads = {"conv_head.weight": torch.zeros(16, 24, 1, 1), "norm_head.running_mean": torch.zeros(16)}
    heads |= {"classifier.weight": torch.zeros(10, 16), "classifier.bias": torch.zeros(10)}
    heads |= {"blocks.4.0.conv.weight": torch.zeros(24, 32, 1, 1), "blocks.4.0.bn1.bias": torch.zeros(24)}
    state = {name: tensor for name, tensor in torchvision_state(config).items() if not name.startswith("fc.")}
    return {**state, **heads}


@pytest.mark.parametrize("backbone", ["mobilenetv4-conv-small", "mobilenetv4-conv-medium"])
@pytest.mark.parametrize("finest_map", ["P2", "P3"])
def test_backbone_takes_timms_weights(tmp_path: Path, backbone: str, finest_map: str) -> None:
    model = Asag(tiny_config(backbone=backbone, finest_map=finest_map))
    neck = model.state_dict()["neck.inner_blocks.0.0.weight"].clone()
    state = timm_state(model.config)
    save_file(state, tmp_path / "model.safetensors")
    load_backbone(model, tmp_path / "model.safetensors")
    taken = {name for name in model.state_dict() if name.startswith("backbone")}
    assert len(taken) == sum(
        not name.endswith("tracked")
        and not name.startswith(("blocks.4", "conv_head", "norm_head", "classifier"))
        for name in state
    )
    for name in taken:
        assert torch.equal(model.state_dict()[name], state[name.removeprefix("backbone.0.body.")]), name
    assert torch.equal(model.state_dict()["neck.inner_blocks.0.0.weight"], neck)


def test_backbone_of_another_kind(tmp_path: Path) -> None:
    small, medium, resnet = (
        tiny_config(**changes)
        for changes in (
            {"backbone": "mobilenetv4-conv-small", "backbone_width": 32},
            {"backbone": "mobilenetv4-conv-medium", "backbone_width": 32},
            {"backbone_width": 64},
        )
    )
    path = tmp_path / "small.pth"
    torch.save(timm_state(small), path)
    message = refusal(lambda: load_backbone(Asag(medium), path))
    assert "does not hold a MobileNetV4-Conv-Medium (missing: blocks.0.0.conv_exp.weight" in message
    assert message.endswith("it is a MobileNetV4-Conv-Small")
    message = refusal(lambda: load_backbone(Asag(resnet), path))
    assert "does not hold a ResNet-50" in message
    assert message.endswith("it is a MobileNetV4-Conv-Small")
    assert "holds a MobileNetV4 and no ASAG network" in refusal(lambda: load_checkpoint(path))


@pytest.mark.parametrize("variant", ["asag-a-lite-s", "asag-a-lite-m"])
def test_light_network_is_recognised(variant: str) -> None:
    for config, expected in (
        (variant_config(variant).with_changes(heads=2), None),
        (variant_config(variant).with_changes(heads=1, num_classes=3, finest_map="P2"), "custom"),
    ):
        found = infer_config(expected_layout(config))
        assert found is not None
        if expected is None:
            assert found == config
        else:
            assert found.variant == f"asag-a-{config.backbone}-custom"
            assert expected_layout(found) == expected_layout(config)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name.startswith("asag-d")])
def test_asag_d_is_recognised(variant: str) -> None:
    """By its shapes alone, whatever is said of where they come from; of its head, too."""
    config = variant_config(variant)
    data_set = "crowdhuman" if variant.endswith("crowdhuman") else None
    assert infer_config(expected_layout(config), data_set=data_set) == config
    alone = config.with_changes(heads=1)
    assert infer_config(expected_layout(alone), data_set=data_set) == alone
    changed = config.with_changes(encoder_layers=3, deformable_points=2, deformable_ffn_dim=512)
    found = infer_config(expected_layout(changed), data_set=data_set)
    assert found is not None
    assert expected_layout(found) == expected_layout(changed)
    assert found.variant.startswith("asag-d-r")
    assert "-custom" in found.variant


def test_backbone_of_another_depth(tmp_path: Path) -> None:
    path = tmp_path / "resnet101.pth"
    torch.save(torchvision_state(tiny_config(backbone_depth=101)), path)
    message = refusal(lambda: load_backbone(Asag(tiny_config()), path))
    assert "does not hold a ResNet-50 (unexpected: layer3.6.conv1.weight, " in message
    assert message.endswith("it is a ResNet-101")
    torch.save({"layer1.weight": torch.zeros(3)}, path)
    assert refusal(lambda: load_backbone(Asag(tiny_config()), path)).endswith(
        "no backbone that the network can have"
    )
    torch.save(torchvision_state(tiny_config()), path)
    assert "holds a ResNet and no ASAG network" in refusal(lambda: load_checkpoint(path))


def test_default_categories() -> None:
    assert len(COCO_CATEGORIES) == 80
    assert len({category.name for category in COCO_CATEGORIES}) == 80
    ids = [category.id for category in COCO_CATEGORIES]
    assert (ids[0], ids[11], ids[-1]) == (1, 13, 90)
    assert ids == sorted(set(range(1, 91)) - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83})
    assert default_categories(variant_config("asag-s-r101-300")) == COCO_CATEGORIES
    assert default_categories(variant_config("asag-s-r50-crowdhuman")) == CROWDHUMAN_CATEGORIES
    assert [category.name for category in default_categories(tiny_config(num_classes=1))] == ["class_0"]
