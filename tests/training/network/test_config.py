"""The network's settings: what the published variants are, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from asag_deploy.bundle.manifest import Preprocessing
from asag_deploy.errors import ConfigError
from asag_training.checkpoints import untrained_checkpoint
from asag_training.network.config import VARIANTS, AsagConfig, own_preprocessing, variant_config

NOT_ZERO = (
    *("attention_heads", "groups", "backbone_width", "hidden_dim", "ffn_dim", "dynamic_dim", "in_points"),
    *("out_points", "patch_size", "compress_dim", "first_level_anchors", "patch_anchors", "anchor_cap"),
    *("max_patches", "max_detections", "encoder_layers", "deformable_points", "deformable_ffn_dim"),
)


LIGHT = ["asag-a-lite-s", "asag-a-lite-m"]
OF_LETTER = {"a": ("adamixer", "P2"), "s": ("sparse-rcnn", "P2"), "d": ("deformable-detr", "P3")}


def test_published_variants() -> None:
    published = {name: config for name, config in VARIANTS.items() if name not in LIGHT}
    assert list(VARIANTS) == [*published, *LIGHT]
    assert list(published) == [
        f"asag-{decoder}-r{depth}-{setting}"
        for decoder in "asd"
        for depth in (50, 101)
        for setting in ("100", "300", "crowdhuman")
    ]
    for name, config in published.items():
        assert config.variant == name
        sides = Preprocessing(longer_side=1500) if name.endswith("crowdhuman") else None
        assert own_preprocessing(config) == sides
        decoder, finest_map = OF_LETTER[name[5]]
        assert (config.decoder, config.finest_map) == (decoder, finest_map)
        assert (config.encoder_layers, config.deformable_points, config.deformable_ffn_dim) == (6, 4, 1024)
        assert config.backbone_depth == int(name.split("-")[2].removeprefix("r"))
        assert variant_config(name) is config


def test_images_of_crowdhuman_are_longer() -> None:
    checkpoint = untrained_checkpoint("asag-s-r50-crowdhuman")
    assert checkpoint.preprocessing == Preprocessing(shorter_side=800, longer_side=1500)
    silent = dataclasses.replace(checkpoint, preprocessing=None)
    assert silent.prepared == checkpoint.preprocessing
    said = dataclasses.replace(checkpoint, preprocessing=Preprocessing(shorter_side=320, longer_side=333))
    assert said.prepared == said.preprocessing


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("anchor_cap", 2048),
        ("anchor_floor", 2048),
        ("first_level_anchors", 3276),
        ("patch_size", 1024),
        ("deformable_points", 64),
    ],
)
def test_no_network_is_beyond_the_compiled_operators(name: str, most: int) -> None:
    config = variant_config("asag-a-r50-100").with_changes(anchor_cap=2048, first_level_anchors=3000)
    assert getattr(config.with_changes(**{name: most}), name) == most
    with pytest.raises(ConfigError, match=f"{name} {most + 1} is not possible: expected 1 to {most}"):
        config.with_changes(**{name: most + 1})


@pytest.mark.parametrize("size", [0, 1, 29, -2, 1 << 20])
def test_a_first_level_that_has_no_quarters(size: int) -> None:
    with pytest.raises(ConfigError, match=f"first_level_size {size} is not possible: expected an even"):
        variant_config("asag-a-r50-100").with_changes(first_level_size=size)


def test_the_first_level_follows_the_patches_unless_said() -> None:
    config = variant_config("asag-a-r50-100")
    assert (config.first_level_size, config.first_patch_size) == (None, 15)
    assert config.with_changes(patch_size=9).first_patch_size == 9
    assert config.with_changes(patch_size=9, first_level_size=30).first_patch_size == 15


@pytest.mark.parametrize(
    ("name", "backbone", "shorter", "longer"),
    [
        ("asag-a-lite-s", "mobilenetv4-conv-small", 512, 864),
        ("asag-a-lite-m", "mobilenetv4-conv-medium", 640, 1088),
    ],
)
def test_light_variants(name: str, backbone: str, shorter: int, longer: int) -> None:
    config = variant_config(name)
    assert (config.variant, config.backbone, config.backbone_width) == (name, backbone, 32)
    made = untrained_checkpoint(name).preprocessing
    assert made is not None
    assert made == own_preprocessing(config)
    assert (made.shorter_side, made.longer_side) == (shorter, longer)
    assert longer % made.size_divisor == 0


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (
            "100",
            {"num_classes": 80, "anchor_floor": 5, "anchor_cap": 200, "score_pass": 0.1, "max_patches": None},
        ),
        (
            "300",
            {
                "num_classes": 80,
                "anchor_floor": 50,
                "anchor_cap": 500,
                "score_pass": 0.05,
                "max_patches": None,
            },
        ),
        (
            "crowdhuman",
            {"num_classes": 1, "anchor_floor": 50, "anchor_cap": 600, "score_pass": 0.05, "max_patches": 60},
        ),
        (
            "100",
            {
                "first_level_anchors": 50,
                "patch_anchors": 20,
                "detection_nms_iou": None,
                "max_detections": 100,
            },
        ),
        (
            "300",
            {
                "first_level_anchors": 150,
                "patch_anchors": 50,
                "detection_nms_iou": 0.7,
                "max_detections": 100,
            },
        ),
        (
            "crowdhuman",
            {
                "first_level_anchors": 150,
                "patch_anchors": 50,
                "detection_nms_iou": 0.8,
                "max_detections": None,
            },
        ),
    ],
)
def test_settings_of_the_paper(setting: str, expected: dict[str, Any]) -> None:
    for prefix in ("asag-a-r50", "asag-s-r101", "asag-d-r50"):
        values = variant_config(f"{prefix}-{setting}").to_dict()
        assert {name: values[name] for name in expected} == expected
        assert (values["score_low"], values["score_high"], values["patch_nms_iou"]) == (0.1, 0.7, 0.25)


def test_unknown_variant_lists_the_known() -> None:
    with pytest.raises(ConfigError, match=r"unknown variant 'asag-b'; the variants are asag-a-r50-100, "):
        variant_config("asag-b")


@pytest.mark.parametrize(("heads", "names"), [(1, ("main",)), (2, ("aux_0", "main"))])
def test_main_head_is_the_last(heads: int, names: tuple[str, ...]) -> None:
    assert AsagConfig(variant="x", heads=heads).head_names == names


def test_published_head_names() -> None:
    assert AsagConfig(variant="x").head_names == ("aux_0", "aux_1", "aux_2", "main")


@pytest.mark.parametrize(
    "change",
    [
        {"decoder": "detr"},
        {"backbone": "mobilenetv4"},
        {"finest_map": "P4"},
        {"backbone_depth": 34},
        {"activation": "tanh"},
        {"num_classes": 0},
        {"heads": 0},
        {"heads": 1_000_000},
        {"heads": 32, "decoder_layers": 32},
        {"encoder_layers": 257},
        {"decoder": "deformable-detr"},
        {"decoder": "deformable-detr", "finest_map": "P3", "separable_neck": True},
        {"backbone_width": 2**31 - 1},
        {"max_detections": 2**31},
        {"hidden_dim": 100},
        {"hidden_dim": 48, "attention_heads": 5},
        {"hidden_dim": 64, "groups": 3},
        {"score_low": 0.7},
        {"score_high": 1.5},
        {"score_pass": 0.0},
        {"patch_nms_iou": 1.0},
        {"anchor_floor": 201},
        {"anchor_floor": 0},
        {"first_level_anchors": 1, "anchor_floor": 6},
        {"detection_nms_iou": 0.0},
        {"detection_nms_iou": 1.1},
        {"min_anchor_side": -1.0},
        *({name: 0} for name in NOT_ZERO),
        *({name: -8} for name in NOT_ZERO),
    ],
    ids=str,
)
def test_impossible_setting_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        AsagConfig(variant="x").with_changes(**change)
    message = str(caught.value)
    assert "\n" not in message
    assert "expected" in message
    assert any(name in message and str(value) in message for name, value in change.items())


@pytest.mark.parametrize(
    "change",
    [
        {"detection_nms_iou": 1.0},
        {"detection_nms_iou": None},
        {"max_patches": 1},
        {"max_detections": None},
        {"score_low": 0.0, "score_high": 1.0},
        {"hidden_dim": 8, "attention_heads": 1, "groups": 8},
        {"anchor_floor": 200},
        {"min_anchor_side": 0.0},
    ],
    ids=str,
)
def test_setting_at_its_limit_is_taken(change: dict[str, Any]) -> None:
    values = AsagConfig(variant="x").with_changes(**change).to_dict()
    assert {name: values[name] for name in change} == change


def test_with_changes() -> None:
    config = variant_config("asag-a-r50-100")
    changed = config.with_changes(num_classes=3, heads=1)
    assert dataclasses.replace(changed, num_classes=80, heads=4) == config
    with pytest.raises(ConfigError, match="unknown network setting 'classes'; the settings are activation, "):
        config.with_changes(classes=3)


def test_settings_are_json() -> None:
    for config in VARIANTS.values():
        assert AsagConfig(**json.loads(json.dumps(config.to_dict()))) == config


def test_settings_do_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        variant_config("asag-a-r50-100").heads = 1  # type: ignore[misc]
