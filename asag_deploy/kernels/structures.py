"""The C structures of `plugins/include/asag/asag_kernels.h`, field by field."""

from __future__ import annotations

import ctypes

INTERFACE_VERSION = 4
MAX_LEVELS = 4

FLOAT32 = 0
FLOAT16 = 1
UINT8 = 2

_Int = ctypes.c_int32
_Pointer = ctypes.c_void_p
_PerLevel = ctypes.c_int32 * MAX_LEVELS


class Pyramid(ctypes.Structure):
    """`AsagPyramid`: feature maps (B, h, w, C), finest level first."""

    _fields_ = (
        ("maps", _Pointer * MAX_LEVELS),
        ("heights", _PerLevel),
        ("widths", _PerLevel),
        ("strides", _PerLevel),
        ("levels", _Int),
        ("batch", _Int),
        ("channels", _Int),
        ("type", _Int),
    )


class MultiscaleRoIAlign(ctypes.Structure):
    """`AsagMultiscaleRoIAlign`."""

    _fields_ = (("features", Pyramid), ("boxes", _Pointer), ("out", _Pointer), ("queries", _Int))


class PyramidSample(ctypes.Structure):
    """`AsagPyramidSample`."""

    _fields_ = (
        ("features", Pyramid),
        ("xy", _Pointer),
        ("weight", _Pointer),
        ("out", _Pointer),
        ("queries", _Int),
        ("groups", _Int),
        ("points", _Int),
    )


class PatchNMS(ctypes.Structure):
    """`AsagPatchNMS`."""

    _fields_ = (
        ("anchors", _Pointer),
        ("selected", _Pointer),
        ("image_size", _Pointer),
        ("origins", _Pointer),
        ("counts", _Pointer),
        ("type", _Int),
        ("batch", _Int),
        ("anchor_count", _Int),
        ("stride", _Int),
        ("patch_size", _Int),
        ("capacity", _Int),
        ("max_candidates", _Int),
        ("iou_threshold", ctypes.c_float),
    )


class PadAnchors(ctypes.Structure):
    """`AsagPadAnchors`."""

    _fields_ = (
        ("anchors", _Pointer),
        ("keep", _Pointer),
        ("image_size", _Pointer),
        ("queries", _Pointer),
        ("counts", _Pointer),
        ("type", _Int),
        ("batch", _Int),
        ("anchor_count", _Int),
        ("slots", _Int),
        ("first_level", _Int),
        ("floor", _Int),
        ("cap", _Int),
    )


class Preprocess(ctypes.Structure):
    """`AsagPreprocess`."""

    _fields_ = (
        ("image", _Pointer),
        ("out", _Pointer),
        ("height", _Int),
        ("width", _Int),
        ("new_height", _Int),
        ("new_width", _Int),
        ("batch_height", _Int),
        ("batch_width", _Int),
        ("type", _Int),
        ("mean", ctypes.c_float * 3),
        ("deviation", ctypes.c_float * 3),
        ("bgr", _Int),
    )


class Postprocess(ctypes.Structure):
    """`AsagPostprocess`."""

    _fields_ = (
        ("scores", _Pointer),
        ("labels", _Pointer),
        ("boxes", _Pointer),
        ("original_shape", _Pointer),
        ("xyxy", _Pointer),
        ("confidence", _Pointer),
        ("class_id", _Pointer),
        ("counts", _Pointer),
        ("type", _Int),
        ("batch", _Int),
        ("detections", _Int),
        ("nms_iou", ctypes.c_float),
    )


class Decide(ctypes.Structure):
    """`AsagDecide`."""

    _fields_ = (
        ("counts", _Pointer),
        ("probed", _Pointer),
        ("patch_count", _Pointer),
        ("any", _Pointer),
        ("condition", ctypes.c_uint64),
        ("conditional", _Int),
        ("batch", _Int),
        ("level", _Int),
        ("levels", _Int),
        ("min_selected", _Int),
        ("max_patches", _Int),
    )


class HostBlock(ctypes.Structure):
    """`AsagHostBlock`: how the host library executes a block of threads."""

    _fields_ = (("threads", _Int), ("seed", ctypes.c_uint32))
