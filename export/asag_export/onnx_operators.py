"""The `asag` operators as ONNX functions: bodies of standard operators that any runtime executes.

A graph refers to an operator by name in the domain `asag`; the model carries the function.  ONNX Runtime and
TensorRT-RTX execute the body, TensorRT replaces it by a plugin of the same name, if there is one.  The
references are the functions of the same names in `asag_training.network.operators`; the attributes are
theirs, and the plugins'.

Shapes are (B, ...) as there.  Shape arithmetic is int64; coordinates and scores are float32 whatever the
type of the features.

Bodies are onnxscript, which is a subset of Python that is compiled, not run: hence the plain style.
"""

# Annotations and operators below are ONNX's, for onnxscript to read; to a type checker they make no sense.
# mypy: disable-error-code="arg-type, misc, no-untyped-def, operator, valid-type"

from __future__ import annotations

from collections.abc import Collection

import onnx
import onnxscript
from onnx import helper
from onnxscript import BOOL, FLOAT, INT64
from onnxscript import opset20 as op

from asag_training.network.operators import MIXING_ACTIVATIONS, ONNX_VERSION

DOMAIN = "asag"
OPSET = onnxscript.values.Opset(DOMAIN, ONNX_VERSION)


@onnxscript.script(OPSET, default_opset=op)
def MultiscaleRoIAlign(p2, p3, p4, p5, boxes: FLOAT["B", "Q", 4], strides: list[int]):
    """Sample each box on its own level only: the corners are gathered from the flattened pyramid."""
    one = op.Constant(value_ints=[1])
    shape2, shape3, shape4, shape5 = op.Shape(p2), op.Shape(p3), op.Shape(p4), op.Shape(p5)
    rows = op.Constant(value_ints=[1])
    columns = op.Constant(value_ints=[2])
    heights = op.Concat(
        op.Gather(shape2, rows),
        op.Gather(shape3, rows),
        op.Gather(shape4, rows),
        op.Gather(shape5, rows),
        axis=0,
    )
    widths = op.Concat(
        op.Gather(shape2, columns),
        op.Gather(shape3, columns),
        op.Gather(shape4, columns),
        op.Gather(shape5, columns),
        axis=0,
    )
    areas = heights * widths
    starts = op.CumSum(areas, op.Constant(value_int=0), exclusive=1)

    x1, y1, x2, y2 = op.Split(boxes, num_outputs=4, axis=-1)  # each (B, Q, 1)
    side = op.Sqrt((x2 - x1) * (y2 - y1))
    two = op.Constant(value_float=2.0)
    raw_level = op.Floor(4.0 + op.Log(side / 224.0) / op.Log(two) + 0.000001)
    stride_of = op.Cast(op.Constant(value_ints=strides), to=1)
    finest = op.Round(op.Log(op.Gather(stride_of, op.Constant(value_int=0))) / op.Log(two))
    level = op.Cast(op.Clip(raw_level - finest, 0.0, 3.0), to=7)  # (B, Q, 1)

    scale = op.Gather(stride_of, level)
    height, width = op.Gather(heights, level), op.Gather(widths, level)  # (B, Q, 1)
    left, top = x1 / scale, y1 / scale
    cell_w = op.Max(x2 / scale - left, 1.0) / 14.0
    cell_h = op.Max(y2 / scale - top, 1.0) / 14.0
    step = op.Range(0.5, 14.5, 1.0)
    x, y = left + step * cell_w, top + step * cell_h  # (B, Q, 14)

    last_x, last_y = op.Cast(width - one, to=1), op.Cast(height - one, to=1)
    in_x = op.Cast(op.And(x >= -1.0, x <= last_x + 1.0), to=1)
    in_y = op.Cast(op.And(y >= -1.0, y <= last_y + 1.0), to=1)
    x, y = op.Min(op.Max(x, 0.0), last_x), op.Min(op.Max(y, 0.0), last_y)
    low_x, low_y = op.Floor(x), op.Floor(y)
    part_x, part_y = x - low_x, y - low_y
    axis = op.Constant(value_ints=[-1])
    # (B, Q, 14, 2) -> (B, Q, 7, 4): for every bin its two samples' lower and upper cells
    bins = op.Constant(value_ints=[0, 0, 7, 4])
    high_x, high_y = op.Min(low_x + 1.0, last_x), op.Min(low_y + 1.0, last_y)
    weight_low_x, weight_high_x = (1.0 - part_x) * in_x, part_x * in_x
    weight_low_y, weight_high_y = (1.0 - part_y) * in_y, part_y * in_y
    column = op.Concat(op.Unsqueeze(low_x, axis), op.Unsqueeze(high_x, axis), axis=-1)
    row = op.Concat(op.Unsqueeze(low_y, axis), op.Unsqueeze(high_y, axis), axis=-1)
    column_weight = op.Concat(op.Unsqueeze(weight_low_x, axis), op.Unsqueeze(weight_high_x, axis), axis=-1)
    row_weight = op.Concat(op.Unsqueeze(weight_low_y, axis), op.Unsqueeze(weight_high_y, axis), axis=-1)
    column = op.Cast(op.Reshape(column, bins), to=7)
    row = op.Cast(op.Reshape(row, bins), to=7)
    column_weight = op.Reshape(column_weight, bins)
    row_weight = op.Reshape(row_weight, bins)

    # Combine to (B, Q, 7, 7, 4, 4): bin row, bin column, tap row, tap column.
    across = op.Constant(value_ints=[2, 4])
    down = op.Constant(value_ints=[3, 5])
    everywhere = op.Constant(value_ints=[3, 4, 5])
    shape = op.Shape(boxes)
    batch = op.Squeeze(op.Gather(shape, op.Constant(value_ints=[0])))
    image = op.Range(op.Constant(value_int=0), batch, op.Constant(value_int=1))
    image = op.Reshape(image, op.Constant(value_ints=[-1, 1, 1]))
    base = op.Gather(starts * batch, level) + op.Gather(areas, level) * image
    base = op.Unsqueeze(base, everywhere)
    index = base + op.Unsqueeze(row, down) * op.Unsqueeze(width, everywhere) + op.Unsqueeze(column, across)
    weight = op.Unsqueeze(row_weight, down) * op.Unsqueeze(column_weight, across) / 4.0

    depth = op.Gather(shape2, op.Constant(value_ints=[3]))
    flat = op.Concat(op.Constant(value_ints=[-1]), depth, axis=0)
    cells = op.Concat(
        op.Reshape(p2, flat), op.Reshape(p3, flat), op.Reshape(p4, flat), op.Reshape(p5, flat), axis=0
    )  # (cells of all images on P2, then on P3, ..., C)
    taps = op.Gather(cells, op.Reshape(index, op.Constant(value_ints=[-1, 16])))  # (B*Q*49, 16, C)
    weight = op.CastLike(op.Reshape(weight, op.Constant(value_ints=[-1, 1, 16])), p2)
    out = op.MatMul(weight, taps)
    queries = op.Slice(shape, op.Constant(value_ints=[0]), op.Constant(value_ints=[2]))
    out_shape = op.Concat(queries, op.Constant(value_ints=[7, 7]), depth, axis=0)
    return op.Reshape(out, out_shape)


@onnxscript.script(OPSET, default_opset=op)
def PyramidSample(
    p2,
    p3,
    p4,
    p5,
    xy: FLOAT["B", "Q", "G", "P", 2],
    weight: FLOAT["B", "Q", "G", "P", 4],
    strides: list[int],
):
    """Read sixteen taps per point, four corners on each of four levels, in one gather and one product."""
    rows, columns = op.Constant(value_ints=[1]), op.Constant(value_ints=[2])
    shape2, shape3, shape4, shape5 = op.Shape(p2), op.Shape(p3), op.Shape(p4), op.Shape(p5)
    heights = op.Concat(
        op.Gather(shape2, rows),
        op.Gather(shape3, rows),
        op.Gather(shape4, rows),
        op.Gather(shape5, rows),
        axis=0,
    )
    widths = op.Concat(
        op.Gather(shape2, columns),
        op.Gather(shape3, columns),
        op.Gather(shape4, columns),
        op.Gather(shape5, columns),
        axis=0,
    )
    areas = heights * widths
    starts = op.CumSum(areas, op.Constant(value_int=0), exclusive=1)

    # Cell coordinates on each level, (B, Q, G, P, 4).
    stride_of = op.Cast(op.Constant(value_ints=strides), to=1)
    last_axis = op.Constant(value_ints=[4])
    first, second = op.Constant(value_ints=[0]), op.Constant(value_ints=[1])
    x = op.Slice(xy, first, second, last_axis) / stride_of - 0.5
    y = op.Slice(xy, second, op.Constant(value_ints=[2]), last_axis) / stride_of - 0.5
    left, top = op.Floor(x), op.Floor(y)
    part_x, part_y = x - left, y - top
    last_x, last_y = op.Cast(widths, to=1) - 1.0, op.Cast(heights, to=1) - 1.0

    # Cells outside weigh nothing; their index is moved to one that exists.
    axis = op.Constant(value_ints=[-1])
    column = op.Concat(op.Unsqueeze(left, axis), op.Unsqueeze(left + 1.0, axis), axis=-1)
    row = op.Concat(op.Unsqueeze(top, axis), op.Unsqueeze(top + 1.0, axis), axis=-1)
    limit_x, limit_y = op.Unsqueeze(last_x, axis), op.Unsqueeze(last_y, axis)
    column_weight = op.Concat(op.Unsqueeze(1.0 - part_x, axis), op.Unsqueeze(part_x, axis), axis=-1)
    row_weight = op.Concat(op.Unsqueeze(1.0 - part_y, axis), op.Unsqueeze(part_y, axis), axis=-1)
    column_weight = column_weight * op.Cast(op.And(column >= 0.0, column <= limit_x), to=1)
    row_weight = row_weight * op.Cast(op.And(row >= 0.0, row <= limit_y), to=1)
    column = op.Cast(op.Min(op.Max(column, 0.0), limit_x), to=7)
    row = op.Cast(op.Min(op.Max(row, 0.0), limit_y), to=7)

    # Where the group's channels of each row's first cell are, (B, Q, G, P, level, row), and each column's
    # from there: what can be done before there are sixteen of them is done before.
    shape = op.Shape(xy)
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    batch, groups = op.Gather(shape, zero), op.Gather(shape, op.Constant(value_int=2))
    image = op.Reshape(op.Range(zero, batch, one), op.Constant(value_ints=[-1, 1]))
    start = (starts * batch + image * areas) * groups  # (B, 4)
    start = op.Unsqueeze(start, op.Constant(value_ints=[1, 2, 3, 5]))
    group = op.Reshape(op.Range(zero, groups, one), op.Constant(value_ints=[-1, 1, 1, 1]))
    row = row * op.Unsqueeze(widths * groups, axis) + (start + group)
    index = op.Unsqueeze(row, axis) + op.Unsqueeze(column * groups, op.Constant(value_ints=[-2]))
    # The point's weight comes last: OpenVINO 2026.4 computes the product of the two others alone wrongly.
    taps_weight = op.Unsqueeze(row_weight, axis) * op.Unsqueeze(column_weight, op.Constant(value_ints=[-2]))
    taps_weight = taps_weight * op.Unsqueeze(weight, op.Constant(value_ints=[5, 6]))

    channels = op.Gather(shape2, op.Constant(value_ints=[3]))
    flat = op.Concat(axis, channels, axis=0)
    cells = op.Concat(
        op.Reshape(p2, flat), op.Reshape(p3, flat), op.Reshape(p4, flat), op.Reshape(p5, flat), axis=0
    )
    width = channels / op.Reshape(groups, second)
    cells = op.Reshape(cells, op.Concat(axis, width, axis=0))
    taps = op.Gather(cells, op.Reshape(index, op.Constant(value_ints=[-1, 16])))
    taps_weight = op.CastLike(op.Reshape(taps_weight, op.Constant(value_ints=[-1, 1, 16])), p2)
    sampled = op.MatMul(taps_weight, taps)
    out_shape = op.Concat(op.Slice(shape, first, last_axis), width, axis=0)
    return op.Reshape(sampled, out_shape)


@onnxscript.script(OPSET, default_opset=op)
def DeformableSample(
    p2,
    p3,
    p4,
    p5,
    xy: FLOAT["B", "Q", "G", 4, "P", 2],
    weight: FLOAT["B", "Q", "G", 4, "P"],
):
    """Read one level after the other by the standard GridSample: an encoder has too many taps for one gather.

    Points come before queries, so that adding up a query's points adds long rows.  Maps are float32 whatever
    they were, for GridSample wants them of the type of the coordinates.
    """
    batch, groups = op.Shape(xy, start=0, end=1), op.Shape(xy, start=2, end=3)
    points, queries = op.Shape(xy, start=4, end=5), op.Constant(value_ints=[-1])
    one, two, images = op.Constant(value_ints=[1]), op.Constant(value_ints=[2]), batch * groups
    depth = op.Shape(p2, start=3, end=4)
    start = op.Concat(images, depth / groups, axis=0)
    map2 = op.Transpose(op.Cast(p2, to=1), perm=[0, 3, 1, 2])
    map3 = op.Transpose(op.Cast(p3, to=1), perm=[0, 3, 1, 2])
    map4 = op.Transpose(op.Cast(p4, to=1), perm=[0, 3, 1, 2])
    map5 = op.Transpose(op.Cast(p5, to=1), perm=[0, 3, 1, 2])
    map2 = op.Reshape(map2, op.Concat(start, op.Shape(p2, start=1, end=3), axis=0))  # (B G, C / G, h, w)
    map3 = op.Reshape(map3, op.Concat(start, op.Shape(p3, start=1, end=3), axis=0))
    map4 = op.Reshape(map4, op.Concat(start, op.Shape(p4, start=1, end=3), axis=0))
    map5 = op.Reshape(map5, op.Concat(start, op.Shape(p5, start=1, end=3), axis=0))

    grid = op.Transpose(xy * 2.0 - 1.0, perm=[3, 0, 2, 4, 1, 5])  # (4, B, G, P, Q, 2)
    grid2, grid3, grid4, grid5 = op.Split(grid, num_outputs=4, axis=0)
    of_grid = op.Concat(images, points, queries, two, axis=0)
    grid2, grid3 = op.Reshape(grid2, of_grid), op.Reshape(grid3, of_grid)
    grid4, grid5 = op.Reshape(grid4, of_grid), op.Reshape(grid5, of_grid)
    weight = op.Transpose(weight, perm=[3, 0, 2, 4, 1])  # (4, B, G, P, Q)
    weight2, weight3, weight4, weight5 = op.Split(weight, num_outputs=4, axis=0)
    of_weight = op.Concat(images, one, points, queries, axis=0)
    weight2, weight3 = op.Reshape(weight2, of_weight), op.Reshape(weight3, of_weight)
    weight4, weight5 = op.Reshape(weight4, of_weight), op.Reshape(weight5, of_weight)

    # Each (B G, C / G, P, Q); `function_of` names the mode as the version of the operators has it.
    tap2 = op.GridSample(map2, grid2, align_corners=0, mode="linear", padding_mode="zeros") * weight2
    tap3 = op.GridSample(map3, grid3, align_corners=0, mode="linear", padding_mode="zeros") * weight3
    tap4 = op.GridSample(map4, grid4, align_corners=0, mode="linear", padding_mode="zeros") * weight4
    tap5 = op.GridSample(map5, grid5, align_corners=0, mode="linear", padding_mode="zeros") * weight5
    sum2, sum3 = op.ReduceSum(tap2, two, keepdims=0), op.ReduceSum(tap3, two, keepdims=0)
    sum4, sum5 = op.ReduceSum(tap4, two, keepdims=0), op.ReduceSum(tap5, two, keepdims=0)
    out = op.Reshape(sum2 + sum3 + sum4 + sum5, op.Concat(batch, depth, queries, axis=0))
    return op.CastLike(op.Transpose(out, perm=[0, 2, 1]), p2)


@onnxscript.script(OPSET, default_opset=op)
def AdaptiveMixing(
    sampled, parameters, groups: int, points: int, channels: int, out_points: int, activation: int
):
    """Multiply, normalise and activate twice.  The attributes make shapes constants, which runtimes fold.

    It is written with ReLU as the activation; `function_of` puts another in its place.
    """
    keep, vector = op.Constant(value_ints=[0, 0]), op.Constant(value_ints=[1])
    group = op.Reshape(op.Constant(value_int=groups), vector)
    point = op.Reshape(op.Constant(value_int=points), vector)
    channel = op.Reshape(op.Constant(value_int=channels), vector)
    made = op.Reshape(op.Constant(value_int=out_points), vector)
    lead = op.Concat(keep, group, axis=0)

    over_channels, over_points = channel * channel, made * point
    matrices = op.Reshape(parameters, op.Concat(lead, over_channels + over_points, axis=0))
    channel_mix, point_mix = op.Split(matrices, op.Concat(over_channels, over_points, axis=0), axis=-1)
    channel_mix = op.Reshape(channel_mix, op.Concat(lead, channel, channel, axis=0))
    point_mix = op.Reshape(point_mix, op.Concat(lead, made, point, axis=0))

    one = op.CastLike(op.Constant(value_float=1.0), sampled)
    numbers, numbers_made = point * channel, made * channel
    mixed = op.Reshape(op.MatMul(sampled, channel_mix), op.Concat(lead, numbers, axis=0))
    mixed = op.LayerNormalization(mixed, op.Expand(one, numbers))
    mixed = op.Relu(op.Reshape(mixed, op.Concat(lead, point, channel, axis=0)))
    mixed = op.Reshape(op.MatMul(point_mix, mixed), op.Concat(lead, numbers_made, axis=0))
    mixed = op.Relu(op.LayerNormalization(mixed, op.Expand(one, numbers_made)))
    return op.Reshape(mixed, op.Concat(keep, group * numbers_made, axis=0))


@onnxscript.script(OPSET, default_opset=op)
def PadAnchors(
    anchors: FLOAT["B", "N", 5],
    keep: BOOL["B", "N"],
    image_size: INT64["B", 2],
    slots: INT64["Q"],
    first_level: int,
    floor: int,
    cap: int,
):
    """Sort by one key whose three terms are the floor, the cap and the padding."""
    zero, one, two = op.Constant(value_ints=[0]), op.Constant(value_ints=[1]), op.Constant(value_ints=[2])
    four, five = op.Constant(value_ints=[4]), op.Constant(value_ints=[5])
    first = op.Reshape(op.Constant(value_int=first_level), one)
    shape = op.Shape(keep)
    batch, total = op.Gather(shape, zero), op.Gather(shape, one)
    score = op.Squeeze(op.Slice(anchors, four, five, two), two)

    # Rank of each first-level anchor by score: the inverse of the order that sorts them.
    _best, best_first = op.TopK(op.Slice(score, zero, first, one), first, axis=1, largest=1, sorted=1)
    _place, rank = op.TopK(op.Cast(best_first, to=1), first, axis=1, largest=0, sorted=1)
    first_keep = op.Slice(keep, zero, first, one)
    short = op.ReduceSum(op.Cast(first_keep, to=7), one, keepdims=1) < op.Constant(value_int=floor)
    among_best = rank < op.Constant(value_int=floor)
    first_keep = op.Or(op.And(short, among_best), op.And(op.Not(short), first_keep))
    keep = op.Concat(first_keep, op.Slice(keep, first, total, one), axis=1)

    place = op.Range(op.Constant(value_int=0), op.Squeeze(total), op.Constant(value_int=1))
    place = op.Expand(op.Unsqueeze(place, zero), shape)
    first_place = op.Where(short, rank, op.Slice(place, zero, first, one))
    place = op.Concat(first_place, op.Slice(place, first, total, one), axis=1)

    kept = op.ReduceSum(op.Cast(keep, to=7), one, keepdims=0)
    # The number of queries from their values, not from their shape, which an engine knows on the host alone.
    given = op.ReduceSum(op.Cast(slots >= op.Constant(value_int=0), to=7), zero, keepdims=1)
    limit = op.Min(op.Constant(value_int=cap), given)
    over = op.Unsqueeze(kept > limit, one)
    never = op.Constant(value_float=-1e30)
    key = op.Where(keep, op.Where(over, score, op.Neg(op.Cast(place, to=1))), never)
    queries = op.Shape(slots)
    key = op.Concat(key, op.Expand(never, op.Concat(batch, queries, axis=0)), axis=1)
    _key, order = op.TopK(key, queries, axis=1, largest=1, sorted=1)

    nowhere = op.Expand(op.Constant(value_float=0.0), op.Concat(batch, queries, four, axis=0))
    boxes = op.Concat(op.Slice(anchors, zero, four, two), nowhere, axis=1)
    order = op.Expand(op.Unsqueeze(order, two), op.Concat(batch, queries, four, axis=0))
    chosen = op.GatherElements(boxes, order, axis=1)

    count = op.Min(kept, limit)
    real = op.Unsqueeze(op.Unsqueeze(slots, zero) < op.Unsqueeze(count, one), two)
    size = op.Cast(image_size, to=1)
    height, width = op.Slice(size, zero, one, one), op.Slice(size, one, two, one)
    whole = op.Concat(width / 2.0, height / 2.0, width, height, axis=1)
    padded = op.Where(real, chosen, op.Unsqueeze(whole, one))
    return padded, count


FUNCTIONS = (MultiscaleRoIAlign, PyramidSample, DeformableSample, AdaptiveMixing, PadAnchors)

_LINEAR_SINCE = 20
"""Since when GridSample calls its mode "linear", which was "bilinear" before."""


def function_of(
    script: onnxscript.OnnxFunction, nodes: Collection[onnx.NodeProto], opset: int
) -> onnx.FunctionProto:
    """Write an operator as a function of standard operators of version `opset`, for these nodes that call it.

    What no attribute can say, the activation of adaptive mixing, is that of the nodes.
    """
    proto = script.to_function_proto()
    for imported in proto.opset_import:
        imported.version = ONNX_VERSION if imported.domain == DOMAIN else opset
    if opset < _LINEAR_SINCE:
        _use_former_mode(proto)
    if script.name == AdaptiveMixing.name:
        (activation,) = {each.i for node in nodes for each in node.attribute if each.name == "activation"}
        if MIXING_ACTIVATIONS[activation] == "gelu":
            _use_gelu(proto, opset)
    return proto


def _use_former_mode(proto: onnx.FunctionProto) -> None:
    """Give every GridSample the mode's former name."""
    for node in proto.node:
        for attribute in node.attribute:
            if node.op_type == "GridSample" and attribute.name == "mode":
                attribute.s = b"bilinear"


def _use_gelu(proto: onnx.FunctionProto, opset: int) -> None:
    """Put GELU in the place of every ReLU."""
    nodes: list[onnx.NodeProto] = []
    for node in proto.node:
        nodes += _gelu(node.input[0], node.output[0], opset) if node.op_type == "Relu" else [node]
    written = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del proto.node[:]
    proto.node.extend(written)


def _gelu(x: str, out: str, opset: int) -> list[onnx.NodeProto]:
    """Compute GELU: one node since opset 20, before that x (1 + erf(x / sqrt 2)) / 2."""
    if opset >= 20:
        return [helper.make_node("Gelu", [x], [out])]

    def constant(name: str, value: float) -> list[onnx.NodeProto]:
        return [
            helper.make_node("Constant", [], [f"{name}_float"], value_float=value),
            helper.make_node("CastLike", [f"{name}_float", x], [name]),
        ]

    root, one, half, scaled, erf, upper, part = (f"{out}_{i}" for i in range(7))
    return [
        *constant(root, 2**0.5),
        *constant(one, 1.0),
        *constant(half, 0.5),
        helper.make_node("Div", [x, root], [scaled]),
        helper.make_node("Erf", [scaled], [erf]),
        helper.make_node("Add", [erf, one], [upper]),
        helper.make_node("Mul", [half, upper], [part]),
        helper.make_node("Mul", [x, part], [out]),
    ]
