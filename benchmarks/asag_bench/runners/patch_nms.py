"""Patch NMS as an ONNX graph, for the reference that has the whole network in one graph.

No bundle holds it: its loop is one that an engine decides on the host.  It is written as the functions of
`asag_export.onnx_operators` are; its reference is `asag_training.network.operators.patch_nms`.
"""

# Annotations and operators below are ONNX's, for onnxscript to read; to a type checker they make no sense.
# mypy: disable-error-code="arg-type, misc, no-untyped-def, operator, valid-type"

from __future__ import annotations

import onnx
import onnx.inliner
import onnxscript
from onnx import TensorProto, helper
from onnxscript import BOOL, FLOAT, INT64
from onnxscript import opset20 as op

from asag_deploy.bundle.manifest import ProbeLevel, Probing
from asag_export.onnx_operators import DOMAIN, OPSET


def patch_nms_model(probing: Probing, level: ProbeLevel, opset: int) -> onnx.ModelProto:
    """Build a graph that finds where `level` looks, in standard operators of that version of ONNX's.

    anchors (B, N, 5), selected (B, N), image_size (B, 2) -> origins (B, capacity, 2), patches (B,).
    """
    attributes = {
        "stride": level.stride,
        "patch_size": probing.patch_size,
        "iou_threshold": probing.patch_nms_iou,
        "capacity": level.capacity,
        "max_candidates": probing.max_candidates,
    }
    inputs, outputs = ("anchors", "selected", "image_size"), ("origins", "patches")
    node = helper.make_node("PatchNMS", inputs, outputs, domain=DOMAIN, **attributes)
    graph = helper.make_graph(
        [node],
        "select",
        [
            helper.make_tensor_value_info("anchors", TensorProto.FLOAT, ["batch", "anchors", 5]),
            helper.make_tensor_value_info("selected", TensorProto.BOOL, ["batch", "anchors"]),
            helper.make_tensor_value_info("image_size", TensorProto.INT64, ["batch", 2]),
        ],
        [
            helper.make_tensor_value_info("origins", TensorProto.INT64, ["batch", level.capacity, 2]),
            helper.make_tensor_value_info("patches", TensorProto.INT64, ["batch"]),
        ],
    )
    function = PatchNMS.to_function_proto()
    for imported in function.opset_import:
        imported.version = OPSET.version if imported.domain == DOMAIN else opset
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, OPSET.version)]
    model = helper.make_model(graph, opset_imports=imports, functions=[function], ir_version=10)
    return onnx.inliner.inline_local_functions(model)


@onnxscript.script(OPSET, default_opset=op)
def PatchNMS(
    anchors: FLOAT["B", "N", 5],
    selected: BOOL["B", "N"],
    image_size: INT64["B", 2],
    stride: int,
    patch_size: int,
    iou_threshold: float,
    capacity: int,
    max_candidates: int,
):
    """Greedy NMS as the fixpoint of 'kept unless an earlier kept one suppresses it', mostly a few rounds."""
    side = op.Cast(op.Constant(value_int=patch_size), to=1)
    pitch = op.Cast(op.Constant(value_int=stride), to=1)
    half = 0.5 * side * pitch
    first, second = op.Constant(value_ints=[0]), op.Constant(value_ints=[1])
    third, last_axis = op.Constant(value_ints=[2]), op.Constant(value_ints=[2])
    fifth, sixth = op.Constant(value_ints=[4]), op.Constant(value_ints=[5])

    score = op.Squeeze(op.Slice(anchors, fifth, sixth, last_axis), last_axis)
    score = op.Where(selected, score, op.CastLike(-1.0, score))
    shape = op.Shape(score)
    batch = op.Gather(shape, first)
    most = op.Reshape(op.Constant(value_int=max_candidates), op.Constant(value_ints=[1]))
    count = op.Min(op.Gather(shape, second), most)
    best, order = op.TopK(score, count, axis=1, largest=1, sorted=1)
    all_x = op.Squeeze(op.Slice(anchors, first, second, last_axis), last_axis)
    all_y = op.Squeeze(op.Slice(anchors, second, third, last_axis), last_axis)
    centre_x = op.GatherElements(all_x, order, axis=1)
    centre_y = op.GatherElements(all_y, order, axis=1)
    x1, y1, x2, y2 = centre_x - half, centre_y - half, centre_x + half, centre_y + half  # (B, M)

    left = op.Max(op.Unsqueeze(x1, last_axis), op.Unsqueeze(x1, second))
    right = op.Min(op.Unsqueeze(x2, last_axis), op.Unsqueeze(x2, second))
    top = op.Max(op.Unsqueeze(y1, last_axis), op.Unsqueeze(y1, second))
    bottom = op.Min(op.Unsqueeze(y2, last_axis), op.Unsqueeze(y2, second))
    shared = op.Max(right - left, 0.0) * op.Max(bottom - top, 0.0)  # (B, M, M)
    area = (x2 - x1) * (y2 - y1)
    iou = shared / (op.Unsqueeze(area, last_axis) + op.Unsqueeze(area, second) - shared)
    index = op.Range(op.Constant(value_int=0), op.Squeeze(count), op.Constant(value_int=1))
    earlier = op.Unsqueeze(index, first) < op.Unsqueeze(index, second)
    suppresses = op.Cast(op.And(iou > op.Constant(value_float=iou_threshold), earlier), to=1)

    valid = op.Cast(best >= 0.0, to=1)
    keep = valid
    unsettled = op.Cast(op.Constant(value_int=1), to=9)
    while unsettled:
        hits = op.Squeeze(op.MatMul(suppresses, op.Unsqueeze(keep, last_axis)), last_axis)
        settled = valid * op.Cast(hits < 0.5, to=1)
        unsettled = op.ReduceMax(op.Abs(settled - keep), keepdims=0) > 0.5
        keep = settled

    cells = op.Ceil(op.Cast(image_size, to=1) / pitch)  # (B, 2) height, width
    rows = op.Slice(cells, first, second, second)
    columns = op.Slice(cells, second, third, second)
    origin_x = op.Floor((x1 + x2) / 2.0 / pitch - side / 2.0)
    origin_y = op.Floor((y1 + y2) / 2.0 / pitch - side / 2.0)
    origin_x = op.Max(op.Min(origin_x, columns - side), 0.0) * keep
    origin_y = op.Max(op.Min(origin_y, rows - side), 0.0) * keep

    # Kept patches first and in order; enough empty ones behind them to fill every slot.
    slots = op.Reshape(op.Constant(value_int=capacity), op.Constant(value_ints=[1]))
    empty = op.Expand(op.Constant(value_float=0.0), op.Concat(batch, slots, axis=0))
    priority = op.Concat(keep * (op.Cast(count, to=1) - op.Cast(index, to=1)), empty, axis=1)
    _priority, rank = op.TopK(priority, slots, axis=1, largest=1, sorted=1)
    origin_x = op.GatherElements(op.Concat(origin_x, empty, axis=1), rank, axis=1)
    origin_y = op.GatherElements(op.Concat(origin_y, empty, axis=1), rank, axis=1)
    origins = op.Concat(op.Unsqueeze(origin_x, last_axis), op.Unsqueeze(origin_y, last_axis), axis=2)
    kept = op.Cast(op.ReduceSum(keep, second, keepdims=0), to=7)
    return op.Cast(origins, to=7), kept
