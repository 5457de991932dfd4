"""The C structures of `plugins/include/asag/asag_kernels.h`, field by field."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Any

INTERFACE_VERSION = 10
MAX_LEVELS = 4
MOST_POINTS = 64
"""Of deformable sampling, on a level."""

FLOAT32 = 0
FLOAT16 = 1
UINT8 = 2
BFLOAT16 = 3

PATCHES = 1
COUNT_COLUMNS = 4
"""Of the counts: the column that patch NMS writes, and how many there are."""

GELU = 0
RELU = 1

_Int = ctypes.c_int32
_Pointer = ctypes.c_void_p
_PerLevel = ctypes.c_int32 * MAX_LEVELS


def _fields(kind: type[Any], names: str) -> tuple[tuple[str, type[Any]], ...]:
    """Return fields of one type, in order."""
    return tuple((name, kind) for name in names.split())


class Pyramid(ctypes.Structure):
    """`AsagPyramid`: feature maps (B, h, w, C), finest level first."""

    _fields_ = (
        ("maps", _Pointer * MAX_LEVELS),
        *_fields(_PerLevel, "heights widths strides"),
        *_fields(_Int, "levels batch channels type"),
    )


class MultiscaleRoIAlign(ctypes.Structure):
    """`AsagMultiscaleRoIAlign`."""

    _fields_ = (("features", Pyramid), *_fields(_Pointer, "boxes out"), ("queries", _Int))


class PyramidSample(ctypes.Structure):
    """`AsagPyramidSample`."""

    _fields_ = (
        ("features", Pyramid),
        *_fields(_Pointer, "xy weight out"),
        *_fields(_Int, "queries groups points"),
    )


class DeformableSample(ctypes.Structure):
    """`AsagDeformableSample`."""

    _fields_ = (
        ("features", Pyramid),
        *_fields(_Pointer, "xy weight out"),
        *_fields(_Int, "queries groups points"),
    )


class PatchNMS(ctypes.Structure):
    """`AsagPatchNMS`."""

    _fields_ = (
        *_fields(_Pointer, "anchors selected image_size origins counts"),
        *_fields(_Int, "type batch anchor_count stride patch_size capacity max_candidates"),
        ("iou_threshold", ctypes.c_float),
    )


class PadAnchors(ctypes.Structure):
    """`AsagPadAnchors`."""

    _fields_ = (
        *_fields(_Pointer, "anchors keep image_size queries counts"),
        *_fields(_Int, "type batch anchor_count slots first_level floor cap"),
    )


class Preprocess(ctypes.Structure):
    """`AsagPreprocess`."""

    _fields_ = (
        *_fields(_Pointer, "image out"),
        *_fields(_Int, "height width new_height new_width batch_height batch_width type"),
        *_fields(ctypes.c_float * 3, "mean deviation"),
        ("bgr", _Int),
    )


class Postprocess(ctypes.Structure):
    """`AsagPostprocess`."""

    _fields_ = (
        *_fields(_Pointer, "scores labels boxes original_shape xyxy confidence class_id counts"),
        *_fields(_Int, "type batch detections"),
        ("nms_iou", ctypes.c_float),
    )


class Decide(ctypes.Structure):
    """`AsagDecide`."""

    _fields_ = (
        *_fields(_Pointer, "counts probed patch_count any"),
        ("condition", ctypes.c_uint64),
        *_fields(_Int, "conditional batch level levels min_selected max_patches"),
    )


class HostBlock(ctypes.Structure):
    """`AsagHostBlock`: how the host library executes a block of threads."""

    _fields_ = (("threads", _Int), ("seed", ctypes.c_uint32))


class Cpu(ctypes.Structure):
    """`AsagCpu`: threads, the type of the result, and what the integers of a map stand for."""

    _fields_ = (*_fields(_Int, "threads out_type"), ("scales", ctypes.c_float * MAX_LEVELS))

    @staticmethod
    def scales_of(scales: Iterable[float]) -> ctypes.Array[ctypes.c_float]:
        """Return the scales of the first levels; those of the others are 0."""
        return (ctypes.c_float * MAX_LEVELS)(*scales)


class TopK(ctypes.Structure):
    """`AsagTopK`."""

    _fields_ = (*_fields(_Pointer, "values largest indices"), *_fields(ctypes.c_int64, "rows count k"))


class AdaptiveMixing(ctypes.Structure):
    """`AsagAdaptiveMixing`."""

    _fields_ = (
        *_fields(_Pointer, "sampled parameters out"),
        *_fields(_Int, "batch queries groups points out_points channels activation"),
        *_fields(_Int, "sampled_type parameters_type"),
    )
