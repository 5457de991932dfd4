"""The network as values: `AsagConfig`, and the published variants by name.

Names follow the paper; where the official checkpoints use another word for the same thing it is in brackets.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

from asag_deploy.errors import ConfigError

DecoderType = Literal["adamixer", "sparse-rcnn"]
Activation = Literal["gelu", "relu", "silu"]

MAIN_HEAD = "main"
BACKBONE_DEPTHS = (26, 50, 101)

_CHOICES: dict[str, tuple[Any, ...]] = {
    "decoder": get_args(DecoderType),
    "backbone_depth": BACKBONE_DEPTHS,
    "activation": get_args(Activation),
}
_COUNTS = (
    "backbone_width",
    "num_classes",
    "heads",
    "decoder_layers",
    "hidden_dim",
    "ffn_dim",
    "attention_heads",
    "in_points",
    "out_points",
    "groups",
    "dynamic_dim",
    "patch_size",
    "compress_dim",
    "first_level_anchors",
    "patch_anchors",
    "anchor_floor",
    "anchor_cap",
)
_LIMITS = ("max_patches", "max_detections")


@dataclass(frozen=True, kw_only=True)
class AsagConfig:
    """Everything that decides the network's shape and what its inference computes.

    Raises ConfigError when a value makes no sense.
    """

    variant: str
    """The name it is exported under."""
    decoder: DecoderType = "adamixer"
    """ASAG-A ('adamixer') or ASAG-S ('sparse-rcnn')."""
    backbone_depth: int = 50
    """26, 50 or 101."""
    backbone_width: int = 64
    """Channels of the stem; 64 is the standard ResNet."""
    num_classes: int = 80
    heads: int = 4
    """Parallel decoders: the main one and `heads - 1` auxiliary ones [num_decoder_layers]."""
    decoder_layers: int = 1
    """Layers of each decoder, in sequence: each refines boxes and content of the one before, and is trained
    (paper, table 8).  The published networks have one."""

    hidden_dim: int = 256
    ffn_dim: int = 2048
    attention_heads: int = 8
    activation: Activation = "gelu"
    in_points: int = 32
    """Points sampled per group (ASAG-A)."""
    out_points: int = 128
    """Points mixed to (ASAG-A)."""
    groups: int = 4
    """Sampling groups (ASAG-A)."""
    dynamic_dim: int = 64
    """Inner width of the dynamic convolution (ASAG-S)."""

    patch_size: int = 15
    """Side of a patch in feature cells; P5 is resized to twice that."""
    compress_dim: int = 8
    """Channels of a compressed patch."""
    first_level_anchors: int = 50
    """Anchors per patch on P5 and P6 [num_pred_anchor1]."""
    patch_anchors: int = 20
    """Anchors per patch on P4 and P3 [num_pred_anchor2]."""
    anchor_floor: int = 5
    """At least this many anchors pass the first level [min_anchor]."""
    anchor_cap: int = 200
    """At most this many anchors reach the decoder [max_anchor]."""
    score_low: float = 0.1
    """eta_l: anchors scored below are noise [threshold2]."""
    score_high: float = 0.7
    """eta_h: anchors scored above are good enough [threshold1]."""
    score_pass: float = 0.1
    """eta_f: anchors scored above are passed on [use_anchor_threshold]."""
    patch_nms_iou: float = 0.25
    """IoU over which a patch suppresses a lower scored one [patch_nms_threshold]."""
    min_anchor_side: float = 3.0
    """Anchors narrower or lower than this, in pixels, get score 0."""
    max_patches: int | None = None
    """The most patches per image and level, or None (CrowdHuman: 60)."""
    replace_anchors: bool = True
    """Anchors that asked for a closer look give way to those of the level that took it; else they stay, and
    pass by their score as others do (paper, table 5a)."""

    max_detections: int | None = 100
    """Detections kept per image, or None for one per query and class (CrowdHuman)."""
    detection_nms_iou: float | None = None
    """IoU threshold of class-wise NMS on the detections, or None for none."""

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            _require(value in choices, f"{name} {value!r}", f"one of {', '.join(map(repr, choices))}")
        for name in _COUNTS:
            value = getattr(self, name)
            _require(value >= 1, f"{name} {value}", "at least 1")
        for name in _LIMITS:
            value = getattr(self, name)
            _require(value is None or value >= 1, f"{name} {value}", "at least 1, or None")
        for divisor in ("attention_heads", "groups"):
            number = getattr(self, divisor)
            wanted = f"a multiple of {divisor} ({number})"
            _require(self.hidden_dim % number == 0, f"hidden_dim {self.hidden_dim}", wanted)
        _require(self.hidden_dim % 8 == 0, f"hidden_dim {self.hidden_dim}", "a multiple of 8")
        for name in ("score_pass", "patch_nms_iou"):
            value = getattr(self, name)
            _require(0 < value < 1, f"{name} {value}", "between 0 and 1")
        iou = self.detection_nms_iou
        _require(iou is None or 0 < iou <= 1, f"detection_nms_iou {iou}", "over 0 and at most 1, or None")
        _require(self.min_anchor_side >= 0, f"min_anchor_side {self.min_anchor_side}", "at least 0")
        self._check_order()

    def _check_order(self) -> None:
        low, high = self.score_low, self.score_high
        wanted = "0 <= score_low < score_high <= 1"
        _require(0 <= low < high <= 1, f"score_low {low} and score_high {high}", wanted)
        floor, cap = self.anchor_floor, self.anchor_cap
        _require(floor <= cap, f"anchor_floor {floor} and anchor_cap {cap}", "anchor_floor <= anchor_cap")
        most = 5 * self.first_level_anchors
        _require(floor <= most, f"anchor_floor {floor}", f"at most the first level's {most} anchors")

    @property
    def head_names(self) -> tuple[str, ...]:
        """The parallel decoders in checkpoint order: `aux_0`, `aux_1`, ..., and `main`, which is the last."""
        return (*(f"aux_{i}" for i in range(self.heads - 1)), MAIN_HEAD)

    def layer_names(self, head: str) -> tuple[str, ...]:
        """The layers of a decoder in sequence: `main_layer_0`, ..., and the last by the decoder's name."""
        return (*(f"{head}_layer_{i}" for i in range(self.decoder_layers - 1)), head)

    @property
    def detection_limit(self) -> int:
        """The most detections of an image."""
        return self.max_detections or self.anchor_cap * self.num_classes

    def with_changes(self, **changes: Any) -> AsagConfig:
        """A copy with some values replaced (ConfigError for an unknown name or a bad value)."""
        known = {f.name for f in dataclasses.fields(self)}
        for name in changes:
            if name not in known:
                raise ConfigError(
                    f"unknown network setting '{name}'; the settings are {', '.join(sorted(known))}"
                )
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        return dataclasses.asdict(self)


def _require(condition: bool, what: str, expected: str) -> None:
    if not condition:
        raise ConfigError(f"network setting {what} is not possible: expected {expected}")


def asag_100(variant: str, decoder: DecoderType, backbone_depth: int) -> AsagConfig:
    """The 100 queries setting (paper, section 5.1)."""
    return AsagConfig(variant=variant, decoder=decoder, backbone_depth=backbone_depth)


def asag_300(variant: str, decoder: DecoderType, backbone_depth: int) -> AsagConfig:
    """The 300 queries setting (paper, section 5.1)."""
    return AsagConfig(
        variant=variant,
        decoder=decoder,
        backbone_depth=backbone_depth,
        first_level_anchors=150,
        patch_anchors=50,
        anchor_floor=50,
        anchor_cap=500,
        score_pass=0.05,
        detection_nms_iou=0.7,
    )


def asag_crowdhuman(variant: str, decoder: DecoderType, backbone_depth: int) -> AsagConfig:
    """The CrowdHuman setting: one class, up to 600 anchors, all queries kept, NMS at 0.8."""
    return asag_300(variant, decoder, backbone_depth).with_changes(
        num_classes=1,
        anchor_floor=50,
        anchor_cap=600,
        max_patches=60,
        max_detections=None,
        detection_nms_iou=0.8,
    )


def _variants() -> dict[str, AsagConfig]:
    decoders: dict[str, DecoderType] = {"a": "adamixer", "s": "sparse-rcnn"}
    presets = {"100": asag_100, "300": asag_300, "crowdhuman": asag_crowdhuman}
    configs = [
        preset(f"asag-{letter}-r{depth}-{setting}", decoder, depth)
        for letter, decoder in decoders.items()
        for depth in (50, 101)
        for setting, preset in presets.items()
    ]
    return {config.variant: config for config in configs}


VARIANTS: dict[str, AsagConfig] = _variants()
"""The published variants by name, e.g. `asag-a-r50-100`."""


def variant_config(name: str) -> AsagConfig:
    """The settings of a published variant (ConfigError names the known ones)."""
    try:
        return VARIANTS[name]
    except KeyError:
        raise ConfigError(f"unknown variant '{name}'; the variants are {', '.join(VARIANTS)}") from None
