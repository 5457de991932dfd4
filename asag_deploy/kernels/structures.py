"""The C structures of `plugins/include/asag/asag_kernels.h`, field by field."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Any

from asag_deploy.errors import BackendError

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
_LEAST, _MOST = -(2**31), 2**31 - 1


def _fields(kind: type[Any], names: str) -> tuple[tuple[str, type[Any]], ...]:
    """Return fields of one type, in order."""
    return tuple((name, kind) for name in names.split())


class _Structure(ctypes.Structure):
    """A structure whose numbers of 32 bits are those that were given: ctypes alone would cut off upper bits.

    It looks at what the constructor is given.  BackendError says which does not fit.
    """

    _numbers: tuple[tuple[int, str], ...]
    """Place and name of each such field."""

    def __init_subclass__(cls) -> None:
        cls._numbers = tuple((i, field[0]) for i, field in enumerate(cls._fields_) if field[1] is _Int)

    def __init__(self, *values: Any, **named: Any) -> None:
        for i, name in self._numbers:
            check_int32(name, values[i] if i < len(values) else named.get(name, 0))
        super().__init__(*values, **named)


def check_int32(name: str, value: Any) -> None:
    """Raise BackendError for a whole number that the library has no room for."""
    if not _LEAST <= value <= _MOST:
        raise BackendError(f"the kernels were given {name} {value}; expected {_LEAST} to {_MOST} at most")


def per_level(name: str, values: Iterable[int]) -> ctypes.Array[ctypes.c_int32]:
    """Return a number of each of the first levels; those of the others are 0."""
    numbers = tuple(values)
    for number in numbers:
        check_int32(name, number)
    return _PerLevel(*numbers)


class Pyramid(_Structure):
    """`AsagPyramid`: feature maps (B, h, w, C), finest level first."""

    _fields_ = (
        ("maps", _Pointer * MAX_LEVELS),
        *_fields(_PerLevel, "heights widths strides"),
        *_fields(_Int, "levels batch channels type"),
    )


class MultiscaleRoIAlign(_Structure):
    """`AsagMultiscaleRoIAlign`."""

    _fields_ = (("features", Pyramid), *_fields(_Pointer, "boxes out"), ("queries", _Int))


class PyramidSample(_Structure):
    """`AsagPyramidSample`."""

    _fields_ = (
        ("features", Pyramid),
        *_fields(_Pointer, "xy weight out"),
        *_fields(_Int, "queries groups points"),
    )


class DeformableSample(_Structure):
    """`AsagDeformableSample`."""

    _fields_ = (
        ("features", Pyramid),
        *_fields(_Pointer, "xy weight out"),
        *_fields(_Int, "queries groups points"),
    )


class PatchNMS(_Structure):
    """`AsagPatchNMS`."""

    _fields_ = (
        *_fields(_Pointer, "anchors selected image_size origins counts"),
        *_fields(_Int, "type batch anchor_count stride patch_size capacity max_candidates"),
        ("iou_threshold", ctypes.c_float),
    )


class PadAnchors(_Structure):
    """`AsagPadAnchors`."""

    _fields_ = (
        *_fields(_Pointer, "anchors keep image_size queries counts"),
        *_fields(_Int, "type batch anchor_count slots first_level floor cap"),
    )


class Preprocess(_Structure):
    """`AsagPreprocess`."""

    _fields_ = (
        *_fields(_Pointer, "image out"),
        *_fields(_Int, "height width new_height new_width batch_height batch_width type"),
        *_fields(ctypes.c_float * 3, "mean deviation"),
        ("bgr", _Int),
    )


class Postprocess(_Structure):
    """`AsagPostprocess`."""

    _fields_ = (
        *_fields(_Pointer, "scores labels boxes original_shape xyxy confidence class_id counts"),
        *_fields(_Int, "type batch detections"),
        ("nms_iou", ctypes.c_float),
    )


class Decide(_Structure):
    """`AsagDecide`."""

    _fields_ = (
        *_fields(_Pointer, "counts probed patch_count any"),
        ("condition", ctypes.c_uint64),
        *_fields(_Int, "conditional batch level levels min_selected max_patches"),
    )


class HostBlock(_Structure):
    """`AsagHostBlock`: how the host library executes a block of threads."""

    _fields_ = (("threads", _Int), ("seed", ctypes.c_uint32))


class Cpu(_Structure):
    """`AsagCpu`: threads, the type of the result, and what the integers of a map stand for."""

    _fields_ = (*_fields(_Int, "threads out_type"), ("scales", ctypes.c_float * MAX_LEVELS))

    @staticmethod
    def scales_of(scales: Iterable[float]) -> ctypes.Array[ctypes.c_float]:
        """Return the scales of the first levels; those of the others are 0."""
        return (ctypes.c_float * MAX_LEVELS)(*scales)


class TopK(_Structure):
    """`AsagTopK`."""

    _fields_ = (*_fields(_Pointer, "values largest indices"), *_fields(ctypes.c_int64, "rows count k"))


class AdaptiveMixing(_Structure):
    """`AsagAdaptiveMixing`."""

    _fields_ = (
        *_fields(_Pointer, "sampled parameters out"),
        *_fields(_Int, "batch queries groups points out_points channels activation"),
        *_fields(_Int, "sampled_type parameters_type"),
    )
