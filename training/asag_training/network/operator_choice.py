"""Other implementations of the operators of `asag_training.network.operators`, such as compiled kernels.

Whoever has some brings them for as long as a block runs, in this thread alone:

    with use_operators(kernels):
        stage(*tensors)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

import torch
from torch import Tensor


class Operators(Protocol):
    """Operators in the place of the references, with the same arguments and results."""

    def multiscale_roi_align(
        self, features: Sequence[Tensor], boxes: Tensor, strides: Sequence[int]
    ) -> Tensor:
        """Compute `asag_training.network.operators.multiscale_roi_align`."""
        ...

    def pyramid_sample(
        self, features: Sequence[Tensor], xy: Tensor, weight: Tensor, strides: Sequence[int]
    ) -> Tensor:
        """Compute `asag_training.network.operators.pyramid_sample`."""
        ...

    def deformable_sample(self, features: Sequence[Tensor], xy: Tensor, weight: Tensor) -> Tensor:
        """Compute `asag_training.network.operators.deformable_sample`."""
        ...

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
        ...


_brought: ContextVar[Operators | None] = ContextVar("operators", default=None)


@contextmanager
def use_operators(operators: Operators) -> Iterator[None]:
    """Let these operators run in the block instead of the references; graphs that are traced keep those."""
    before = _brought.set(operators)
    try:
        yield
    finally:
        _brought.reset(before)


def being_exported() -> bool:
    """Tell whether calls are to become nodes of the ONNX domain `asag`: in an export, not in torch.compile.

    PyTorch before 2.13 says of all that torch.compile traces that it is being exported.  Such a node would
    then be left out of what is compiled and run as it is, which gives zeros on the CPU.
    """
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def operators_in_use() -> Operators | None:
    """Return what was brought; None for the references."""
    return None if torch.compiler.is_compiling() else _brought.get()
