"""The compiled kernels of `plugins/`, called from Python: for the GPU backends, and for tests on the CPU."""

from asag_deploy.kernels.buffers import Buffer, buffer_of
from asag_deploy.kernels.library import (
    LIBRARY_VARIABLE,
    KernelLibrary,
    cuda_library_path,
    open_cuda_library,
)
from asag_deploy.kernels.operators import (
    add_decide,
    decide,
    deformable_sample,
    multiscale_roi_align,
    pad_anchors,
    patch_nms,
    postprocess,
    preprocess,
    pyramid_sample,
)

__all__ = [
    "LIBRARY_VARIABLE",
    "Buffer",
    "KernelLibrary",
    "add_decide",
    "buffer_of",
    "cuda_library_path",
    "decide",
    "deformable_sample",
    "multiscale_roi_align",
    "open_cuda_library",
    "pad_anchors",
    "patch_nms",
    "postprocess",
    "preprocess",
    "pyramid_sample",
]
