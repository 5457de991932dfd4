"""The network's forward pass with gradients, for training and for losses in evaluation mode.

It does in a straight line what `asag_deploy.loop.probing` decides step by step, keeps what every level
predicted for the losses, and runs all parallel decoders.  In training, every level is probed on every image,
on patches that no anchor asked for as well (`asag_training.run.patch_selection`).  Their anchors score 0, so
they reach neither the decoder nor the next level; but for patches that stand in for those not yet asked for.

B images, K patches per image, A anchors per patch, Q queries, N denoising queries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from asag_deploy.bundle.manifest import Probing
from asag_deploy.errors import ConfigError
from asag_training.losses.network_output import LevelOutput, NetworkOutput
from asag_training.losses.targets import Targets
from asag_training.network.anchor_generator import FIRST_LEVEL_PATCHES, QUADRANTS
from asag_training.network.config import AsagConfig
from asag_training.network.layers import padding_blocked
from asag_training.network.model import Asag, HeadOutput
from asag_training.network.operators import pad_anchors, patch_nms
from asag_training.network.pyramid import map_of
from asag_training.network.stage_plan import probing_plan
from asag_training.run.denoising import make_denoising
from asag_training.run.patch_selection import P6_FLIPS, TrainingPatches, fill_up, training_patches
from asag_training.settings import TrainingSettings


def training_pass(
    model: Asag,
    image: Tensor,
    image_size: Tensor,
    *,
    targets: Sequence[Targets] = (),
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
    plan = probing_plan(model.config, levels)
    chosen: dict[str, TrainingPatches] = {}
    flips: tuple[tuple[bool, bool], ...] = ()
    generates = settings is None or epoch >= settings.target_patch_epochs
    if settings is not None:
        if len(targets) != len(image_size):
            raise ConfigError(f"training needs the targets of all {len(image_size)} images of the batch")
        sizes = [(height, width) for height, width in image_size.tolist()]
        strides: dict[str, int] = {level.level: level.stride for level in plan.levels}
        chosen = training_patches(
            targets,
            sizes,
            strides,
            model.config,
            settings.min_patches,
            generator,
            all_targets=settings.all_target_patches and not generates,
        )
        flips = P6_FLIPS[: settings.min_patches]
        # What convolutions on a CPU and on tensor cores like best, and what the rest of the network reads.
        image = image.contiguous(memory_format=torch.channels_last)
    features = _features(model, image, image_size, autocast)
    predicted = _predict_anchors(model, features, image_size, plan, flips, chosen, generates)
    queries, valid = _queries(model.config, predicted, image_size)
    extra = (
        None if settings is None else make_denoising(targets, queries, valid, image_size, settings, generator)
    )
    boxes = queries if extra is None else torch.cat([extra.boxes, queries], dim=1)
    blocked = padding_blocked(valid) if extra is None else extra.blocked
    proposals = model.rpn(features, boxes, image_size, blocked)
    heads: dict[str, HeadOutput] = {}
    for head in model.config.head_names:
        layers = model.decode_layers(head, features, proposals, blocked, image_size)
        heads |= dict(zip(model.config.layer_names(head), layers, strict=True))
    return NetworkOutput(
        image_size=image_size,
        levels=tuple(predicted.levels),
        anchors=queries,
        valid=valid,
        relation=HeadOutput(proposals.logits, proposals.boxes),
        heads=heads,
        denoising=None if extra is None else extra.denoising,
    )


class _Anchors(NamedTuple):
    """The anchors of all levels that were run, one list entry for each."""

    levels: list[LevelOutput]
    """What was predicted: P6, P5, and the probed levels."""
    anchors: list[Tensor]
    """(B, N, 5) cx, cy, w, h in pixels, and score; P5 and P6 are the first entry."""
    passing: list[Tensor]
    """bool (B, N): scored high enough for the decoder, and not replaced by those of a deeper level."""


def _features(model: Asag, image: Tensor, image_size: Tensor, autocast: torch.dtype | None) -> list[Tensor]:
    if autocast is None:
        return model.features(image, image_size)
    with torch.autocast(image.device.type, dtype=autocast):
        features = model.features(image, image_size)
    return [feature.float() for feature in features]


def _predict_anchors(
    model: Asag,
    features: Sequence[Tensor],
    image_size: Tensor,
    plan: Probing,
    flips: tuple[tuple[bool, bool], ...],
    chosen: Mapping[str, TrainingPatches],
    generates: bool,
) -> _Anchors:
    """Predict the first level, then the levels of `plan` for as long as there are patches.

    flips: of the P6 patch in training, the first being none.  chosen: by level, the patches that no anchor
    asks for; empty in evaluation mode.  generates: whether anchors may ask for patches; while they may not,
    none gives way to a deeper level's.
    """
    config, generator = model.config, model.anchor_generator
    first = generator.first_level(map_of("P5", features, model.config), image_size, flips=flips[1:])
    p5, p6 = first.raw[:, : len(QUADRANTS)], first.raw[:, len(QUADRANTS) :]
    found = _Anchors(
        levels=[
            LevelOutput("P6", p6, None, _all_real(p6), flips or None),
            LevelOutput("P5", p5, None, _all_real(p5)),
        ],
        anchors=[first.anchors],
        passing=[generator.passes(first.anchors)],
    )
    maps: dict[str, Tensor] = {level: map_of(level, features, model.config) for level in ("P4", "P3")}
    for level in plan.levels:
        anchors, feature = found.anchors[-1], maps[level.level]
        selected = generator.select(anchors, level.level) & generates
        origins, generated = patch_nms(
            anchors,
            selected,
            image_size,
            level.stride,
            plan.patch_size,
            plan.patch_nms_iou,
            level.capacity,
            plan.max_candidates,
        )
        patches = generated
        if chosen:
            spare, given, given_count = chosen[level.level]
            if given is not None and given_count is not None:
                origins, generated = given.to(origins.device), given_count.to(origins.device)
            origins, patches = fill_up(origins, generated, spare.to(origins.device))
        elif not patches.any():
            break
        if config.replace_anchors:
            found.passing[-1] &= ~selected
        origins = origins[:, : max(int(patches.max()), 1)]
        map_size = torch.tensor(feature.shape[1:3], device=feature.device)
        probed = generator.probe(level.level, feature, map_size, image_size, origins, generated)
        real = torch.arange(origins.shape[1], device=origins.device) < patches[:, None]
        found.levels.append(LevelOutput(level.level, probed.raw, origins, real))
        found.anchors.append(probed.anchors)
        found.passing.append(generator.passes(probed.anchors))
    return found


def _queries(config: AsagConfig, found: _Anchors, image_size: Tensor) -> tuple[Tensor, Tensor]:
    """Return the anchors for the decoder: (B, Q, 4) cxcywh in pixels, and bool (B, Q) which are real."""
    counts = torch.stack([passing.sum(dim=1) for passing in found.passing])
    counts[0] = counts[0].clamp(min=config.anchor_floor)
    most = min(max(int(counts.sum(dim=0).max()), 1), config.anchor_cap)
    slots = torch.arange(most, device=counts.device)
    queries, count = pad_anchors(
        torch.cat(found.anchors, dim=1),
        torch.cat(found.passing, dim=1),
        image_size,
        slots,
        FIRST_LEVEL_PATCHES * config.first_level_anchors,
        config.anchor_floor,
        config.anchor_cap,
    )
    return queries, slots < count[:, None]


def _all_real(raw: Tensor) -> Tensor:
    return torch.ones(raw.shape[:2], dtype=torch.bool, device=raw.device)
