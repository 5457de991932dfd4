"""The network's operators on the CPU: `asag_cpu_*` of the library `asag_kernels_host`, called on arrays.

Arrays are contiguous NumPy arrays or Buffers on the host.  NumPy does not know bfloat16; arrays of it have
the type `BFLOAT16`.  All functions raise ConfigError for an array of the wrong shape or type, and
BackendError where the library refuses.  Safe to call from several threads at once.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asag_deploy.errors import BackendError, ConfigError, Problem
from asag_deploy.kernels import structures
from asag_deploy.kernels.buffers import BFLOAT16, Arrays, Buffer, ScaledIntegers, buffer_of, expect
from asag_deploy.kernels.library import KernelLibrary
from asag_deploy.kernels.operators import TYPES, groups_of, pyramid_of

CPU_LIBRARY_VARIABLE = "ASAG_CPU_KERNELS_LIBRARY"
"""Environment variable with the path of the library, or empty for none."""
PACKAGE = "asag_cpu_kernels"
"""The package that holds the library, which is installed by a wheel of its own."""
LIBRARY_NAME = "libasag_kernels_host.so"

_INSTALL = "`pip install ./plugins` from the sources of this release"
_OTHER_PACKAGE = (
    f"install the operators again with {_INSTALL}, or set {CPU_LIBRARY_VARIABLE}= (to nothing) to run without"
)
_OTHER_LIBRARY = (
    f"unset {CPU_LIBRARY_VARIABLE} and install the operators with {_INSTALL}, or set it to nothing to run "
    "without the compiled operators"
)
"""What to do about a library that cannot be used: one that a package brought, and one that is named."""

ROI_SIZE = 7
MOST_THREADS = 512
"""That a call may use."""

_MIXED = (np.float32, BFLOAT16)
_FLOATS = (np.dtype(np.float32), np.dtype(np.float16), BFLOAT16)
_ARGUMENTS: dict[str, type[ctypes.Structure]] = {
    "multiscale_roi_align": structures.MultiscaleRoIAlign,
    "pyramid_sample": structures.PyramidSample,
    "deformable_sample": structures.DeformableSample,
    "adaptive_mixing": structures.AdaptiveMixing,
    "pad_anchors": structures.PadAnchors,
    "top_k": structures.TopK,
    "patch_nms": structures.PatchNMS,
}


class CpuKernels:
    """The operators, compiled for CPUs."""

    def __init__(self, path: str | os.PathLike[str], *, remedy: str | None = None) -> None:
        """Load the library at `path`.

        remedy: what to do about one that cannot be used (None: build it again).  Raises BackendError if it is
        another, or of another interface.
        """
        # Which also finds out whether it is the right one.
        self._host = KernelLibrary(path, "host", remedy=remedy)
        self.path = self._host.path
        library = ctypes.CDLL(str(self.path))
        for name, structure in _ARGUMENTS.items():
            function = getattr(library, f"asag_cpu_{name}", None)
            if function is None:
                raise BackendError(
                    f"the kernels in {self.path} have no asag_cpu_{name}; "
                    f"{remedy or 'build them again from the sources of this release'}"
                )
            function.argtypes = [ctypes.POINTER(structure), ctypes.POINTER(structures.Cpu)]
            function.restype = ctypes.c_int
        self._library = library

    def multiscale_roi_align(
        self, features: Arrays, boxes: Any, *, strides: Sequence[int], out: np.dtype[Any], threads: int
    ) -> NDArray[Any]:
        """Run RoIAlign 7x7, each box on the one level its area chooses (FPN).

        features: (B, h, w, C) for each of 1 to 4 levels, float32, float16 or BFLOAT16, or `ScaledIntegers`
        beside those; boxes: float32 (B, Q, 4) xyxy in pixels; strides: pixels per cell, each twice the one
        before.  Returns (B, Q, 7, 7, C) of the type `out`: the features', or float32, or BFLOAT16 of float32.
        """
        maps, scales = _maps(features, out, strides)
        batch, *_, channels = maps[0].shape
        box = expect("boxes", boxes, (batch, -1, 4), np.float32, on_device=False)
        result = np.empty((*box.shape[:2], ROI_SIZE, ROI_SIZE, channels), dtype=out)
        arguments = structures.MultiscaleRoIAlign(
            pyramid_of(maps, strides), box.pointer, result.ctypes.data, box.shape[1]
        )
        self._run("multiscale_roi_align", arguments, threads, out, scales)
        return result

    def pyramid_sample(
        self,
        features: Arrays,
        xy: Any,
        weight: Any,
        *,
        strides: Sequence[int],
        out: np.dtype[Any],
        threads: int,
    ) -> NDArray[Any]:
        """Sample every level at the same points, and add them up by weight.

        features: as for `multiscale_roi_align`; xy: float32 (B, Q, G, P, 2) in pixels; weight: float32
        (B, Q, G, P, levels).  Returns (B, Q, G, P, C / G) of the type `out`.
        """
        maps, scales = _maps(features, out, strides)
        batch, *_, channels = maps[0].shape
        points = expect("xy", xy, (batch, -1, -1, -1, 2), np.float32, on_device=False)
        shape = points.shape[:4]
        weights = expect("weight", weight, (*shape, len(maps)), np.float32, on_device=False)
        result = np.empty((*shape, channels // groups_of(shape[2], channels)), dtype=out)
        pointers = (points.pointer, weights.pointer, result.ctypes.data)
        self._run(
            "pyramid_sample",
            structures.PyramidSample(pyramid_of(maps, strides), *pointers, *shape[1:]),
            threads,
            out,
            scales,
        )
        return result

    def deformable_sample(
        self, features: Arrays, xy: Any, weight: Any, *, out: np.dtype[Any], threads: int
    ) -> NDArray[Any]:
        """Sample each level at points of its own, and add all of a group up by weight.

        features: as for `multiscale_roi_align`; xy: float32 (B, Q, G, levels, P, 2) relative to the whole
        map; weight: float32 (B, Q, G, levels, P).  Returns (B, Q, C) of the type `out`.
        """
        maps, scales = _maps(features, out)
        batch, *_, channels = maps[0].shape
        points = expect("xy", xy, (batch, -1, -1, len(maps), -1, 2), np.float32, on_device=False)
        weights = expect("weight", weight, points.shape[:-1], np.float32, on_device=False)
        queries, groups = points.shape[1:3]
        result = np.empty((batch, queries, channels), dtype=out)
        pointers = (points.pointer, weights.pointer, result.ctypes.data)
        arguments = structures.DeformableSample(
            pyramid_of(maps), *pointers, queries, groups_of(groups, channels), points.shape[4]
        )
        self._run("deformable_sample", arguments, threads, out, scales)
        return result

    def adaptive_mixing(
        self,
        sampled: Any,
        parameters: Any,
        *,
        out_points: int,
        activation: int,
        out: np.dtype[Any],
        threads: int,
    ) -> NDArray[Any]:
        """Mix the samples of each query and group over channels, then over points, with matrices of its own.

        sampled: (B, Q, G, P, C), and parameters: (B, Q, G * (C * C + O * P)) for `out_points` O, each float32
        or BFLOAT16; activation: `structures.GELU` or `RELU`.  Returns (B, Q, G * O * C) of the type `out`,
        float32 or BFLOAT16.
        """
        samples = expect("sampled", sampled, (-1, -1, -1, -1, -1), *_MIXED, on_device=False)
        batch, queries, groups, points, channels = samples.shape
        size = groups * (channels**2 + out_points * points)
        matrices = expect("parameters", parameters, (batch, queries, size), *_MIXED, on_device=False)
        result = np.empty((batch, queries, groups * out_points * channels), dtype=out)
        arguments = structures.AdaptiveMixing(
            *(samples.pointer, matrices.pointer, result.ctypes.data),
            *(batch, queries, groups, points, out_points, channels, activation),
            *(TYPES[samples.dtype], TYPES[matrices.dtype]),
        )
        self._run("adaptive_mixing", arguments, threads, out)
        return result

    def pad_anchors(
        self, anchors: Any, keep: Any, image_size: Any, slots: int, *, first_level: int, floor: int, cap: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Gather the anchors that pass, by floor and cap, and pad them with the whole image.

        anchors: float32 (B, N, 5) of all levels; keep: bool (B, N); image_size: int64 (B, 2) height, width.
        Returns queries float32 (B, slots, 4) cxcywh in pixels, and how many are real int64 (B,).
        """
        anchor = expect("anchors", anchors, (-1, -1, 5), np.float32, on_device=False)
        batch, count, _ = anchor.shape
        flags = expect("keep", keep, (batch, count), np.bool_, on_device=False)
        sizes = expect("image_size", image_size, (batch, 2), np.int64, on_device=False)
        queries = np.empty((batch, slots, 4), dtype=np.float32)
        real = np.empty(batch, dtype=np.int64)
        arguments = structures.PadAnchors(
            *(buffer.pointer for buffer in (anchor, flags, sizes, buffer_of(queries), buffer_of(real))),
            *(structures.FLOAT32, batch, count, slots, first_level, floor, cap),
        )
        self._run("pad_anchors", arguments, 1, np.dtype(np.float32))
        return queries, real

    def top_k(self, values: Any, k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Find the k largest of each row of float32 (rows, n), best first, of equal ones the first.

        Returns them and their indices, each (rows, k).
        """
        rows = expect("values", values, (-1, -1), np.float32, on_device=False)
        largest = np.empty((rows.shape[0], k), dtype=np.float32)
        indices = np.empty((rows.shape[0], k), dtype=np.int64)
        arguments = structures.TopK(
            rows.pointer, largest.ctypes.data, indices.ctypes.data, *rows.shape, largest.shape[1]
        )
        self._run("top_k", arguments, 1, np.dtype(np.float32))
        return largest, indices

    def patch_nms(
        self,
        anchors: Any,
        selected: Any,
        image_size: Any,
        *,
        stride: int,
        patch_size: int,
        iou_threshold: float,
        capacity: int,
        max_candidates: int,
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Find where the next level looks: `asag_deploy.loop.patch_nms.patch_nms`, with the same decisions.

        anchors: float32 or float16 (B, N, 5); selected: bool (B, N); image_size: int64 (B, 2) height, width.
        Returns origins int64 (B, capacity, 2), and counts int64 (B,).
        """
        anchor = expect("anchors", anchors, (-1, -1, 5), np.float32, np.float16, on_device=False)
        batch, count, _ = anchor.shape
        flags = expect("selected", selected, (batch, count), np.bool_, on_device=False)
        sizes = expect("image_size", image_size, (batch, 2), np.int64, on_device=False)
        origins = np.empty((batch, capacity, 2), dtype=np.int64)
        counts = np.empty((batch, structures.COUNT_COLUMNS), dtype=np.int64)
        arguments = structures.PatchNMS(
            *(anchor.pointer, flags.pointer, sizes.pointer, origins.ctypes.data, counts.ctypes.data),
            *(TYPES[anchor.dtype], batch, count),
            *(stride, patch_size, capacity, max_candidates, iou_threshold),
        )
        self._run("patch_nms", arguments, 1, np.dtype(np.float32))
        return origins, counts[:, structures.PATCHES]

    def _run(
        self,
        operator: str,
        arguments: ctypes.Structure,
        threads: int,
        out: np.dtype[Any],
        scales: Sequence[float] = (),
    ) -> None:
        how = structures.Cpu(threads, _type_of(out), structures.Cpu.scales_of(scales))
        status = getattr(self._library, f"asag_cpu_{operator}")(ctypes.byref(arguments), ctypes.byref(how))
        if status != 0:
            raise BackendError(f"the kernel {operator} failed: {self._host.message(status)}")


def cpu_kernels() -> CpuKernels | None:
    """Return the operators as this machine has them compiled; None if it does not.

    `ASAG_CPU_KERNELS_LIBRARY` names the library, or none if it is empty; else an installed package brings it.
    A package whose library cannot be used, as one of another release, is as good as none:
    `why_no_cpu_kernels` has the reason.

    Raises BackendError for a library that the variable names and that cannot be used.
    """
    path = cpu_library_path()
    if path is None:
        return None
    try:
        return _open(path)
    except BackendError:
        if CPU_LIBRARY_VARIABLE in os.environ:
            raise
        return None


def why_no_cpu_kernels() -> Problem | None:
    """Say why the network's operators are not compiled here, and what to do; None if they are."""
    if os.environ.get(CPU_LIBRARY_VARIABLE) == "":
        return Problem(f"{CPU_LIBRARY_VARIABLE} is empty", "unset it to use the compiled operators")
    unfit = why_unfit()
    if unfit is not None:
        return unfit
    if cpu_library_path() is not None:
        return None
    return Problem(
        "the network's operators are not compiled for this machine",
        "install its wheel, or build it as plugins/README.md says",
    )


def why_unfit() -> Problem | None:
    """Say why the library that there is cannot be used, and what to do; None if it can, or there is none."""
    try:
        path = cpu_library_path()
        if path is not None:
            _open(path)
    except BackendError as error:
        return Problem(str(error))
    return None


def cpu_library_path() -> Path | None:
    """Return the path of the library, or None if there is none.

    Raises BackendError if the variable names no file.
    """
    value = os.environ.get(CPU_LIBRARY_VARIABLE)
    if value == "":
        return None
    if value is not None:
        path = Path(value)
        if not path.is_file():
            raise BackendError(
                f"{CPU_LIBRARY_VARIABLE} is {value}, which is no file; set it to {LIBRARY_NAME}, unset it, "
                "or set it to nothing to run without the compiled operators"
            )
        return path.absolute()  # the system looks for a mere name elsewhere
    found = importlib.util.find_spec(PACKAGE)
    places = [] if found is None else (found.submodule_search_locations or [])
    files = (Path(place) / LIBRARY_NAME for place in places)
    return next((file for file in files if file.is_file()), None)


def _open(path: Path) -> CpuKernels:
    return _opened(path, _OTHER_LIBRARY if CPU_LIBRARY_VARIABLE in os.environ else _OTHER_PACKAGE)


@functools.cache
def _opened(path: Path, remedy: str) -> CpuKernels:
    return CpuKernels(path, remedy=remedy)


def _maps(
    features: Arrays, out: np.dtype[Any], strides: Sequence[int] | None = None
) -> tuple[list[Buffer], list[float]]:
    """Return the maps of a pyramid, if they go together and with the strides, and their scales.

    The first is described as one of floats: of `out`'s type where all maps are integers.
    """
    scales = [feature.scale if isinstance(feature, ScaledIntegers) else 0.0 for feature in features]
    maps = [buffer_of(each.values if isinstance(each, ScaledIntegers) else each) for each in features]
    if strides is not None and len(maps) != len(strides):
        raise ConfigError(
            f"expected 1 to 4 feature maps and as many strides, got {len(maps)}, {len(strides)}"
        )
    if not 1 <= len(maps) <= structures.MAX_LEVELS:
        raise ConfigError(f"expected 1 to 4 feature maps, got {len(maps)}")
    floats = [level.dtype for level, scale in zip(maps, scales, strict=True) if not scale] or [out]
    batch, channels = (maps[0].shape[0], maps[0].shape[-1]) if maps[0].shape else (0, 0)
    for i, (level, scale) in enumerate(zip(maps, scales, strict=True)):
        if scale:
            if level.dtype != np.int8:
                raise ConfigError(f"expected features with a scale to be int8, got {level.dtype}")
        elif level.dtype != floats[0] or level.dtype not in _FLOATS:
            raise ConfigError(f"expected features of one type of float, got {level.dtype}")
        if len(level.shape) != 4 or (level.shape[0], level.shape[3]) != (batch, channels):
            raise ConfigError(
                f"expected features[{i}] of shape ({batch}, h, w, {channels}), got {level.shape}"
            )
    return [dataclasses.replace(maps[0], dtype=floats[0]), *maps[1:]], scales


def _type_of(dtype: np.dtype[Any]) -> int:
    if dtype not in _FLOATS:
        raise ConfigError(f"expected float32, float16 or bfloat16, got {dtype}")
    return TYPES[dtype]
