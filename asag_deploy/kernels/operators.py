"""The operators of the domain `asag`, the probing loop, pre- and post-processing, as calls of the kernels.

Inputs and outputs are arrays on the library's device: NumPy arrays for the host library, anything with
`__cuda_array_interface__` (or a `Buffer`) for the CUDA one.  Outputs are written where the caller says, so
that nothing is allocated; on CUDA every function launches one kernel on `stream` (a cudaStream_t as an
integer) and returns before it has run.  Shapes: B images, Q queries, N anchors, C channels.

All raise ConfigError for an array of the wrong shape, type or device, and BackendError where the kernel
refuses its arguments or cannot be launched.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from asag_deploy.errors import ConfigError
from asag_deploy.kernels import structures
from asag_deploy.kernels.buffers import BFLOAT16, Arrays, Buffer, buffer_of
from asag_deploy.kernels.library import KernelLibrary

TYPES = {
    np.dtype(np.float32): structures.FLOAT32,
    np.dtype(np.float16): structures.FLOAT16,
    np.dtype(np.uint8): structures.UINT8,
    BFLOAT16: structures.BFLOAT16,
}
"""The types of elements, as the structures name them."""


def multiscale_roi_align(
    library: KernelLibrary,
    features: Arrays,
    boxes: Any,
    out: Any,
    *,
    strides: Sequence[int],
    stream: int = 0,
) -> None:
    """Run RoIAlign 7x7, each box on the one level its area chooses.

    features: (B, h, w, C) for each of 1 to 4 levels, all float32 or float16; boxes: float32 (B, Q, 4) xyxy in
    pixels; out: (B, Q, 7, 7, C) of the features' type; strides: pixels per cell, each twice the one before.
    """
    maps = _maps(library, features, strides)
    batch, *_, channels = maps[0].shape
    box = library.expect("boxes", boxes, (batch, -1, 4), np.float32)
    queries = box.shape[1]
    result = library.expect("out", out, (batch, queries, 7, 7, channels), maps[0].dtype.type)
    pyramid = pyramid_of(maps, strides)
    arguments = structures.MultiscaleRoIAlign(pyramid, box.pointer, result.pointer, queries)
    library.run("multiscale_roi_align", arguments, stream)


def pyramid_sample(
    library: KernelLibrary,
    features: Arrays,
    xy: Any,
    weight: Any,
    out: Any,
    *,
    strides: Sequence[int],
    stream: int = 0,
) -> None:
    """Sample every level at the same points, and add them up by weight.

    features: as for `multiscale_roi_align`; xy: float32 (B, Q, G, P, 2) in pixels; weight: float32
    (B, Q, G, P, levels); out: (B, Q, G, P, C / G) of the features' type.
    """
    maps = _maps(library, features, strides)
    batch, *_, channels = maps[0].shape
    points = library.expect("xy", xy, (batch, -1, -1, -1, 2), np.float32)
    shape = points.shape[:4]
    weights = library.expect("weight", weight, (*shape, len(maps)), np.float32)
    width = channels // groups_of(shape[2], channels)
    result = library.expect("out", out, (*shape, width), maps[0].dtype.type)
    pointers = (points.pointer, weights.pointer, result.pointer)
    arguments = structures.PyramidSample(pyramid_of(maps, strides), *pointers, *shape[1:])
    library.run("pyramid_sample", arguments, stream)


def deformable_sample(
    library: KernelLibrary, features: Arrays, xy: Any, weight: Any, out: Any, *, stream: int = 0
) -> None:
    """Sample each level at points of its own, and add all of a group up by weight.

    features: as for `multiscale_roi_align`; xy: float32 (B, Q, G, levels, P, 2) relative to the whole map;
    weight: float32 (B, Q, G, levels, P); out: (B, Q, C) of the features' type.
    """
    maps = _maps(library, features)
    batch, *_, channels = maps[0].shape
    points = library.expect("xy", xy, (batch, -1, -1, len(maps), -1, 2), np.float32)
    weights = library.expect("weight", weight, points.shape[:-1], np.float32)
    queries, groups = points.shape[1:3]
    result = library.expect("out", out, (batch, queries, channels), maps[0].dtype.type)
    pointers = (points.pointer, weights.pointer, result.pointer)
    arguments = structures.DeformableSample(
        pyramid_of(maps), *pointers, queries, groups_of(groups, channels), points.shape[4]
    )
    library.run("deformable_sample", arguments, stream)


def patch_nms(
    library: KernelLibrary,
    anchors: Any,
    selected: Any,
    image_size: Any,
    origins: Any,
    counts: Any,
    *,
    stride: int,
    patch_size: int,
    iou_threshold: float,
    max_candidates: int,
    stream: int = 0,
) -> None:
    """Run greedy NMS over the square patches round the selected anchors.

    anchors: float32 or float16 (B, N, 5) cx, cy, w, h in pixels, and score; selected: bool (B, N);
    image_size: int64 (B, 2) height, width in pixels; origins: int64 (B, capacity, 2) x, y in cells of the map
    with `stride`, zeros beyond the last; counts: int64 (B, 4), whose column 1 is written: the patches kept,
    which may exceed the capacity.
    """
    anchor = library.expect("anchors", anchors, (-1, -1, 5), np.float32, np.float16)
    batch, count, _ = anchor.shape
    flags = library.expect("selected", selected, (batch, count), np.bool_)
    sizes = library.expect("image_size", image_size, (batch, 2), np.int64)
    patches = library.expect("origins", origins, (batch, -1, 2), np.int64)
    kept = library.expect("counts", counts, (batch, structures.COUNT_COLUMNS), np.int64)
    arguments = structures.PatchNMS(
        *(buffer.pointer for buffer in (anchor, flags, sizes, patches, kept)),
        *(TYPES[anchor.dtype], batch, count),
        *(stride, patch_size, patches.shape[1], max_candidates, iou_threshold),
    )
    library.run("patch_nms", arguments, stream)


def pad_anchors(
    library: KernelLibrary,
    anchors: Any,
    keep: Any,
    image_size: Any,
    queries: Any,
    counts: Any,
    *,
    first_level: int,
    floor: int,
    cap: int,
    stream: int = 0,
) -> None:
    """Gather the anchors that pass, by floor and cap, and pad them with the whole image.

    anchors: float32 or float16 (B, N, 5) of all levels; keep: bool (B, N); image_size: int64 (B, 2) height,
    width; queries: (B, slots, 4) cxcywh in pixels, of the anchors' type; counts: int64 (B,) how many are
    real.
    """
    anchor = library.expect("anchors", anchors, (-1, -1, 5), np.float32, np.float16)
    batch, count, _ = anchor.shape
    flags = library.expect("keep", keep, (batch, count), np.bool_)
    sizes = library.expect("image_size", image_size, (batch, 2), np.int64)
    result = library.expect("queries", queries, (batch, -1, 4), anchor.dtype.type)
    real = library.expect("counts", counts, (batch,), np.int64)
    arguments = structures.PadAnchors(
        *(buffer.pointer for buffer in (anchor, flags, sizes, result, real)),
        *(TYPES[anchor.dtype], batch, count, result.shape[1], first_level, floor, cap),
    )
    library.run("pad_anchors", arguments, stream)


def preprocess(
    library: KernelLibrary,
    image: Any,
    out: Any,
    *,
    new_shape: tuple[int, int],
    mean: Sequence[float] = (0, 0, 0),
    deviation: Sequence[float] = (1, 1, 1),
    channel_order: Literal["rgb", "bgr"] = "rgb",
    stream: int = 0,
) -> None:
    """Resize one image into one slot of the input batch, equal to `processing.preprocess` to the bit.

    image: uint8 (H, W, 3) in `channel_order`; new_shape: its (height, width) in the slot, as `resized_shape`
    gives it; out: uint8 (h, w, 3) RGB, or float32 or float16 (3, h, w), normalised by mean and deviation (of
    values 0 to 255); zero beyond the image.  Right for images that grow both ways or shrink both ways.
    """
    pixels = library.expect("image", image, (-1, -1, 3), np.uint8)
    if buffer_of(out).dtype == np.uint8:
        slot = library.expect("out", out, (-1, -1, 3), np.uint8)
        height, width = slot.shape[:2]
    else:
        slot = library.expect("out", out, (3, -1, -1), np.float32, np.float16)
        height, width = slot.shape[1:]
    triple = ctypes.c_float * 3
    arguments = structures.Preprocess(
        *(pixels.pointer, slot.pointer, *pixels.shape[:2], *new_shape, height, width, TYPES[slot.dtype]),
        *(triple(*mean), triple(*deviation), int(channel_order == "bgr")),
    )
    library.run("preprocess", arguments, stream)


def postprocess(
    library: KernelLibrary,
    scores: Any,
    labels: Any,
    boxes: Any,
    original_shape: Any,
    xyxy: Any,
    confidence: Any,
    class_id: Any,
    counts: Any,
    *,
    nms_iou: float | None,
    stream: int = 0,
) -> None:
    """Turn the decoder's `det_*` outputs into detections, as `processing.postprocess.detections_of` does.

    scores: float32 or float16 (B, D); labels: int64 (B, D); boxes: (B, D, 4) xyxy relative to the valid
    image, of the scores' type; original_shape: int64 (B, 2) height, width.  Outputs, best first and zeros
    beyond the last: xyxy float32 (B, D, 4) in pixels, confidence float32 (B, D), class_id int64 (B, D),
    counts int64 (B,).
    """
    score = library.expect("scores", scores, (-1, -1), np.float32, np.float16)
    batch, count = score.shape
    given = (
        score,
        library.expect("labels", labels, (batch, count), np.int64),
        library.expect("boxes", boxes, (batch, count, 4), score.dtype.type),
        library.expect("original_shape", original_shape, (batch, 2), np.int64),
        library.expect("xyxy", xyxy, (batch, count, 4), np.float32),
        library.expect("confidence", confidence, (batch, count), np.float32),
        library.expect("class_id", class_id, (batch, count), np.int64),
        library.expect("counts", counts, (batch,), np.int64),
    )
    arguments = structures.Postprocess(
        *(buffer.pointer for buffer in given),
        *(TYPES[score.dtype], batch, count, -1.0 if nms_iou is None else nms_iou),
    )
    library.run("postprocess", arguments, stream)


def decide(
    library: KernelLibrary,
    counts: Any,
    probed: Any,
    patch_count: Any,
    any_goes_on: Any,
    *,
    level: int,
    min_selected: int,
    max_patches: int,
    condition: int | None = None,
    stream: int = 0,
) -> None:
    """Decide which images are probed on the next level, as `asag_deploy.loop.stopping.Decisions` does.

    counts: int64 (B, 4) of the level before; probed: bool (B, levels), whose column `level` is written, and
    whose column before that says who got so far; patch_count: int64 (B,) written, 0 for images that stop;
    any_goes_on: int32 (1,) written; condition: on CUDA, the handle of a conditional node that is set to it.
    """
    arrays = (counts, probed, patch_count, any_goes_on)
    arguments = _decision(library, arrays, condition, (level, min_selected, max_patches))
    library.run("decide", arguments, stream)


def add_decide(
    library: KernelLibrary,
    counts: Any,
    probed: Any,
    patch_count: Any,
    any_goes_on: Any,
    *,
    level: int,
    min_selected: int,
    max_patches: int,
    graph: int,
    dependencies: Sequence[int] = (),
    condition: int | None = None,
) -> int:
    """Put `decide` into a CUDA graph as a kernel node, without a capture; the node.

    Arrays and settings are those of `decide`; they are used when the graph runs.  graph: a cudaGraph_t or
    CUgraph as an integer, which may be the body of a conditional node; dependencies: nodes of that graph that
    come before.  For the CUDA library only.
    """
    arrays = (counts, probed, patch_count, any_goes_on)
    arguments = _decision(library, arrays, condition, (level, min_selected, max_patches))
    return library.add_decide(graph, dependencies, arguments)


def _decision(
    library: KernelLibrary,
    arrays: tuple[Any, Any, Any, Any],
    condition: int | None,
    settings: tuple[int, int, int],
) -> structures.Decide:
    """Build the arguments of `decide`; `settings`: level, min_selected, max_patches."""
    counts, probed, patch_count, any_goes_on = arrays
    count = library.expect("counts", counts, (-1, 4), np.int64)
    batch = count.shape[0]
    flags = library.expect("probed", probed, (batch, -1), np.bool_)
    patches = library.expect("patch_count", patch_count, (batch,), np.int64)
    goes_on = library.expect("any_goes_on", any_goes_on, (1,), np.int32)
    level, min_selected, max_patches = settings
    return structures.Decide(
        *(buffer.pointer for buffer in (count, flags, patches, goes_on)),
        *(condition or 0, int(condition is not None), batch, level, flags.shape[1]),
        *(min_selected, max_patches),
    )


def groups_of(groups: int, channels: int) -> int:
    """Return the number of groups that channels go in.  Raises ConfigError if it does not divide them."""
    if groups == 0 or channels % groups != 0:
        raise ConfigError(f"expected a number of groups that divides {channels} channels, got {groups}")
    return groups


def _maps(library: KernelLibrary, features: Arrays, strides: Sequence[int] | None = None) -> list[Buffer]:
    expected = f"expected 1 to {structures.MAX_LEVELS} feature maps"
    if strides is not None and len(strides) != len(features):
        raise ConfigError(
            f"{expected} with a stride each, got {len(features)} maps and {len(strides)} strides"
        )
    if not 1 <= len(features) <= structures.MAX_LEVELS:
        raise ConfigError(f"{expected}, got {len(features)}")
    first = library.expect("features[0]", features[0], (-1, -1, -1, -1), np.float32, np.float16)
    batch, *_, channels = first.shape
    shape = (batch, -1, -1, channels)
    return [
        library.expect(f"features[{i}]", feature, shape, first.dtype.type)
        for i, feature in enumerate(features)
    ]


def pyramid_of(maps: Sequence[Buffer], strides: Sequence[int] = ()) -> structures.Pyramid:
    """Describe maps (B, h, w, C) that go together, the finest first, with their pixels per cell if needed."""
    return structures.Pyramid(
        (ctypes.c_void_p * structures.MAX_LEVELS)(*(level.pointer for level in maps)),
        structures.per_level("heights", (level.shape[1] for level in maps)),
        structures.per_level("widths", (level.shape[2] for level in maps)),
        structures.per_level("strides", strides),
        len(maps),
        maps[0].shape[0],
        maps[0].shape[3],
        TYPES[maps[0].dtype],
    )
