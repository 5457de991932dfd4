"""The stage graphs of the tiny bundle: see `tiny_bundle`."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.parser
from numpy.typing import NDArray
from onnx import numpy_helper

from asag_deploy.bundle.manifest import Level

FIRST_ANCHORS = 20
PATCH_ANCHORS = 2
STRIDES: dict[Level, int] = {"P4": 16, "P3": 8}
CAPACITY: dict[Level, int] = {"P4": 18, "P3": 6}
BOTH: tuple[Level, ...] = ("P4", "P3")

HEADER = '<ir_version: 10, opset_import: ["" : 18]>\n'


def models(levels: tuple[Level, ...] = BOTH) -> dict[str, onnx.ModelProto]:
    """The stage graphs by name."""
    result = {"normalize": _model(NORMALIZE), "backbone": _backbone(bool(levels))}
    for level in levels:
        result[f"probe_{level.lower()}"] = _probe(level, last=level == levels[-1])
    return {**result, "decoder": _decoder(levels)}


NORMALIZE = """
normalize (uint8[batch, height, width, 3] pixels, int64[batch, 2] image_size) =>
    (float[batch, 3, height, width] image)
<int64 zero = {0}, int64 one = {1}, int64[1] axis1 = {1}, int64[1] axis2 = {2}>
{
    rows = Shape <start = 1, end = 2> (pixels)
    columns = Shape <start = 2, end = 3> (pixels)
    row_count = Squeeze (rows)
    column_count = Squeeze (columns)
    y = Range (zero, row_count, one)
    x = Range (zero, column_count, one)
    height, width = Split <axis = 1, num_outputs = 2> (image_size)
    row_valid = Less (y, height)
    column_valid = Less (x, width)
    row_mask = Unsqueeze (row_valid, axis2)
    column_mask = Unsqueeze (column_valid, axis1)
    both = And (row_mask, column_mask)
    mask = Unsqueeze (both, axis1)
    values = Cast <to = 1> (pixels)
    channels_first = Transpose <perm = [0, 3, 1, 2]> (values)
    nothing = CastLike (zero, values)
    image = Where (mask, channels_first, nothing)
}
"""

BACKBONE = """
backbone (float[batch, 3, height, width] image, int64[batch, 2] image_size) => (
    float[batch, 3, height_p2, width_p2] p2, float[batch, 3, height_p3, width_p3] p3,
    float[batch, 3, height_p4, width_p4] p4, float[batch, 3, height_p5, width_p5] p5,
    float[batch, 20, 5] anchors, bool[batch, 20] selected, int64[batch, 4] counts)
<int64[2] start = {0, 0}, int64[2] end = {9999, 9999}, int64[2] axes = {2, 3}, int64[2] by4 = {4, 4},
 int64[2] by8 = {8, 8}, int64[2] by16 = {16, 16}, int64[2] by32 = {32, 32}, int64 zero = {0}, int64 one = {1},
 int64[1] axis1 = {1}, int64[1] axis2 = {2}, int64[4] whwh = {1, 0, 1, 0}, int64[4] pads = {0, 0, 0, 1},
 float unit = {1}, int64 all = {20}>
{
    p2 = Slice (image, start, end, axes, by4)
    p3 = Slice (image, start, end, axes, by8)
    p4 = Slice (image, start, end, axes, by16)
    p5 = Slice (image, start, end, axes, by32)

    size = Cast <to = 1> (image_size)
    sides = Gather <axis = 1> (size, whwh)
    scale = Pad (sides, pads, unit)
    scale_of_all = Unsqueeze (scale, axis1)

    column = Gather <axis = 3> (image, zero)
    pixel = Gather <axis = 2> (column, zero)
    colour = Cast <to = 7> (pixel)
    red, green, blue = Split <axis = 1, num_outputs = 3> (colour)
    rank = Range (zero, all, one)
    selected = Less (rank, red)
    left = Sub (red, blue)
    at_least = Min (red, one)
    distinct = Max (left, at_least)
    none = Sub (red, red)
    passing = Add (none, all)
    unselected = Sub (passing, red)
    counts = Concat <axis = 1> (red, none, passing, unselected)

    beyond = GreaterOrEqual (rank, distinct)
    twin = And (selected, beyond)
    twin_column = Unsqueeze (twin, axis2)
    placed = Where (twin_column, twin_anchors, first_anchors)
    anchors = Mul (placed, scale_of_all)
}
"""

PROBE = """
probe (float[batch, 3, height_feature, width_feature] feature, int64[2] feature_size,
       int64[batch, 2] image_size, int64[batch, CAPACITY, 2] patches, int64[batch] patch_count,
       int64[patches] slots) => (
    float[batch, anchors, 5] anchors, bool[batch, anchors] selected, int64[batch, 4] counts)
<int64 zero = {0}, int64 one = {1}, int64[1] axis1 = {1}, int64[1] axis2 = {2}, int64[1] last = {-1},
 int64[3] flat = {0, -1, 5}, int64[2] flat_mask = {0, -1}, float good = {0.8}, float nothing = {0},
 float[1, 1, 2, 2] sides = {8, 8, 12, 6}, float half = {0.5}, float[1, 1, 2, 2] apart = {0, 0, 0.25, 0.25}>
{
    own = Gather <axis = 1> (patches, slots)
    cells = Cast <to = 1> (own)
    corner = Mul (cells, stride)
    middle = Add (corner, stride)
    place = Cast <to = 1> (slots)
    step = Mul (place, half)
    step_column = Unsqueeze (step, axis1)
    moved = Add (middle, step_column)
    centre = Unsqueeze (moved, axis2)
    centres = Add (centre, apart)
    nowhere = Sub (centres, centres)
    extents = Add (nowhere, sides)

    counted = Unsqueeze (patch_count, axis1)
    real = Less (slots, counted)
    score = Where (real, good, nothing)
    score_of_patch = Unsqueeze (score, last)
    score_of_both = Concat <axis = 2> (score_of_patch, score_of_patch)
    score_column = Unsqueeze (score_of_both, last)
    stacked = Concat <axis = 3> (centres, extents, score_column)
    anchors = Reshape (stacked, flat)

    valid = Reshape (score_of_both, flat_mask)
    passes = Greater (valid, nothing)
    number = Shape <start = 1, end = 2> (valid)
    count = Squeeze (number)
    rank = Range (zero, count, one)
    column = Gather <axis = 3> (feature, zero)
    pixel = Gather <axis = 2> (column, zero)
    colour = Cast <to = 7> (pixel)
    red, green, blue = Split <axis = 1, num_outputs = 3> (colour)
    asks = Less (rank, green)
    selected = And (asks, passes)

    passes_int = Cast <to = 7> (passes)
    passing = ReduceSum <keepdims = 1> (passes_int, axis1)
    selected_int = Cast <to = 7> (selected)
    asking = ReduceSum <keepdims = 1> (selected_int, axis1)
    unselected = Sub (passing, asking)
    none = Sub (passing, passing)
    counts = Concat <axis = 1> (asking, none, passing, unselected)
}
"""

DECODER = """
decoder (INPUTS int64[batch, 2] image_size, int64[queries] query_slots) => (
    float[batch, queries, 3] logits, float[batch, queries, 4] boxes, float[batch, queries, 4] anchors,
    int64[batch] anchor_count, float[batch, detections] det_scores, int64[batch, detections] det_labels,
    float[batch, detections, 4] det_boxes)
<int64[1] axis1 = {1}, int64[1] axis2 = {2}, int64[1] first4 = {4}, int64[4] cxcywh = {0, 1, 2, 3},
 int64[1] end5 = {5}, int64[4] whwh = {1, 0, 1, 0}, float zero = {0}, float half = {0.5}, float four = {4},
 float refused = {-1}, float[3] per_class = {0, 1, 2}, int64[2] flat = {0, -1}, int64 classes = {3},
 int64[1] limit = {10}>
{
    GATHER
    score_column = Slice (all, first4, end5, axis2)
    score_of_all = Squeeze (score_column, axis2)
    score = Where (keep, score_of_all, refused)
    queries = Shape (query_slots)
    best, best_index = TopK <axis = 1> (score, queries)
    boxes_of_all = Gather <axis = 2> (all, cxcywh)
    index_column = Unsqueeze (best_index, axis2)
    index = Concat <axis = 2> (index_column, index_column, index_column, index_column)
    chosen = GatherElements <axis = 1> (boxes_of_all, index)
    valid = Greater (best, zero)
    valid_int = Cast <to = 7> (valid)
    anchor_count = ReduceSum <keepdims = 0> (valid_int, axis1)

    size = Cast <to = 1> (image_size)
    sides_of_image = Gather <axis = 1> (size, whwh)
    sides = Unsqueeze (sides_of_image, axis1)
    valid_column = Unsqueeze (valid, axis2)
    anchors = Where (valid_column, chosen, sides)
    boxes = Div (anchors, sides)
    best_column = Unsqueeze (best, axis2)
    raised = Mul (best_column, four)
    logits = Sub (raised, per_class)

    sigmoid = Sigmoid (logits)
    probability = Where (valid_column, sigmoid, zero)
    pairs = Reshape (probability, flat)
    pair_count = Shape <start = 1, end = 2> (pairs)
    kept = Min (pair_count, limit)
    det_scores, det_index = TopK <axis = 1> (pairs, kept)
    query = Div (det_index, classes)
    det_labels = Mod (det_index, classes)
    centre, extent = Split <axis = 2, num_outputs = 2> (boxes)
    half_extent = Mul (extent, half)
    low = Sub (centre, half_extent)
    high = Add (centre, half_extent)
    corners = Concat <axis = 2> (low, high)
    query_column = Unsqueeze (query, axis2)
    query_index = Concat <axis = 2> (query_column, query_column, query_column, query_column)
    det_boxes = GatherElements <axis = 1> (corners, query_index)
}
"""


def _backbone(probes: bool) -> onnx.ModelProto:
    rank = np.arange(FIRST_ANCHORS, dtype=np.float32)
    along = (rank + 0.5) / FIRST_ANCHORS
    width = np.full_like(along, 0.2)
    anchors = np.stack([along, along, width, width, 0.9 - 0.01 * rank], axis=1)
    model = _model(
        BACKBONE,
        first_anchors=anchors[None],
        twin_anchors=np.concatenate(
            [np.broadcast_to(anchors[:1, :2], (FIRST_ANCHORS, 2)), anchors[:, 2:]], 1
        )[None],
    )
    if not probes:
        _without_choice(model)
    return model


def _probe(level: Level, *, last: bool) -> onnx.ModelProto:
    text = PROBE.replace("CAPACITY", str(CAPACITY[level]))
    model = _model(text, stride=np.array(STRIDES[level], np.float32))
    if last:
        _without_choice(model)
    return model


def _decoder(levels: tuple[Level, ...]) -> onnx.ModelProto:
    """Concatenates the anchors of all levels, and keeps those over 0.1 that no probed level replaced."""
    inputs = ["float[batch, 3, height_p5, width_p5] p5"]
    lines, anchors, keeps = [], [], []
    for i, level in enumerate(("p5", *(level.lower() for level in levels))):
        count = FIRST_ANCHORS if i == 0 else f"anchors_{level}"
        inputs.append(f"float[batch, {count}, 5] anchors_{level}")
        anchors.append(f"anchors_{level}")
        keeps.append(f"keep_{level}")
        lines += [
            f"column_{level} = Slice (anchors_{level}, first4, end5, axis2)",
            f"score_{level} = Squeeze (column_{level}, axis2)",
            f"passes_{level} = Greater (score_{level}, threshold)",
        ]
        if i == len(levels):
            lines.append(f"keep_{level} = Identity (passes_{level})")
            continue
        inputs.append(f"bool[batch, {count}] selected_{level}")
        lines += [
            f"probed_{level} = Gather <axis = 1> (probed, column{i})",
            f"replaced_{level} = And (selected_{level}, probed_{level})",
            f"stays_{level} = Not (replaced_{level})",
            f"keep_{level} = And (passes_{level}, stays_{level})",
        ]
    if levels:
        inputs.append(f"bool[batch, {len(levels)}] probed")
    lines.append(f"all = Concat <axis = 1> ({', '.join(anchors)})")
    lines.append(f"keep = Concat <axis = 1> ({', '.join(keeps)})")
    text = DECODER.replace("INPUTS", ", ".join(inputs) + ", ").replace("GATHER", "\n    ".join(lines))
    constants: dict[str, NDArray[Any]] = {f"column{i}": np.array([i]) for i in range(len(levels))}
    return _model(text, threshold=np.array(0.1, np.float32), **constants)


def _without_choice(model: onnx.ModelProto) -> None:
    """Make it the last level: no `selected`, and nothing selected in `counts`."""
    kept = [output for output in model.graph.output if output.name != "selected"]
    del model.graph.output[:]
    model.graph.output.extend(kept)
    node = next(node for node in model.graph.node if list(node.output) == ["counts"])
    total = node.input[2]
    nothing = onnx.helper.make_node("Sub", [total, total], ["nothing_asked"])
    index = list(model.graph.node).index(node)
    model.graph.node.insert(index, nothing)
    node.input[:] = ["nothing_asked", "nothing_asked", total, total]


def _model(text: str, **constants: NDArray[Any]) -> onnx.ModelProto:
    model = onnx.parser.parse_model(HEADER + text)
    for name, value in constants.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    onnx.checker.check_model(model)
    return model
