"""The operators that are not standard: multi-scale RoIAlign, pyramid sampling, deformable sampling, adaptive
mixing, patch NMS, anchor padding.

Each has one reference here, in plain tensor operations.  While a stage is being exported the call becomes a
node of the same name in the ONNX domain `asag`, which the exporter gives a body of standard operators and
TensorRT may have a plugin for; all are tested against the reference.  In the place of those that have kernels
for GPUs, others can be brought, see `asag_training.network.operator_choice`.  Patch NMS runs between the
stages and is never exported.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from asag_training.network import boxes as box_ops
from asag_training.network.config import Activation
from asag_training.network.layers import activation as activation_layer
from asag_training.network.operator_choice import being_exported, operators_in_use

ONNX_VERSION = 1
"""Version of the operators in the ONNX domain `asag`."""

ROI_SIZE = 7
ROI_SAMPLES = 2
_CANONICAL_SIDE = 224.0
_CANONICAL_LEVEL = 4.0


def multiscale_roi_align(features: Sequence[Tensor], boxes: Tensor, strides: Sequence[int]) -> Tensor:
    """Compute RoIAlign 7x7 with 2x2 samples per bin, each box on one level chosen by its area.

    features: one (B, h, w, C) map per level; boxes: float32 (B, Q, 4) xyxy in pixels; strides: pixels per
    cell of each level, each twice the one before.  Returns (B, Q, 7, 7, C) in the features' type.

    Level: floor(4 + log2(sqrt(area) / 224)), clamped to the levels there are (FPN).  Sampling as
    torchvision's roi_align with aligned=False: boxes are at least one cell wide, samples beyond (-1, size)
    are 0, the rest are clamped into the map.
    """
    if being_exported():
        return torch.onnx.ops.symbolic(
            "asag::MultiscaleRoIAlign",
            (*features, boxes),
            {"strides": list(strides)},
            dtype=features[0].dtype,
            shape=(boxes.shape[0], boxes.shape[1], ROI_SIZE, ROI_SIZE, features[0].shape[3]),
            version=ONNX_VERSION,
        )
    brought = operators_in_use()
    if brought is not None:
        return brought.multiscale_roi_align(features, boxes, strides)
    return _multiscale_roi_align(features, boxes, strides)


def pyramid_sample(features: Sequence[Tensor], xy: Tensor, weight: Tensor, strides: Sequence[int]) -> Tensor:
    """Sample every level at the same points and add the levels up by weight; channels go in groups.

    features: one (B, h, w, C) map per level; xy: float32 (B, Q, G, P, 2) points in pixels, P for each of the
    G groups of channels; weight: float32 (B, Q, G, P, levels); strides: pixels per cell of each level.
    Bilinear with zeros outside, cell centres at (i + 0.5) stride.  Returns (B, Q, G, P, C / G) in the
    features' type.
    """
    if being_exported():
        return torch.onnx.ops.symbolic(
            "asag::PyramidSample",
            (*features, xy, weight),
            {"strides": list(strides)},
            dtype=features[0].dtype,
            shape=(*xy.shape[:4], features[0].shape[3] // xy.shape[2]),
            version=ONNX_VERSION,
        )
    brought = operators_in_use()
    if brought is not None:
        return brought.pyramid_sample(features, xy, weight, strides)
    return _pyramid_sample(features, xy, weight, strides)


def deformable_sample(features: Sequence[Tensor], xy: Tensor, weight: Tensor) -> Tensor:
    """Sample every level at points of its own and add all of a group up by weight (Deformable DETR, 4.1).

    features: one (B, h, w, C) map per level; xy: float32 (B, Q, G, L, P, 2), P points on each of the L levels
    for each of the G groups of channels, relative to the whole map: 0 and 1 are its edges; weight: float32
    (B, Q, G, L, P).  Bilinear with zeros outside, cell centres at (i + 0.5) / size.  Returns (B, Q, C) in the
    features' type.
    """
    if being_exported():
        return torch.onnx.ops.symbolic(
            "asag::DeformableSample",
            (*features, xy, weight),
            {},
            dtype=features[0].dtype,
            shape=(*xy.shape[:2], features[0].shape[3]),
            version=ONNX_VERSION,
        )
    brought = operators_in_use()
    if brought is not None:
        return brought.deformable_sample(features, xy, weight)
    return _deformable_sample(features, xy, weight)


MIXING_ACTIVATIONS: tuple[Activation, ...] = ("gelu", "relu")
"""Those that adaptive mixing can have as a node, by the number that the node has for them."""


def adaptive_mixing(sampled: Tensor, parameters: Tensor, out_points: int, activation: Activation) -> Tensor:
    """Mix each query's samples over channels, then over points, with matrices of its own (AdaMixer, 3.2).

    sampled: (B, Q, G, P, C) for P points and C channels of G groups; parameters: (B, Q, G * (C * C + O * P)),
    for each group a matrix over channels (C, C), then one over points (O, P) for `out_points` O.  After each
    product all numbers of a query and group are normalised together, and go through the activation.
    Returns (B, Q, G * O * C).
    """
    _, _, groups, points, channels = sampled.shape
    if being_exported() and activation in MIXING_ACTIVATIONS:
        return torch.onnx.ops.symbolic(
            "asag::AdaptiveMixing",
            (sampled, parameters),
            {
                "groups": groups,
                "points": points,
                "channels": channels,
                "out_points": out_points,
                "activation": MIXING_ACTIVATIONS.index(activation),
            },
            dtype=sampled.dtype,
            shape=(sampled.shape[0], sampled.shape[1], groups * out_points * channels),
            version=ONNX_VERSION,
        )
    act = activation_layer(activation)
    shape = sampled.shape[:3]
    matrices = parameters.reshape(*shape, channels**2 + out_points * points)
    channel_mix = matrices[..., : channels**2].reshape(*shape, channels, channels)
    point_mix = matrices[..., channels**2 :].reshape(*shape, out_points, points)
    mixed = act(_normalise(sampled @ channel_mix))
    return act(_normalise(point_mix @ mixed)).flatten(2)  # type: ignore[no-any-return]


def patch_nms(
    anchors: Tensor,
    selected: Tensor,
    image_size: Tensor,
    stride: int,
    patch_size: int,
    iou_threshold: float,
    capacity: int,
    max_candidates: int,
) -> tuple[Tensor, Tensor]:
    """Run greedy NMS over square patches around the selected anchors.

    anchors: float32 (B, N, 5) cx, cy, w, h in pixels, and score; selected: bool (B, N); image_size: (B, 2)
    valid height, width; patches are `patch_size` cells of the map with `stride`.  A patch suppresses those
    scored lower (ties: the later one) whose IoU with it is over the threshold.  Only the best
    `max_candidates` selected anchors of an image are considered.

    Returns origins int64 (B, capacity, 2): x, y of the kept patches in cells, best first, moved inside the
    image, zeros beyond the last; and counts int64 (B,): how many were kept, which may exceed the capacity.
    """
    score = torch.where(selected, anchors[..., 4], -1.0)
    score, order = torch.sort(score, dim=1, descending=True, stable=True)
    score, order = score[:, :max_candidates], order[:, :max_candidates]
    centres = torch.gather(anchors[..., :2], 1, order[..., None].expand(-1, -1, 2))
    half = 0.5 * stride * patch_size
    patches = torch.cat([centres - half, centres + half], dim=-1)

    valid = score >= 0
    count = patches.shape[1]
    earlier = torch.ones(count, count, dtype=torch.bool, device=anchors.device).tril(-1)
    suppresses = (box_ops.iou(patches, patches) > iou_threshold) & earlier  # [i, j]: j would suppress i
    keep = valid
    while True:
        # Greedy NMS is the only fixpoint: the best patch is settled at once, the next ones round by round.
        settled = valid & ~(suppresses & keep[:, None, :]).any(dim=-1)
        if torch.equal(settled, keep):
            break
        keep = settled

    rank = torch.argsort((~keep).long(), dim=1, stable=True)[:, :capacity]
    origins = torch.gather(
        _patch_origins(patches, image_size, stride, patch_size), 1, rank[..., None].expand(-1, -1, 2)
    )
    origins = origins * torch.gather(keep, 1, rank)[..., None]
    missing = capacity - origins.shape[1]
    if missing > 0:
        origins = torch.nn.functional.pad(origins, (0, 0, 0, missing))
    return origins.long(), keep.sum(dim=1)


def pad_anchors(
    anchors: Tensor, keep: Tensor, image_size: Tensor, slots: Tensor, first_level: int, floor: int, cap: int
) -> tuple[Tensor, Tensor]:
    """Gather the anchors that pass into a fixed number of queries.

    anchors: float32 (B, N, 5) of all levels, cx, cy, w, h in pixels, and score; keep: bool (B, N); slots:
    (Q,), whose length is the number of queries.  If fewer than `floor` of the first `first_level` anchors are
    kept, the best-scored `floor` of those are instead, best first.  If more than `cap`, or than there are
    queries, are kept in all, the best-scored of them are, best first.

    Returns queries float32 (B, Q, 4) cxcywh in pixels, padded with boxes that are the whole image, and counts
    int64 (B,): how many are real.
    """
    if being_exported():
        queries, count = torch.onnx.ops.symbolic_multi_out(
            "asag::PadAnchors",
            (anchors, keep, image_size, slots),
            {"first_level": first_level, "floor": floor, "cap": cap},
            dtypes=(torch.float32, torch.int64),
            shapes=((anchors.shape[0], slots.shape[0], 4), (anchors.shape[0],)),
            version=ONNX_VERSION,
        )
        return queries, count
    brought = operators_in_use()
    if brought is not None:
        return brought.pad_anchors(anchors, keep, image_size, slots, first_level, floor, cap)
    return _pad_anchors(anchors, keep, image_size, slots, first_level, floor, cap)


def _normalise(x: Tensor) -> Tensor:
    """Apply LayerNorm over the last two axes, without parameters."""
    flat = x.flatten(-2)  # over one axis: not every runtime knows how to normalise over two at once
    return F.layer_norm(flat, flat.shape[-1:]).view_as(x)


def _multiscale_roi_align(features: Sequence[Tensor], boxes: Tensor, strides: Sequence[int]) -> Tensor:
    batch, queries, _ = boxes.shape
    device = boxes.device
    heights = torch.tensor([f.shape[1] for f in features], device=device)
    widths = torch.tensor([f.shape[2] for f in features], device=device)
    areas = heights * widths
    starts = torch.cumsum(areas, dim=0) - areas

    level = _roi_level(boxes, strides)  # (B, Q)
    scaled = boxes / torch.tensor(strides, dtype=torch.float32, device=device)[level][..., None]
    top_left, bottom_right = scaled[..., :2], scaled[..., 2:]
    cell = (bottom_right - top_left).clamp(min=1.0) / (ROI_SIZE * ROI_SAMPLES)
    step = torch.arange(ROI_SIZE * ROI_SAMPLES, dtype=torch.float32, device=device) + 0.5
    x = top_left[..., 0:1] + step * cell[..., 0:1]  # (B, Q, 14)
    y = top_left[..., 1:2] + step * cell[..., 1:2]

    column, weight_x = _corners(x, widths[level][..., None])  # (B, Q, 7, 4)
    row, weight_y = _corners(y, heights[level][..., None])
    image = torch.arange(batch, device=device)[:, None] * areas.sum()
    base = (starts[level] + image)[..., None, None, None, None]
    row_start = row[:, :, :, None, :, None] * widths[level][..., None, None, None, None]
    index = base + row_start + column[:, :, None, :, None, :]  # (B, Q, 7, 7, 4, 4)
    weight = weight_y[:, :, :, None, :, None] * weight_x[:, :, None, :, None, :] / ROI_SAMPLES**2

    cells = torch.cat([f.flatten(1, 2) for f in features], dim=1).flatten(0, 1)  # (B * cells, C)
    taps = (2 * ROI_SAMPLES) ** 2
    # The weighted sum of rows in one operation: neither pass ever writes the (bins, taps, C) rows themselves.
    out = torch.nn.functional.embedding_bag(
        index.reshape(-1, taps),
        cells,
        mode="sum",
        per_sample_weights=weight.reshape(-1, taps).to(cells.dtype),
    )
    return out.reshape(batch, queries, ROI_SIZE, ROI_SIZE, cells.shape[-1])


def _roi_level(boxes: Tensor, strides: Sequence[int]) -> Tensor:
    finest = strides[0].bit_length() - 1
    side = box_ops.area(boxes).sqrt()
    level = torch.floor(_CANONICAL_LEVEL + torch.log2(side / _CANONICAL_SIDE) + 1e-6)
    return level.clamp(finest, finest + len(strides) - 1).long() - finest


def _corners(position: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two cells either side of each sample along one axis, and their weights.

    position: (B, Q, 14); size: (B, Q, 1) cells.  Returns index int64 and weight, both (B, Q, 7, 4): for every
    bin its two samples' lower and upper cells.
    """
    inside = (position >= -1.0) & (position <= size)
    last = (size - 1).float()
    position = torch.minimum(position.clamp(min=0.0), last)
    low = position.floor()
    high = torch.minimum(low + 1, last)
    fraction = position - low
    index = torch.stack([low, high], dim=-1).long()
    weight = torch.stack([1 - fraction, fraction], dim=-1) * inside[..., None]
    shape = (*position.shape[:-1], ROI_SIZE, 2 * ROI_SAMPLES)
    return index.reshape(shape), weight.reshape(shape)


def _pyramid_sample(features: Sequence[Tensor], xy: Tensor, weight: Tensor, strides: Sequence[int]) -> Tensor:
    batch, queries, groups, points, _ = xy.shape
    total: Tensor | None = None
    for i, (feature, stride) in enumerate(zip(features, strides, strict=True)):
        height, width, channels = feature.shape[1:]
        maps = feature.permute(0, 3, 1, 2).reshape(batch * groups, channels // groups, height, width)
        extent = torch.tensor([width * stride, height * stride], dtype=torch.float32, device=xy.device)
        grid = (xy / extent * 2 - 1).transpose(1, 2).reshape(batch * groups, queries, points, 2)
        # Coordinates in half precision would be off by half a cell on a large map, hence float32 maps.
        sampled = torch.nn.functional.grid_sample(
            maps.float(), grid, padding_mode="zeros", align_corners=False
        )
        weighted = sampled * weight[..., i].transpose(1, 2).reshape(batch * groups, 1, queries, points)
        total = weighted if total is None else total + weighted
    assert total is not None, "a pyramid has at least one level"
    return total.reshape(batch, groups, -1, queries, points).permute(0, 3, 1, 4, 2).to(features[0].dtype)


def _deformable_sample(features: Sequence[Tensor], xy: Tensor, weight: Tensor) -> Tensor:
    batch, queries, groups, _, points, _ = xy.shape
    total: Tensor | None = None
    for i, feature in enumerate(features):
        height, width, channels = feature.shape[1:]
        maps = feature.permute(0, 3, 1, 2).reshape(batch * groups, channels // groups, height, width)
        grid = (xy[:, :, :, i] * 2 - 1).transpose(1, 2).reshape(batch * groups, queries, points, 2)
        sampled = F.grid_sample(maps.float(), grid, padding_mode="zeros", align_corners=False)
        weighted = sampled * weight[:, :, :, i].transpose(1, 2).reshape(batch * groups, 1, queries, points)
        total = weighted.sum(dim=-1) if total is None else total + weighted.sum(dim=-1)
    assert total is not None, "a pyramid has at least one level"
    return total.reshape(batch, -1, queries).transpose(1, 2).to(features[0].dtype)


def _patch_origins(patches: Tensor, image_size: Tensor, stride: int, patch_size: int) -> Tensor:
    """Turn (B, N, 4) xyxy pixels into (B, N, 2) x, y of the patch in whole cells, inside the image where it
    fits."""
    centres = (patches[..., :2] + patches[..., 2:]) / 2 / stride
    origins = torch.floor(centres - patch_size / 2)
    cells = torch.ceil(image_size.float().flip(-1) / stride)[:, None]  # width, height
    return torch.minimum(origins, cells - patch_size).clamp(min=0)


def _pad_anchors(
    anchors: Tensor, keep: Tensor, image_size: Tensor, slots: Tensor, first_level: int, floor: int, cap: int
) -> tuple[Tensor, Tensor]:
    batch, total, _ = anchors.shape
    score = anchors[..., 4]
    best_first = torch.argsort(score[:, :first_level], dim=1, descending=True, stable=True)
    rank = torch.argsort(best_first, dim=1)
    short = keep[:, :first_level].sum(dim=1, keepdim=True) < floor
    first_keep = torch.where(short, rank < floor, keep[:, :first_level])
    keep = torch.cat([first_keep, keep[:, first_level:]], dim=1)
    position = torch.arange(total, device=anchors.device).expand(batch, -1)
    first_position = torch.where(short, rank, position[:, :first_level])
    position = torch.cat([first_position, position[:, first_level:]], dim=1)

    kept = keep.sum(dim=1)
    limit = torch.sym_min(cap, len(slots))  # type: ignore[no-untyped-call]
    over = (kept > limit)[:, None]
    key = torch.where(over, score, -position.float()).masked_fill(~keep, -torch.inf)
    order = torch.argsort(key, dim=1, descending=True, stable=True)[:, : len(slots)]
    chosen = torch.gather(anchors[..., :4], 1, order[..., None].expand(-1, -1, 4))
    missing = len(slots) - chosen.shape[1]
    if missing > 0:
        chosen = torch.nn.functional.pad(chosen, (0, 0, 0, missing))
    count = kept.clamp(max=limit)
    real = slots < count[:, None]
    filler = box_ops.whwh(image_size) * torch.tensor([0.5, 0.5, 1.0, 1.0], device=anchors.device)
    return torch.where(real[..., None], chosen, filler), count
