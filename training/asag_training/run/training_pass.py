"""The network's forward pass with gradients, for training and for evaluation-mode losses.

The loop is the one of `asag_deploy.loop.probing`; what differs is the network that it drives.  The stages
here keep what they predicted for the losses, and run all parallel decoders.  In training they also give every
level patches that no anchor asked for (`asag_training.run.patch_selection`), whose anchors score 0 and so
reach neither the decoder nor the next level, and put denoising queries before the anchors.

B images, K patches per image, A anchors per patch, Q queries, N denoising queries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from asag_deploy.bundle.manifest import Level, ProbeLevel, Probing
from asag_deploy.errors import ConfigError
from asag_deploy.loop.probing import detect
from asag_deploy.loop.stages import PATCHES_COLUMN, LevelOutputs
from asag_deploy.loop.stopping import StopRule
from asag_training.losses.network_output import LevelOutput, NetworkOutput, Targets
from asag_training.network.anchor_generator import QUADRANTS
from asag_training.network.config import MAIN_HEAD
from asag_training.network.layers import padding_blocked
from asag_training.network.model import Asag, HeadOutput
from asag_training.network.stage_plan import probing_plan
from asag_training.network.stages import (
    FEATURES,
    BackboneStage,
    DecoderStage,
    ProbeStage,
    SelectingStage,
    StageModule,
    TorchNetwork,
)
from asag_training.run.denoising import DenoisingQueries, make_denoising
from asag_training.run.patch_selection import P6_FLIPS, fill_up, spare_patches
from asag_training.settings import TrainingSettings

Denoise = Callable[[Tensor, Tensor, Tensor], DenoisingQueries | None]
"""Anchors (B, Q, 4), which are real (B, Q), image_size (B, 2) -> the queries to put before them."""


def run_network(
    model: Asag,
    image: Tensor,
    image_size: Tensor,
    *,
    targets: list[Targets] | None = None,
    settings: TrainingSettings | None,
    epoch: int,
    generator: torch.Generator | None,
    levels: str = "p3-p6",
    autocast: torch.dtype | None = None,
) -> NetworkOutput:
    """Run a batch and keep all that the losses look at.

    image: normalised RGB, float32 (B, 3, H, W); image_size: int (B, 2) valid heights and widths in pixels.
    With `settings` it is a training pass and needs `targets`, one for each image; `epoch` counts from 0 and
    `generator` (None: torch's own) makes the random choices.  Without, it computes what inference computes.
    `levels` is the manual stop, `autocast` the type that backbone and neck compute in if not their own.

    Raises ConfigError for a training pass without targets, or an unknown manual stop.
    """
    probing = probing_plan(model.config, levels)
    record = Recording(image_size=image_size)
    if settings is None:
        extras, rule = None, StopRule()
    else:
        if targets is None or len(targets) != len(image_size):
            raise ConfigError(f"training needs the targets of all {len(image_size)} images of the batch")
        extras = _extras(model, probing, image_size, targets, settings, epoch, generator)
        rule = StopRule(min_selected=0)  # every level is trained on every image
    network = TrainingNetwork(model, probing, record, extras, autocast)
    detect(network, probing, rule, image, image_size.cpu().numpy())
    return record.output()


@dataclass(kw_only=True)
class Recording:
    """What one pass leaves for the losses, filled in stage by stage."""

    image_size: Tensor
    levels: list[LevelOutput] = field(default_factory=list)
    decoded: dict[str, Any] = field(default_factory=dict)
    """The fields of `NetworkOutput` that the decoder stage knows."""

    def output(self) -> NetworkOutput:
        """The finished recording."""
        return NetworkOutput(image_size=self.image_size, levels=tuple(self.levels), **self.decoded)


@dataclass(kw_only=True)
class TrainingExtras:
    """What a training pass does beyond an inference pass."""

    spare: Mapping[str, Tensor]
    """By level, origins (B, n, 2) of the patches that may fill it up."""
    follow_anchors: bool
    """Whether there are generated patches; while there are none, no anchor gives way to a deeper level's."""
    flips: Sequence[tuple[bool, bool]]
    """Of the P6 patch, the first being none."""
    denoise: Denoise
    generated: dict[str, Tensor] = field(default_factory=dict)
    """By level, how many patches of each image (B,) are generated; noted as they are chosen."""

    def fill(self, level: Level, origins: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """What `Network.select` returns for the next `level`, with its patches filled up."""
        self.generated[level] = counts[:, PATCHES_COLUMN]
        origins, total = fill_up(origins, self.generated[level], self.spare[level])
        filled = counts.clone()
        filled[:, PATCHES_COLUMN] = total
        return origins, filled


class TrainingNetwork(TorchNetwork):
    """The stages of one pass over one batch."""

    gradients = True

    def __init__(
        self,
        model: Asag,
        probing: Probing,
        record: Recording,
        extras: TrainingExtras | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        levels = [level.level for level in probing.levels]
        first, *following = [*levels, None]
        stages: list[StageModule] = [_Backbone(model, first, record, extras, autocast)]
        for level, after in zip(levels, following, strict=True):
            stages.append(_Probe(model, level, after, record, extras))
        stages.append(_Decoder(model, levels, record, extras))
        super().__init__(stages, record.image_size.device)
        self._extras = extras

    def select(
        self, probing: Probing, level: ProbeLevel, before: LevelOutputs, image_size: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Patch NMS; in training the level then gets more patches than the anchors ask for."""
        origins, counts = super().select(probing, level, before, image_size)
        return (origins, counts) if self._extras is None else self._extras.fill(level.level, origins, counts)


class _FillingStage(SelectingStage):
    """A stage whose anchors, in the first epochs of training, ask for nothing."""

    extras: TrainingExtras | None

    def choose(self, anchors: Tensor) -> tuple[Tensor, ...]:
        chosen = super().choose(anchors)
        if self.extras is None or self.extras.follow_anchors or self.next_level is None:
            return chosen
        selected, counts = chosen
        _, _, passing, _ = counts.unbind(dim=1)
        nothing = torch.zeros_like(passing)
        return torch.zeros_like(selected), torch.stack([nothing, nothing, passing, passing], dim=1)


class _Backbone(_FillingStage, BackboneStage):
    """Backbone, neck and first level; records P6 and P5."""

    def __init__(
        self,
        model: Asag,
        following: Level | None,
        record: Recording,
        extras: TrainingExtras | None,
        autocast: torch.dtype | None,
    ) -> None:
        super().__init__(model, following)
        self.record, self.extras, self.autocast = record, extras, autocast

    def forward(self, image: Tensor, image_size: Tensor) -> tuple[Tensor, ...]:
        features = self._features(image)
        flips = self.extras.flips if self.extras is not None else ()
        prediction = self.model.anchor_generator.first_level(features[-1], image_size, flips=flips[1:])
        p5, p6 = prediction.raw[:, : len(QUADRANTS)], prediction.raw[:, len(QUADRANTS) :]
        self.record.levels += [
            LevelOutput("P6", p6, None, _all_real(p6), tuple(flips) or None),
            LevelOutput("P5", p5, None, _all_real(p5)),
        ]
        return (*features, prediction.anchors, *self.choose(prediction.anchors))

    def _features(self, image: Tensor) -> list[Tensor]:
        if self.extras is not None:
            # What the convolutions of a CPU and of tensor cores like best, and what the other stages read.
            image = image.contiguous(memory_format=torch.channels_last)
        if self.autocast is None:
            return self.model.features(image)
        with torch.autocast(image.device.type, dtype=self.autocast):
            features = self.model.features(image)
        return [feature.float() for feature in features]


class _Probe(_FillingStage, ProbeStage):
    """One probed level; records it, and lets no anchors through but those of generated patches."""

    def __init__(
        self,
        model: Asag,
        level: Level,
        following: Level | None,
        record: Recording,
        extras: TrainingExtras | None,
    ) -> None:
        super().__init__(model, level, following)
        self.record, self.extras = record, extras

    def forward(
        self,
        feature: Tensor,
        feature_size: Tensor,
        image_size: Tensor,
        patches: Tensor,
        patch_count: Tensor,
        slots: Tensor,
    ) -> tuple[Tensor, ...]:
        origins = torch.index_select(patches, 1, slots)
        generated = patch_count if self.extras is None else self.extras.generated[self.level]
        generator = self.model.anchor_generator
        prediction = generator.probe(self.level, feature, feature_size, image_size, origins, generated)
        real = slots < patch_count[:, None]
        self.record.levels.append(LevelOutput(self.level, prediction.raw, origins, real))
        return (prediction.anchors, *self.choose(prediction.anchors))


class _Decoder(DecoderStage):
    """Relation block and all parallel decoders, on the denoising queries and the anchors; records them."""

    outputs = ("anchors", "anchor_count")

    def __init__(
        self, model: Asag, levels: Sequence[Level], record: Recording, extras: TrainingExtras | None
    ) -> None:
        super().__init__(model, MAIN_HEAD, levels)
        self.record, self.extras = record, extras

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(self.inputs, tensors, strict=True))
        features, image_size = [named[name] for name in FEATURES], named["image_size"]
        queries, count = self.queries(named)
        valid = named["query_slots"] < count[:, None]

        extra = None if self.extras is None else self.extras.denoise(queries, valid, image_size)
        boxes = queries if extra is None else torch.cat([extra.boxes, queries], dim=1)
        blocked = padding_blocked(valid) if extra is None else extra.blocked
        proposals = self.model.rpn(features, boxes, image_size, blocked)
        heads: dict[str, HeadOutput] = {}
        for head in self.model.config.head_names:
            layers = self.model.decode_layers(head, features, proposals, blocked, image_size)
            heads |= dict(zip(self.model.config.layer_names(head), layers, strict=True))
        self.record.decoded = {
            "anchors": queries,
            "valid": valid,
            "relation": HeadOutput(proposals.logits, proposals.boxes),
            "heads": heads,
            "denoising": None if extra is None else extra.denoising,
        }
        return (queries, count)


def _extras(
    model: Asag,
    probing: Probing,
    image_size: Tensor,
    targets: Sequence[Targets],
    settings: TrainingSettings,
    epoch: int,
    generator: torch.Generator | None,
) -> TrainingExtras:
    sizes = [(height, width) for height, width in image_size.tolist()]
    strides: dict[str, int] = {level.level: level.stride for level in probing.levels}
    spare = spare_patches(targets, sizes, strides, model.config, settings.min_patches, generator)

    def denoise(anchors: Tensor, valid: Tensor, image_size: Tensor) -> DenoisingQueries | None:
        return make_denoising(targets, anchors, valid, image_size, settings, generator)

    return TrainingExtras(
        spare={level: origins.to(image_size.device) for level, origins in spare.items()},
        follow_anchors=epoch >= settings.target_patch_epochs,
        flips=P6_FLIPS[: settings.min_patches],
        denoise=denoise,
    )


def _all_real(raw: Tensor) -> Tensor:
    return torch.ones(raw.shape[:2], dtype=torch.bool, device=raw.device)
