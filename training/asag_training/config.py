"""The network as values: `AsagConfig`, and the published variants by name.

Names follow the paper; where the official checkpoints use another word for the same thing it is in brackets.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from asag_deploy.errors import ConfigError

DecoderType = Literal["adamixer", "sparse-rcnn"]
Activation = Literal["gelu", "relu", "silu"]

MAIN_HEAD = "main"


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
    """50 or 101."""
    backbone_width: int = 64
    """Channels of the stem; 64 is the standard ResNet."""
    num_classes: int = 80
    heads: int = 4
    """Parallel decoders: the main one and `heads - 1` auxiliary ones [num_decoder_layers]."""

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

    max_detections: int | None = 100
    """Detections kept per image, or None for one per query and class (CrowdHuman)."""
    detection_nms_iou: float | None = None
    """IoU threshold of class-wise NMS on the detections, or None for none."""

    def __post_init__(self) -> None:
        _require(self.decoder in ("adamixer", "sparse-rcnn"), f"decoder '{self.decoder}'", "'adamixer' or 'sparse-rcnn'")
        _require(self.backbone_depth in (50, 101), f"backbone_depth {self.backbone_depth}", "50 or 101")
        _require(self.activation in ("gelu", "relu", "silu"), f"activation '{self.activation}'", "'gelu', 'relu' or 'silu'")
        _require(self.num_classes >= 1, f"num_classes {self.num_classes}", "at least 1")
        _require(self.heads >= 1, f"heads {self.heads}", "at least 1")
        _require(self.hidden_dim % self.attention_heads == 0, f"hidden_dim {self.hidden_dim}", f"a multiple of attention_heads ({self.attention_heads})")
        _require(self.hidden_dim % self.groups == 0, f"hidden_dim {self.hidden_dim}", f"a multiple of groups ({self.groups})")
        _require(self.hidden_dim % 8 == 0, f"hidden_dim {self.hidden_dim}", "a multiple of 8")
        _require(0 <= self.score_low < self.score_high <= 1, f"score_low {self.score_low} and score_high {self.score_high}", "0 <= score_low < score_high <= 1")
        _require(0 < self.score_pass < 1, f"score_pass {self.score_pass}", "between 0 and 1")
        _require(0 < self.patch_nms_iou < 1, f"patch_nms_iou {self.patch_nms_iou}", "between 0 and 1")
        _require(1 <= self.anchor_floor <= self.anchor_cap, f"anchor_floor {self.anchor_floor} and anchor_cap {self.anchor_cap}", "1 <= anchor_floor <= anchor_cap")
        _require(self.anchor_floor <= 5 * self.first_level_anchors, f"anchor_floor {self.anchor_floor}", f"at most the first level's {5 * self.first_level_anchors} anchors")

    @property
    def head_names(self) -> tuple[str, ...]:
        """The parallel decoders in checkpoint order: `aux_0`, `aux_1`, ..., and `main`, which is the last."""
        return (*(f"aux_{i}" for i in range(self.heads - 1)), MAIN_HEAD)

    def with_changes(self, **changes: Any) -> AsagConfig:
        """A copy with some values replaced (ConfigError for an unknown name or a bad value)."""
        known = {f.name for f in dataclasses.fields(self)}
        for name in changes:
            if name not in known:
                raise ConfigError(f"unknown network setting '{name}'; the settings are {', '.join(sorted(known))}")
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
    configs = []
    for letter, decoder in (("a", "adamixer"), ("s", "sparse-rcnn")):
        for depth in (50, 101):
            prefix = f"asag-{letter}-r{depth}"
            configs += [
                asag_100(f"{prefix}-100", decoder, depth),  # type: ignore[arg-type]
                asag_300(f"{prefix}-300", decoder, depth),  # type: ignore[arg-type]
                asag_crowdhuman(f"{prefix}-crowdhuman", decoder, depth),  # type: ignore[arg-type]
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
