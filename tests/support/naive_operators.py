"""The `asag` operators as anybody would first write them, one number at a time, and inputs to try them on.

Slow and plain on purpose: what they are compared with has no loops.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

BINS, SAMPLES = 7, 2


def roi_align(features: Sequence[NDArray[Any]], boxes: Floats, strides: Sequence[int]) -> NDArray[np.float64]:
    """Features (B, h, w, C) of each level, boxes (B, Q, 4) xyxy in pixels -> (B, Q, 7, 7, C)."""
    batch, queries = boxes.shape[:2]
    out = np.zeros((batch, queries, BINS, BINS, features[0].shape[-1]))
    for image in range(batch):
        for query in range(queries):
            box = boxes[image, query].astype(np.float64)
            level = roi_level(box, strides)
            out[image, query] = roi_align_one(features[level][image], box / strides[level])
    return out


def roi_level(box: NDArray[np.float64], strides: Sequence[int]) -> int:
    """A box of 224 x 224 goes to the level of stride 16; half or twice the side is a level less or more."""
    side = math.sqrt((box[2] - box[0]) * (box[3] - box[1]))
    stride = 16.0
    while side >= 448 and stride < strides[-1]:
        side, stride = side / 2, stride * 2
    while side < 224 and stride > strides[0]:
        side, stride = side * 2, stride / 2
    return strides.index(int(stride))


def roi_align_one(feature: NDArray[Any], box: NDArray[np.float64]) -> NDArray[np.float64]:
    """Feature (h, w, C), box (4,) xyxy in cells -> (7, 7, C)."""
    left, top = box[0], box[1]
    bin_width = max(box[2] - left, 1.0) / BINS
    bin_height = max(box[3] - top, 1.0) / BINS
    out = np.zeros((BINS, BINS, feature.shape[-1]))
    for row in range(BINS):
        for column in range(BINS):
            for i in range(SAMPLES):
                for j in range(SAMPLES):
                    y = top + (row + (i + 0.5) / SAMPLES) * bin_height
                    x = left + (column + (j + 0.5) / SAMPLES) * bin_width
                    out[row, column] += bilinear(feature, y, x) / SAMPLES**2
    return out


def bilinear(feature: NDArray[Any], y: float, x: float) -> NDArray[np.float64]:
    """The value at a point: 0 more than a cell outside the map, and its border's within that cell."""
    height, width, channels = feature.shape
    if y < -1 or y > height or x < -1 or x > width:
        return np.zeros(channels)
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    down, across = y - top, x - left
    value: NDArray[np.float64] = (
        feature[top, left].astype(np.float64) * (1 - down) * (1 - across)
        + feature[top, right].astype(np.float64) * (1 - down) * across
        + feature[bottom, left].astype(np.float64) * down * (1 - across)
        + feature[bottom, right].astype(np.float64) * down * across
    )
    return value


def pyramid_sample(
    features: Sequence[NDArray[Any]], xy: Floats, weight: Floats, strides: Sequence[int]
) -> NDArray[np.float64]:
    """Features (B, h, w, C), points (B, Q, G, P, 2), weight (B, Q, G, P, levels) -> (B, Q, G, P, C / G)."""
    width = features[0].shape[-1] // xy.shape[2]
    out = np.zeros((*xy.shape[:-1], width))
    for image, query, group, point in np.ndindex(*xy.shape[:-1]):
        x, y = xy[image, query, group, point].astype(np.float64)
        own_channels = slice(group * width, (group + 1) * width)
        for level, stride in enumerate(strides):
            of_group = features[level][image, :, :, own_channels]
            value = with_zeros_around(of_group, y / stride - 0.5, x / stride - 0.5)
            out[image, query, group, point] += value * weight[image, query, group, point, level]
    return out


def deformable_sample(features: Sequence[NDArray[Any]], xy: Floats, weight: Floats) -> NDArray[np.float64]:
    """Features (B, h, w, C), points (B, Q, G, levels, P, 2), weight (B, Q, G, levels, P) -> (B, Q, C)."""
    width = features[0].shape[-1] // xy.shape[2]
    out = np.zeros((*xy.shape[:2], features[0].shape[-1]))
    for image, query, group, level, point in np.ndindex(*xy.shape[:-1]):
        own_channels = slice(group * width, (group + 1) * width)
        of_group = features[level][image, :, :, own_channels]
        x, y = xy[image, query, group, level, point].astype(np.float64)
        value = with_zeros_around(of_group, y * of_group.shape[0] - 0.5, x * of_group.shape[1] - 0.5)
        out[image, query, own_channels] += value * weight[image, query, group, level, point]
    return out


def adaptive_mixing(
    sampled: NDArray[Any], parameters: NDArray[Any], out_points: int, activation: str
) -> NDArray[np.float64]:
    """Sampled (B, Q, G, P, C), parameters (B, Q, G * (C * C + O * P)) -> (B, Q, G * O * C)."""
    batch, queries, groups, points, channels = sampled.shape
    of_group = parameters.astype(np.float64).reshape(batch, queries, groups, -1)
    out = np.zeros((batch, queries, groups, out_points, channels))
    for at in np.ndindex(batch, queries, groups):
        over_channels = of_group[at][: channels**2].reshape(channels, channels)
        over_points = of_group[at][channels**2 :].reshape(out_points, points)
        mixed = activated(normalised(sampled[at] @ over_channels), activation)
        out[at] = activated(normalised(over_points @ mixed), activation)
    return out.reshape(batch, queries, -1)


def normalised(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """All numbers with mean 0 and variance 1."""
    moved = x - x.mean()
    scaled: NDArray[np.float64] = moved / math.sqrt((moved**2).mean() + 1e-5)
    return scaled


def activated(x: NDArray[np.float64], activation: str) -> NDArray[np.float64]:
    """ReLU, or GELU by the error function."""
    if activation == "relu":
        return np.maximum(x, 0)
    return np.array([v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in x.flat]).reshape(x.shape)


class MixingInputs(NamedTuple):
    """What is mixed, and how many points come out."""

    sampled: Floats
    parameters: Floats
    out_points: int


def mixing_inputs(
    seed: int, batch: int, queries: int, groups: int, points: int, channels: int, out_points: int
) -> MixingInputs:
    """Samples of different size and mean in each group, and matrices that are not like each other."""
    rng = np.random.default_rng(seed)
    shape = (batch, queries, groups, points, channels)
    sampled = rng.normal(size=shape) * 3.0 ** rng.integers(-3, 3, (batch, queries, groups, 1, 1))
    size = groups * (channels**2 + out_points * points)
    parameters = rng.normal(0.1, 0.5, size=(batch, queries, size))
    return MixingInputs(sampled.astype(np.float32), parameters.astype(np.float32), out_points)


def with_zeros_around(feature: NDArray[Any], y: float, x: float) -> NDArray[np.float64]:
    """The value at a point of a map (h, w, C) that goes on as zeros on all sides."""
    height, width, channels = feature.shape
    value = np.zeros(channels)
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < height and 0 <= column < width:
                value += feature[row, column] * (1 - abs(y - row)) * (1 - abs(x - column))
    return value


class NmsSettings(NamedTuple):
    """The attributes of `PatchNMS`."""

    stride: int = 16
    patch_size: int = 15
    iou_threshold: float = 0.25
    capacity: int = 8
    max_candidates: int = 2048


NMS_SETTINGS = [
    NmsSettings(),
    NmsSettings(stride=8, capacity=3, max_candidates=10),
    NmsSettings(stride=8, patch_size=5, iou_threshold=0.5, capacity=400, max_candidates=50),
    NmsSettings(patch_size=6, iou_threshold=0.05, capacity=1),
]
"""What every implementation of patch NMS is tested with."""


def patch_nms(anchors: Floats, selected: Bools, image_size: Ints, settings: NmsSettings) -> tuple[Ints, Ints]:
    """Anchors (B, N, 5), selected (B, N), image_size (B, 2) -> origins (B, capacity, 2), counts (B,)."""
    origins = np.zeros((len(anchors), settings.capacity, 2), dtype=np.int64)
    counts = np.zeros(len(anchors), dtype=np.int64)
    for image, size in enumerate(image_size.tolist()):
        candidates = [i for i in range(anchors.shape[1]) if selected[image, i]]
        candidates.sort(key=lambda i: -anchors[image, i, 4])  # sorting is stable: ties stay in order
        kept: list[Floats] = []
        for i in candidates[: settings.max_candidates]:
            patch = square_around(anchors[image, i], settings)
            if all(square_iou(patch, better) <= settings.iou_threshold for better in kept):
                kept.append(patch)
        counts[image] = len(kept)
        for slot, patch in enumerate(kept[: settings.capacity]):
            for axis, side in ((0, size[1]), (1, size[0])):
                centre = (float(patch[axis]) + float(patch[axis + 2])) / 2 / settings.stride
                last = math.ceil(side / settings.stride) - settings.patch_size
                origin = math.floor(centre - settings.patch_size / 2)
                origins[image, slot, axis] = max(min(origin, last), 0)
    return origins, counts


def square_around(anchor: Floats, settings: NmsSettings) -> Floats:
    """(4,) xyxy in pixels, in the precision of the network."""
    half = np.float32(settings.stride * settings.patch_size / 2)
    return np.array([anchor[0] - half, anchor[1] - half, anchor[0] + half, anchor[1] + half], np.float32)


def square_iou(a: Floats, b: Floats) -> float:
    """Intersection over union of two boxes, in the precision of the network."""
    zero = np.float32(0)
    shared = max(min(a[2], b[2]) - max(a[0], b[0]), zero) * max(min(a[3], b[3]) - max(a[1], b[1]), zero)
    area_a, area_b = ((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return float(shared / (area_a + area_b - shared))


class PadSettings(NamedTuple):
    """The attributes of `PadAnchors`."""

    first_level: int = 10
    floor: int = 3
    cap: int = 12


def pad_anchors(
    anchors: Floats, keep: Bools, image_size: Ints, slots: int, settings: PadSettings
) -> tuple[Floats, Ints]:
    """Anchors (B, N, 5), keep (B, N), image_size (B, 2) -> queries (B, slots, 4), counts (B,)."""
    queries = np.zeros((len(anchors), slots, 4), dtype=np.float32)
    counts = np.zeros(len(anchors), dtype=np.int64)
    for image, (height, width) in enumerate(image_size.tolist()):
        scores = anchors[image, :, 4].tolist()
        first = [i for i in range(settings.first_level) if keep[image, i]]
        if len(first) < settings.floor:
            first = sorted(range(settings.first_level), key=lambda i: -scores[i])[: settings.floor]
        chosen = first + [i for i in range(settings.first_level, len(scores)) if keep[image, i]]
        most = min(settings.cap, slots)
        if len(chosen) > most:
            chosen = sorted(chosen, key=lambda i: (-scores[i], i))[:most]
        counts[image] = len(chosen)
        queries[image] = [width / 2, height / 2, width, height]
        for slot, i in enumerate(chosen):
            queries[image, slot] = anchors[image, i, :4]
    return queries, counts


STRIDES = (4, 8, 16, 32)


def pyramid(seed: int, height: int, width: int, *, batch: int = 2, channels: int = 5) -> list[Floats]:
    """Random maps (B, h, w, C) of the four levels of images that large."""
    rng = np.random.default_rng(seed)
    shapes = [(batch, -(-height // stride), -(-width // stride), channels) for stride in STRIDES]
    return [rng.standard_normal(shape, dtype=np.float32) for shape in shapes]


def roi_boxes(seed: int, height: int, width: int, *, batch: int = 2) -> Floats:
    """(B, Q, 4) xyxy: tiny and huge boxes, on every border and beyond it, on the edge between two levels."""
    corners = [
        *((10, 10, 10.5, 10.25), (33, 21, 34, 22), (5, 5, 8, 105), (5, 50, 205, 53)),  # tiny and thin
        *((-900, -700, 1800, 1500), (0, 0, width, height), (0, 0, 1, 1)),  # huge, whole, first pixel
        *((-50, -30, 60, 40), (width - 20, height - 30, width + 60, height + 44)),  # over a border
        *((-3, 20, 17, 40), (30, height - 9, 70, height + 3), (-2, -2, 1, 1)),
        *((-500, -500, -400, -400), (width + 50, 10, width + 90, 50), (10, height + 99, 50, height + 120)),
        *((5, 5, 5 + side, 5 + side) for side in (55, 56, 57, 111, 112, 113, 223, 224, 225, 447, 448, 449)),
        *((3, 7, 3 + 56, 7 + 224), (3, 7, 3 + 896, 7 + 224), (-10, 0, -10 + 28, 448)),
    ]
    rng = np.random.default_rng(seed)
    centres = rng.uniform(-0.1, 1.1, (batch, 15, 2)) * (width, height)
    halves = np.exp(rng.uniform(0, np.log(300), (batch, 15, 2)))
    anywhere = np.concatenate([centres - halves, centres + halves], axis=-1)
    fixed = np.broadcast_to(np.array(corners, dtype=np.float64), (batch, len(corners), 4))
    return np.concatenate([fixed, anywhere], axis=1).astype(np.float32)


def sample_points(
    seed: int, height: int, width: int, *, batch: int = 2, groups: int = 2, points: int = 6
) -> tuple[Floats, Floats]:
    """Points (B, Q, G, P, 2) in and around an image and on its borders, and weights (B, Q, G, P, 4)."""
    rng = np.random.default_rng(seed)
    shape = (batch, 12, groups, points)
    xy = rng.uniform(-0.3, 1.3, (*shape, 2)) * (width, height)
    xy[:, 0] = np.array([0, 2, 4, 15.75, 16, 33])[:points, None]  # the first pixel, centres of cells, edges
    xy[:, 1] = (width, height) - xy[:, 0]
    xy[:, 2] = -1e5 * np.arange(points)[:, None]  # as far out as an untrained network may look
    weight = rng.uniform(0, 1, (*shape, 4))
    return xy.astype(np.float32), (weight / weight.sum(-1, keepdims=True)).astype(np.float32)


def deformable_points(
    seed: int, features: Sequence[Floats], *, queries: int = 9, groups: int = 2, points: int = 4
) -> tuple[Floats, Floats]:
    """Points (B, Q, G, levels, P, 2) in and around maps and on their edges, and weights (B, Q, G, levels, P).

    As in a network the weights of a query and group add up to 1.
    """
    rng = np.random.default_rng(seed)
    shape = (len(features[0]), queries, groups, len(features), points)
    xy = rng.uniform(-0.3, 1.3, (*shape, 2))
    for level, feature in enumerate(features):
        cell = 1 / np.array(feature.shape[2:0:-1])
        xy[:, :1, :, level] = (
            cell * np.resize([0, 0.5, 1, 1.5], points)[:, None]
        )  # edges and centres of cells
        xy[:, 1:2, :, level] = 1 - xy[:, :1, :, level]
        xy[:, 2:3, :, level] = cell * np.resize([-0.5, -0.75, -0.25, -1], points)[:, None]  # just outside
        xy[:, 3:4, :, level] = 1 - xy[:, 2:3, :, level]
    xy[:, 4:5] = -1e3 * np.arange(points)[:, None]  # as far out as an untrained network may look
    weight = rng.uniform(0, 1, shape)
    return xy.astype(np.float32), (weight / weight.sum((3, 4), keepdims=True)).astype(np.float32)


class NmsInputs(NamedTuple):
    """What `PatchNMS` is given."""

    name: str
    anchors: Floats
    selected: Bools
    image_size: Ints


def nms_inputs(settings: NmsSettings) -> Iterator[NmsInputs]:
    """Candidates of every kind: none, one, scattered, crowded, tied, on the border, on the threshold."""
    side = settings.stride * settings.patch_size
    large, small = np.array([[900, 1210], [701, 833]]), np.array([[side // 3, side // 2], [1, side // 4]])
    for seed, (count, share) in enumerate([(1, 1.0), (3, 0.7), (60, 0.5), (200, 0.9), (301, 0.2), (40, 0.0)]):
        yield _nms_inputs(f"{count} anchors", seed, large, count, share)
        yield _nms_inputs(f"{count} anchors, small images", seed, small, count, share)

    tied = _nms_inputs("ties", 10, large, 120, 0.8)
    tied.anchors[..., 4] = np.round(tied.anchors[..., 4] * 4) / 4
    yield tied
    equal = _nms_inputs("all scores equal", 11, large, 80, 1.0)
    equal.anchors[..., 4] = 0.5
    yield equal
    one = _nms_inputs("one suppresses all", 12, large, 50, 1.0)
    one.anchors[..., :2] = 400 + one.anchors[..., :2] / 1e4
    yield one
    same = _nms_inputs("all the same", 13, large, 9, 1.0)
    same.anchors[:] = same.anchors[:, :1]
    yield same
    mixed = _nms_inputs("only one image of the batch", 14, large, 50, 0.6)
    mixed.selected[0] = False
    yield mixed
    edge = _nms_inputs("borders", 15, large, 90, 1.0)
    edge.anchors[..., :2] = np.round(edge.anchors[..., :2] / 500) * 500  # many a centre on or over a border
    yield edge
    chain = _nms_inputs("a chain, each suppressing the next", 16, large, 30, 1.0)
    chain.anchors[..., 0] = np.arange(30) * side * 0.5
    chain.anchors[..., 1] = 300
    chain.anchors[..., 4] = np.linspace(0.9, 0.2, 30)
    yield chain
    exact = _nms_inputs("overlaps exactly on the threshold of 1/4", 17, large, 12, 1.0)
    exact.anchors[..., 0] = np.arange(12) * side * 0.6
    exact.anchors[..., 1] = 240
    yield exact
    zero = _nms_inputs("a score of 0", 18, large, 5, 1.0)
    zero.anchors[..., 4] = 0.0
    yield zero


def _nms_inputs(name: str, seed: int, image_size: Ints, count: int, share: float) -> NmsInputs:
    rng = np.random.default_rng([seed, count])
    anchors = rng.uniform(0, 1, (len(image_size), count, 5))
    anchors[..., :4] *= np.tile(image_size[:, None, ::-1], 2)
    return NmsInputs(
        name, anchors.astype(np.float32), rng.uniform(0, 1, anchors.shape[:2]) < share, image_size
    )


class PadInputs(NamedTuple):
    """What `PadAnchors` is given."""

    name: str
    anchors: Floats
    keep: Bools
    image_size: Ints
    slots: int


def pad_inputs(settings: PadSettings) -> Iterator[PadInputs]:
    """Numbers of anchors on either side of the floor and the cap, in one batch too; ties; any slots."""
    first = settings.first_level
    for seed, (more, share, slots) in enumerate(
        [
            (0, 0.5, settings.cap),
            (0, 0.0, first),
            (7, 0.5, settings.cap),
            (25, 1.0, settings.cap),
            (25, 0.1, settings.cap),
            (30, 0.6, settings.cap + 9),
            (3, 0.3, 1),
            (2, 1.0, first + 40),
        ]
    ):
        yield _pad_inputs(f"{first + more} anchors, {slots} slots", seed, first + more, share, slots)

    mixed = _pad_inputs("floor, cap and neither in one batch", 20, first + 30, 0.5, settings.cap)
    mixed.keep[0, :first] = False
    mixed.keep[1] = True
    mixed.keep[2] = np.arange(first + 30) < settings.floor
    yield mixed
    both = _pad_inputs("floor and cap on one image", 21, first + 40, 1.0, settings.cap)
    both.keep[:, :first] = False
    yield both
    exact = _pad_inputs("exactly the floor and exactly the cap", 22, first + 40, 0.0, settings.cap)
    exact.keep[0, first - settings.floor : first] = True
    exact.keep[1, : settings.cap] = True
    exact.keep[2, : settings.cap + 1] = True
    yield exact
    tied = _pad_inputs("ties", 23, first + 30, 0.8, settings.cap)
    tied.anchors[..., 4] = np.round(tied.anchors[..., 4] * 3) / 3
    tied.keep[0, :first] = False
    yield tied
    equal = _pad_inputs("all scores 0", 24, first + 30, 0.0, settings.cap)
    equal.anchors[..., 4] = 0.0
    yield equal


def _pad_inputs(name: str, seed: int, count: int, share: float, slots: int) -> PadInputs:
    rng = np.random.default_rng([seed, count])
    anchors = rng.uniform(0, 1, (3, count, 5)).astype(np.float32)
    anchors[..., :4] *= 300
    keep = rng.uniform(0, 1, anchors.shape[:2]) < share
    return PadInputs(name, anchors, keep, np.array([[480, 640], [333, 511], [1, 2]]), slots)
