"""The network as values: `AsagConfig`, and the published variants by name.

Names follow the paper; where the official checkpoints use another word for the same thing it is in brackets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from asag_deploy.bundle.manifest import Category, Level, Preprocessing
from asag_deploy.errors import ConfigError
from asag_deploy.kernels.limits import LARGEST_PATCH, MOST_ANCHORS, MOST_FIRST_ANCHORS
from asag_deploy.kernels.structures import MOST_POINTS
from asag_evaluation.data.coco import COCO_CATEGORIES
from asag_evaluation.data.crowdhuman import CROWDHUMAN_CATEGORIES
from asag_training.settings import Settings

DecoderType = Literal["adamixer", "sparse-rcnn", "deformable-detr"]
BackboneType = Literal["resnet", "mobilenetv4-conv-small", "mobilenetv4-conv-medium"]
Activation = Literal["gelu", "relu", "silu"]
FinestMap = Literal["P2", "P3"]

MAIN_HEAD = "main"
DEFORMABLE: DecoderType = "deformable-detr"
RESNET: BackboneType = "resnet"
BACKBONES: tuple[BackboneType, ...] = get_args(BackboneType)
BACKBONE_DEPTHS = (26, 50, 101)

MANUAL_STOPS: dict[str, tuple[Level, ...]] = {"p3-p6": ("P4", "P3"), "p4-p6": ("P4",), "p5-p6": ()}
"""Manual stops (paper, table 2) by name: the levels that can be probed beyond P5 and P6."""

_CHOICES: dict[str, tuple[Any, ...]] = {
    "decoder": get_args(DecoderType),
    "backbone": BACKBONES,
    "backbone_depth": BACKBONE_DEPTHS,
    "finest_map": get_args(FinestMap),
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
    "box_layers",
    "dynamic_dim",
    "encoder_layers",
    "deformable_points",
    "deformable_ffn_dim",
    "patch_size",
    "compress_dim",
    "first_level_anchors",
    "patch_anchors",
    "anchor_floor",
    "anchor_cap",
)
_LIMITS = ("max_patches", "max_detections")
_MOST, _MOST_LAYERS, _LARGEST_LIMIT = 65_536, 256, 2**31 - 1
"""Beyond these a damaged file speaks: building such a network would never end."""
_MOST_OF = {
    "anchor_floor": MOST_ANCHORS,
    "anchor_cap": MOST_ANCHORS,
    "first_level_anchors": MOST_FIRST_ANCHORS // 5,
    "patch_size": LARGEST_PATCH,
    "deformable_points": MOST_POINTS,
}
"""Beyond these the compiled operators could not run what is exported."""


@dataclass(frozen=True, kw_only=True)
class AsagConfig(Settings):
    """Everything that decides the network's shape and what its inference computes.

    Raises ConfigError when a value makes no sense.
    """

    of = "network"
    variant: str
    """The name it is exported under."""
    decoder: DecoderType = "adamixer"
    """ASAG-A ('adamixer'), ASAG-S ('sparse-rcnn') or ASAG-D ('deformable-detr', with an encoder)."""
    backbone: BackboneType = RESNET
    backbone_depth: int = 50
    """Of a ResNet: 26, 50 or 101."""
    backbone_width: int = 64
    """Channels of the stem; 64 is the standard ResNet, 32 the standard MobileNetV4."""
    separable_neck: bool = False
    """The neck's 3x3 convolutions are depthwise, with a 1x1 after each."""
    finest_map: FinestMap = "P2"
    """Of the four that boxes are read from: P2 to P5, or P3 to P6.  Beside a light backbone P2 costs as much
    as all else.  ASAG-D has P3 to P6."""
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
    box_layers: int = 3
    """Hidden layers of a decoder's box head; the six-layer AdaMixer has one."""
    dynamic_dim: int = 64
    """Inner width of the dynamic convolution (ASAG-S)."""
    encoder_layers: int = 6
    """Layers of the encoder, in sequence (ASAG-D)."""
    deformable_points: int = 4
    """Points that an attention head samples on each map, in encoder and decoder (ASAG-D)."""
    deformable_ffn_dim: int = 1024
    """Inner width of the FFNs of encoder and decoder; `ffn_dim` is the relation block's (ASAG-D)."""

    patch_size: int = 15
    """Side of a patch in feature cells."""
    first_level_size: int | None = None
    """Cells a side that P5 is resized to, whose quarters are its patches, or None: twice `patch_size`.  The
    public code keeps 30, whatever the patches of P4 and P3 (paper, table 5c)."""
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
            self._require(getattr(self, name) in choices, f"one of {', '.join(map(repr, choices))}", name)
        for name in _COUNTS:
            most = _MOST_OF.get(name, _MOST)
            self._require(1 <= getattr(self, name) <= most, f"1 to {most}", name)
        if self.decoder == DEFORMABLE:
            expected = f"'P3' and no separable neck with decoder '{DEFORMABLE}'"
            self._require(
                self.finest_map == "P3" and not self.separable_neck, expected, "finest_map", "separable_neck"
            )
        layers = self.heads * self.decoder_layers
        self._require(layers <= _MOST_LAYERS, f"{_MOST_LAYERS} layers at most", "heads", "decoder_layers")
        self._require(self.encoder_layers <= _MOST_LAYERS, f"{_MOST_LAYERS} at most", "encoder_layers")
        for name in _LIMITS:
            value = getattr(self, name)
            possible = value is None or 1 <= value <= _LARGEST_LIMIT
            self._require(possible, f"1 to {_LARGEST_LIMIT}, or None", name)
        size = self.first_level_size
        even = size is None or (2 <= size <= _MOST and size % 2 == 0)
        self._require(even, f"an even number, 2 to {_MOST}, or None", "first_level_size")
        for divisor in ("attention_heads", "groups"):
            number = getattr(self, divisor)
            self._require(self.hidden_dim % number == 0, f"a multiple of {divisor} ({number})", "hidden_dim")
        self._require(self.hidden_dim % 8 == 0, "a multiple of 8", "hidden_dim")
        for name in ("score_pass", "patch_nms_iou"):
            self._require(0 < getattr(self, name) < 1, "between 0 and 1", name)
        iou = self.detection_nms_iou
        self._require(iou is None or 0 < iou <= 1, "over 0 and at most 1, or None", "detection_nms_iou")
        self._require(self.min_anchor_side >= 0, "at least 0", "min_anchor_side")
        rising = 0 <= self.score_low < self.score_high <= 1
        self._require(rising, "0 <= score_low < score_high <= 1", "score_low", "score_high")
        floor, most = self.anchor_floor, 5 * self.first_level_anchors
        self._require(floor <= self.anchor_cap, "anchor_floor <= anchor_cap", "anchor_floor", "anchor_cap")
        self._require(floor <= most, f"at most the first level's {most} anchors", "anchor_floor")

    @property
    def first_patch_size(self) -> int:
        """Side of a patch of P5 and P6 in cells of the resized P5."""
        return self.patch_size if self.first_level_size is None else self.first_level_size // 2

    @property
    def head_names(self) -> tuple[str, ...]:
        """The parallel decoders in checkpoint order: `aux_0`, `aux_1`, ..., and `main`, which is the last."""
        return (*(f"aux_{i}" for i in range(self.heads - 1)), MAIN_HEAD)

    def layer_names(self, head: str) -> tuple[str, ...]:
        """Name the layers of a decoder in sequence: `main_layer_0`, ..., and the last by the decoder's
        name."""
        return (*(f"{head}_layer_{i}" for i in range(self.decoder_layers - 1)), head)

    @property
    def detection_limit(self) -> int:
        """The most detections of an image."""
        return self.max_detections or self.anchor_cap * self.num_classes


def finest_map_of(decoder: DecoderType) -> FinestMap:
    """Return the finest map that a published network with this decoder has."""
    return "P3" if decoder == DEFORMABLE else "P2"


def asag_100(variant: str, decoder: DecoderType, backbone_depth: int) -> AsagConfig:
    """Return the 100 queries setting (paper, section 5.1)."""
    maps = finest_map_of(decoder)
    return AsagConfig(variant=variant, decoder=decoder, backbone_depth=backbone_depth, finest_map=maps)


def asag_300(variant: str, decoder: DecoderType, backbone_depth: int) -> AsagConfig:
    """Return the 300 queries setting (paper, section 5.1)."""
    return AsagConfig(
        variant=variant,
        decoder=decoder,
        backbone_depth=backbone_depth,
        finest_map=finest_map_of(decoder),
        first_level_anchors=150,
        patch_anchors=50,
        anchor_floor=50,
        anchor_cap=500,
        score_pass=0.05,
        detection_nms_iou=0.7,
    )


def asag_crowdhuman(variant: str, decoder: DecoderType, backbone_depth: int) -> AsagConfig:
    """Return the CrowdHuman setting: one class, up to 600 anchors, all queries kept, NMS at 0.8."""
    return asag_300(variant, decoder, backbone_depth).with_changes(
        num_classes=1,
        anchor_floor=50,
        anchor_cap=600,
        max_patches=60,
        max_detections=None,
        detection_nms_iou=0.8,
    )


def asag_lite(variant: str, backbone: BackboneType) -> AsagConfig:
    """Return a light network for pictures of 512 to 640 pixels, in which what is probed counts.

    Patches are as large a part of such a picture as the published ones are of 800 pixels.
    """
    return AsagConfig(
        variant=variant,
        backbone=backbone,
        backbone_width=32,
        separable_neck=True,
        finest_map="P3",
        hidden_dim=128,
        ffn_dim=512,
        attention_heads=4,
        activation="relu",
        in_points=16,
        out_points=32,
        patch_size=10,
        min_anchor_side=2.0,
    )


def _variants() -> dict[str, AsagConfig]:
    decoders: dict[str, DecoderType] = {"a": "adamixer", "s": "sparse-rcnn", "d": DEFORMABLE}
    presets = {"100": asag_100, "300": asag_300, "crowdhuman": asag_crowdhuman}
    configs = [
        preset(f"asag-{letter}-r{depth}-{setting}", decoder, depth)
        for letter, decoder in decoders.items()
        for depth in (50, 101)
        for setting, preset in presets.items()
    ]
    configs += [
        asag_lite("asag-a-lite-s", "mobilenetv4-conv-small"),
        asag_lite("asag-a-lite-m", "mobilenetv4-conv-medium").with_changes(hidden_dim=192, ffn_dim=768),
    ]
    return {config.variant: config for config in configs}


VARIANTS: dict[str, AsagConfig] = _variants()
"""The published variants by name, e.g. `asag-a-r50-100`, and the light ones."""


_SIDES = {"asag-a-lite-s": (512, 864), "asag-a-lite-m": (640, 1088)}
"""Shorter and longest longer side of the images of light networks."""
_CROWDHUMAN, _CROWDHUMAN_SIDES = "crowdhuman", (800, 1500)
"""What the names of CrowdHuman's networks end with, and the sides of their images."""


def variant_config(name: str) -> AsagConfig:
    """Return the settings of a published variant (ConfigError names the known ones)."""
    try:
        return VARIANTS[name]
    except KeyError:
        raise ConfigError(f"unknown variant '{name}'; the variants are {', '.join(VARIANTS)}") from None


def own_preprocessing(config: AsagConfig) -> Preprocessing | None:
    """Return how images are prepared for a light variant or for CrowdHuman, or None: as they usually are."""
    crowded = config.variant.endswith(_CROWDHUMAN)
    sides = _CROWDHUMAN_SIDES if crowded else _SIDES.get(config.variant)
    if sides is None:
        return None
    shorter, longer = sides
    return Preprocessing(shorter_side=shorter, longer_side=longer)


def default_categories(config: AsagConfig) -> tuple[Category, ...]:
    """Return the classes of a checkpoint that does not say: those of its data set, else `class_0`, `class_1`,
    ..."""
    if config.num_classes == len(COCO_CATEGORIES):
        return COCO_CATEGORIES
    if config.num_classes == 1 and config.variant.endswith(_CROWDHUMAN):
        return CROWDHUMAN_CATEGORIES
    return _made_up(config.num_classes)


def are_made_up(categories: Sequence[Category]) -> bool:
    """Return whether nobody has named these classes: they are `class_0`, `class_1`, ..."""
    return tuple(categories) == _made_up(len(categories))


def _made_up(count: int) -> tuple[Category, ...]:
    return tuple(Category(id=i, name=f"class_{i}") for i in range(count))
