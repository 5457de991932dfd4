"""The network's operators by the compiled kernels of `plugins/`, called from PyTorch.

    with use_operators(KernelOperators(library)):
        stage(*tensors)

Nothing in them waits for the host or copies from it, so that what runs with them can be captured in a CUDA
graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from asag_deploy import kernels
from asag_deploy.kernels import Buffer, KernelLibrary
from asag_training.network.operators import ROI_SIZE


def current_stream() -> int:
    """Return the handle of the stream that PyTorch puts its work on in this thread."""
    return int(torch.cuda.current_stream().cuda_stream)


class KernelOperators:
    """What `asag_training.network.operator_choice` takes: each operator is one kernel of the library.

    The tensors lie where the library runs.
    """

    def __init__(self, library: KernelLibrary, stream: Callable[[], int] = current_stream) -> None:
        self._library = library
        self._stream = stream

    def multiscale_roi_align(
        self, features: Sequence[Tensor], boxes: Tensor, strides: Sequence[int]
    ) -> Tensor:
        """Compute `asag_training.network.operators.multiscale_roi_align`."""
        maps = [feature.contiguous() for feature in features]
        shape = (*boxes.shape[:2], ROI_SIZE, ROI_SIZE, maps[0].shape[-1])
        out = maps[0].new_empty(shape)
        kernels.multiscale_roi_align(
            self._library,
            [self._buffer(level) for level in maps],
            self._buffer(boxes.float()),
            self._buffer(out),
            strides=strides,
            stream=self._stream(),
        )
        return out

    def pyramid_sample(
        self, features: Sequence[Tensor], xy: Tensor, weight: Tensor, strides: Sequence[int]
    ) -> Tensor:
        """Compute `asag_training.network.operators.pyramid_sample`."""
        maps = [feature.contiguous() for feature in features]
        out = maps[0].new_empty((*xy.shape[:4], maps[0].shape[-1] // xy.shape[2]))
        kernels.pyramid_sample(
            self._library,
            [self._buffer(level) for level in maps],
            self._buffer(xy.float()),
            self._buffer(weight.float()),
            self._buffer(out),
            strides=strides,
            stream=self._stream(),
        )
        return out

    def deformable_sample(self, features: Sequence[Tensor], xy: Tensor, weight: Tensor) -> Tensor:
        """Compute `asag_training.network.operators.deformable_sample`."""
        maps = [feature.contiguous() for feature in features]
        out = maps[0].new_empty((*xy.shape[:2], maps[0].shape[-1]))
        kernels.deformable_sample(
            self._library,
            [self._buffer(level) for level in maps],
            self._buffer(xy.float()),
            self._buffer(weight.float()),
            self._buffer(out),
            stream=self._stream(),
        )
        return out

    def pad_anchors(
        self,
        anchors: Tensor,
        keep: Tensor,
        image_size: Tensor,
        slots: Tensor,
        first_level: int,
        floor: int,
        cap: int,
    ) -> tuple[Tensor, Tensor]:
        """Compute `asag_training.network.operators.pad_anchors`."""
        queries = anchors.new_empty((anchors.shape[0], slots.shape[0], 4))
        counts = image_size.new_empty((anchors.shape[0],))
        kernels.pad_anchors(
            self._library,
            self._buffer(anchors),
            self._buffer(keep),
            self._buffer(image_size),
            self._buffer(queries),
            self._buffer(counts),
            first_level=first_level,
            floor=floor,
            cap=cap,
            stream=self._stream(),
        )
        return queries, counts

    def _buffer(self, tensor: Tensor) -> Buffer:
        """Return a tensor as the kernels take it; a copy of one that is not contiguous."""
        whole = tensor.contiguous()
        return Buffer(
            pointer=whole.data_ptr(),
            shape=tuple(whole.shape),
            dtype=np.dtype(str(whole.dtype).removeprefix("torch.")),
            on_device=self._library.device == "cuda",
            owner=whole,
        )
