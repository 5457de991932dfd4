"""Denoising queries: noised copies of the objects that the decoders learn to put right (DN-DETR, CVPR 2022).

An image's copies come in groups of one for each object.  Groups do not see each other, and the queries made
from anchors see none of the copies: they would read the answer off them.  Queries carry no labels, so there
is nothing but boxes to noise.

B images, T objects, N denoising queries, Q anchors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from asag_training.losses.network_output import Denoising
from asag_training.losses.targets import Targets
from asag_training.network import boxes as box_ops
from asag_training.network.layers import padding_blocked
from asag_training.run.patch_selection import uniform
from asag_training.settings import TrainingSettings

_WHOLE_IMAGE = (0.5, 0.5, 1.0, 1.0)


class DenoisingQueries(NamedTuple):
    """The queries in front of the anchors."""

    boxes: Tensor
    """(B, N, 4) cxcywh in pixels; queries that only fill up are the whole image."""
    blocked: Tensor
    """bool (B, N + Q, N + Q): which query (row) must not see which (column)."""
    denoising: Denoising


class Copies(NamedTuple):
    """Which object each query of one image copies."""

    target: Tensor
    """int64 (N,), -1 for queries that only fill up."""
    group: Tensor
    """int64 (N,); the ones that fill up are a group of their own."""


def make_denoising(
    targets: Sequence[Targets],
    anchors: Tensor,
    valid: Tensor,
    image_size: Tensor,
    settings: TrainingSettings,
    generator: torch.Generator | None,
) -> DenoisingQueries | None:
    """Make the denoising queries of a batch, or None if the settings ask for none.

    anchors (B, Q, 4), of which `valid` (B, Q) are real, and image_size (B, 2) say what they are put before.
    """
    if settings.denoising_queries == 0:
        return None
    images = [_of_image(target, settings, generator) for target in targets]
    device = anchors.device
    relative = torch.stack([boxes for boxes, _ in images]).to(device)
    group = torch.stack([copies.group for _, copies in images]).to(device)
    target = torch.stack([copies.target for _, copies in images]).to(device)
    return DenoisingQueries(
        boxes=relative * box_ops.whwh(image_size),
        blocked=denoising_blocked(group, valid),
        denoising=Denoising(count=settings.denoising_queries, target=target),
    )


def assign_copies(objects: int, queries: int, generator: torch.Generator | None) -> Copies:
    """Repeat the objects as whole groups.  If there are more objects than queries, use one group of randomly
    chosen objects."""
    if objects > queries:
        chosen = torch.argsort(uniform((objects,), generator))[:queries]
        return Copies(chosen, torch.zeros(queries, dtype=torch.int64))
    groups = queries // objects if objects else 0
    query = torch.arange(queries)
    filled = query < groups * objects
    per_group = max(objects, 1)
    target = torch.where(filled, query % per_group, -1)
    return Copies(target, torch.where(filled, query // per_group, groups))


def add_box_noise(boxes: Tensor, draw: Tensor, scale: float) -> Tensor:
    """Add noise to boxes (N, 4) cxcywh relative to the image; draw (N, 4) is in [-1, 1].

    Centres move by up to `scale` times half the size, sizes change by up to `scale` times the size; all is
    clamped to 0..1.
    """
    size = boxes[:, 2:]
    reach = torch.cat([size / 2, size], dim=-1)
    return (boxes + draw * reach * scale).clamp(0.0, 1.0)


def denoising_blocked(group: Tensor, valid: Tensor) -> Tensor:
    """Return who must not see whom: group (B, N) of the copies, valid (B, Q) of the anchors -> (B, N + Q, N +
    Q).

    A copy sees its own group and the real anchors.  An anchor sees no copy, and of the anchors what it sees
    without any.
    """
    batch, copies = group.shape
    anchors = valid.shape[1]
    other_group = group[:, :, None] != group[:, None, :]
    padding = ~valid[:, None, :].expand(batch, copies, anchors)
    every_copy = torch.ones(batch, anchors, copies, dtype=torch.bool, device=valid.device)
    from_copies = torch.cat([other_group, padding], dim=2)
    from_anchors = torch.cat([every_copy, padding_blocked(valid)], dim=2)
    return torch.cat([from_copies, from_anchors], dim=1)


def _of_image(
    target: Targets, settings: TrainingSettings, generator: torch.Generator | None
) -> tuple[Tensor, Copies]:
    """Return boxes (N, 4) cxcywh relative to the image, and what they copy, both on the CPU."""
    objects = target.boxes.detach().float().cpu()
    copies = assign_copies(len(objects), settings.denoising_queries, generator)
    whole = torch.tensor(_WHOLE_IMAGE)
    original = torch.cat([objects, whole[None]])[copies.target]  # -1, which only fills up, is the last
    draw = uniform((settings.denoising_queries, 4), generator) * 2 - 1
    noised = add_box_noise(original, draw, settings.box_noise)
    return torch.where((copies.target >= 0)[:, None], noised, whole), copies
