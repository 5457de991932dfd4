"""Which patches a level is trained on (paper, section 4.2, 'Training ASAG').

A level that is probed seldom would learn little, so every image trains at least a few patches of P4 and of
P3: the *generated* ones, where anchors asked for a closer look; where these are too few, *ground-truth*
patches, which hold a small object; and where those are too few as well, *random* ones.  Only anchors of
generated patches go on to the decoder; in the first epoch, if the settings say so, those of all ground-truth
patches do in their place.

Origins are x, y of a patch's top left cell, int64 (..., 2), on the map of the level in question.  Random
draws are made where the generator lives, so that a run is the same on every device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from asag_training.losses.targets import Targets
from asag_training.network import boxes as box_ops
from asag_training.network.config import AsagConfig


class TrainingPatches(NamedTuple):
    """The patches of one level that no anchor has asked for."""

    spare: Tensor
    """Origins (B, n, 2) of those that fill an image up to n patches, on the CPU."""
    given: Tensor | None = None
    """Origins (B, K, 2), zeros beyond the last and K no less than n, of those that are taken as if anchors
    had asked for them; None where anchors do."""
    given_count: Tensor | None = None
    """int64 (B,): how many each image has."""


P6_FLIPS = ((False, False), (True, False), (False, True), (True, True))
"""How the one P6 patch becomes several in training: (horizontally, vertically) flipped; the first is not."""


def is_small(boxes: Tensor, stride: int, patch_size: int) -> Tensor:
    """Return which boxes (T, 4) cxcywh in pixels a patch is for, bool (T,): under half a patch wide and
    high."""
    half = stride * patch_size / 2
    return (boxes[:, 2] < half) & (boxes[:, 3] < half)


def centrality(boxes: Tensor) -> Tensor:
    """Score boxes (T, 4) cxcywh -> (T,): the nearer a box is to all the others the higher (minus squared
    distances)."""
    centres = boxes[:, :2]
    return -(centres[:, None] - centres[None]).square().sum(dim=(1, 2))


def group_boxes(boxes: Tensor, iou_threshold: float) -> Tensor:
    """Choose one box for each group of overlapping ones: (T, 4) cxcywh -> indices int64 (n,), most central
    first.

    Greedy NMS scored by `centrality`: a box that overlaps a more central one by an IoU over the threshold
    joins its group.
    """
    order = torch.argsort(centrality(boxes), descending=True, stable=True)
    corners = box_ops.cxcywh_to_xyxy(boxes[order])
    joins = (box_ops.iou(corners, corners) > iou_threshold).tril(-1)  # [i, j]: i would join j's group
    leads = torch.ones(len(boxes), dtype=torch.bool, device=boxes.device)
    for i in range(len(boxes)):
        leads[i] = not bool((joins[i] & leads).any())
    return order[leads]


def last_origin(image_size: tuple[int, int], stride: int, patch_size: int) -> Tensor:
    """Return the right- and lowermost origin of a patch inside the image, (2,); image_size is height,
    width."""
    height, width = image_size
    return torch.tensor([max(-(-side // stride) - patch_size, 0) for side in (width, height)])


def shifted_origins(
    boxes: Tensor,
    image_size: tuple[int, int],
    stride: int,
    patch_size: int,
    generator: torch.Generator | None,
) -> Tensor:
    """Draw a random patch around each small box: (T, 4) cxcywh in pixels, on the CPU -> origins (T, 2).

    All places at which the patch is inside the image and the box wholly inside the patch are equally likely.
    """
    corners = box_ops.cxcywh_to_xyxy(boxes) / stride
    most = torch.minimum(corners[:, :2].floor(), last_origin(image_size, stride, patch_size)).clamp(min=0)
    least = torch.minimum((corners[:, 2:] - patch_size).ceil().clamp(min=0), most)
    draw = uniform(most.shape, generator)
    return (least + (draw * (most - least + 1)).floor()).long()


def random_origins(
    count: int, image_size: tuple[int, int], stride: int, patch_size: int, generator: torch.Generator | None
) -> Tensor:
    """Draw `count` patches anywhere inside the image, all places equally likely -> origins (count, 2)."""
    places = last_origin(image_size, stride, patch_size) + 1
    return (uniform((count, 2), generator) * places).floor().long()


def leaders(boxes: Tensor, stride: int, config: AsagConfig) -> Tensor:
    """Choose the small objects that a level's ground-truth patches are made for, one of each group: (T, 4)
    cxcywh in pixels -> (n, 4)."""
    small = boxes[is_small(boxes, stride, config.patch_size)]
    return small[group_boxes(small, config.patch_nms_iou)]


def spare_origins(
    boxes: Tensor,
    image_size: tuple[int, int],
    stride: int,
    config: AsagConfig,
    count: int,
    generator: torch.Generator | None,
) -> Tensor:
    """Choose the patches that may fill up one level of one image: origins (count, 2).

    Ground-truth patches of the objects `boxes` (T, 4), cxcywh in pixels, in random order; then random ones.
    """
    led = leaders(boxes, stride, config)
    shuffled = led[torch.argsort(uniform((len(led),), generator))][:count]
    ground_truth = shifted_origins(shuffled, image_size, stride, config.patch_size, generator)
    missing = count - len(ground_truth)
    return torch.cat(
        [ground_truth, random_origins(missing, image_size, stride, config.patch_size, generator)]
    )


def training_patches(
    targets: Sequence[Targets],
    image_sizes: Sequence[tuple[int, int]],
    strides: Mapping[str, int],
    config: AsagConfig,
    count: int,
    generator: torch.Generator | None,
    *,
    all_targets: bool = False,
) -> dict[str, TrainingPatches]:
    """Choose the patches of every level in `strides` and every image; by level.

    The `spare_origins`; or, with `all_targets`, the ground-truth patches of all groups of objects as if they
    had been asked for, and random ones to spare.
    """
    in_pixels = [
        target.boxes.detach().float().cpu() * torch.tensor([width, height, width, height])
        for target, (height, width) in zip(targets, image_sizes, strict=True)
    ]
    images = list(zip(in_pixels, image_sizes, strict=True))
    if not all_targets:
        return {
            level: TrainingPatches(
                torch.stack(
                    [spare_origins(boxes, size, stride, config, count, generator) for boxes, size in images]
                )
            )
            for level, stride in strides.items()
        }
    found = {}
    for level, stride in strides.items():
        side = config.patch_size
        origins = [
            shifted_origins(leaders(boxes, stride, config), size, stride, side, generator)
            for boxes, size in images
        ]
        given = torch.zeros((len(images), max([count, *map(len, origins)]), 2), dtype=torch.int64)
        for row, of_image in zip(given, origins, strict=True):
            row[: len(of_image)] = of_image
        found[level] = TrainingPatches(
            spare=torch.stack([random_origins(count, size, stride, side, generator) for size in image_sizes]),
            given=given,
            given_count=torch.tensor([len(of_image) for of_image in origins]),
        )
    return found


def fill_up(origins: Tensor, generated: Tensor, spare: Tensor) -> tuple[Tensor, Tensor]:
    """Put spare patches after the generated ones until there are as many as spares.

    origins (B, K, 2), of which the first `generated` (B,) count, and spare (B, n, 2) -> origins (B, K, 2) and
    how many count (B,): the generated ones, but at least n (K, should that be less).
    """
    capacity, spares = origins.shape[1], spare.shape[1]
    slot = torch.arange(capacity, device=origins.device)
    which = (slot - generated[:, None]).clamp(0, spares - 1)
    filler = torch.gather(spare, 1, which[..., None].expand(-1, -1, 2))
    filled = torch.where((slot < generated[:, None])[..., None], origins, filler)
    total = generated.clamp(min=min(spares, capacity))
    return filled * (slot < total[:, None])[..., None], total


def uniform(shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
    """Draw float32 numbers in [0, 1), on the CPU whatever the generator's device (None: torch's own
    generator)."""
    device = "cpu" if generator is None else generator.device
    return torch.rand(tuple(shape), generator=generator, device=device).cpu()
