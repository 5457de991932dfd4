"""Tensors as the kernels take them: an address, a shape and an element type, on the host or on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asag_deploy.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Buffer:
    """A contiguous tensor, the last dimension fastest."""

    pointer: int
    """Address of the first element; may be 0 where there are none."""
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    on_device: bool
    """True for memory of a GPU."""
    owner: object = None
    """What must live as long as this is used."""


def buffer_of(array: Any) -> Buffer:
    """View a NumPy array, or anything with `__cuda_array_interface__`, as a Buffer; return a Buffer itself.

    Raises ConfigError if it is none of these, or is not contiguous.
    """
    if isinstance(array, Buffer):
        return array
    if isinstance(array, np.ndarray):
        if not array.flags.c_contiguous:
            raise ConfigError(f"the array of shape {array.shape} is not contiguous; pass a contiguous copy")
        return Buffer(
            pointer=array.ctypes.data, shape=array.shape, dtype=array.dtype, on_device=False, owner=array
        )
    interface = getattr(array, "__cuda_array_interface__", None)
    if interface is None:
        raise ConfigError(
            f"expected a NumPy array or one with __cuda_array_interface__, got {type(array).__name__}"
        )
    dtype, shape = np.dtype(interface["typestr"]), tuple(int(size) for size in interface["shape"])
    if not is_contiguous(interface.get("strides"), shape, dtype.itemsize):
        raise ConfigError(f"the GPU array of shape {shape} is not contiguous; pass a contiguous copy")
    return Buffer(pointer=int(interface["data"][0]), shape=shape, dtype=dtype, on_device=True, owner=array)


def expect(
    name: str, array: Any, shape: Sequence[int], *dtypes: type[np.generic] | np.dtype[Any], on_device: bool
) -> Buffer:
    """Return `array` as a Buffer of that shape (-1: any size), on that side, and of one of those types.

    Raises ConfigError with what was expected.
    """
    buffer = buffer_of(array)
    if buffer.on_device != on_device:
        here, there = ("the GPU", "the host") if on_device else ("the host", "the GPU")
        raise ConfigError(f"expected {name} in the memory of {here}, got an array in that of {there}")
    if buffer.dtype not in [np.dtype(dtype) for dtype in dtypes]:
        names = " or ".join(_name_of(np.dtype(dtype)) for dtype in dtypes)
        raise ConfigError(f"expected {name} of type {names}, got {_name_of(buffer.dtype)}")
    fits = len(buffer.shape) == len(shape) and all(
        wanted in (-1, size) for wanted, size in zip(shape, buffer.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if size == -1 else str(size) for size in shape)
        raise ConfigError(f"expected {name} of shape ({wanted}), got {buffer.shape}")
    return buffer


def _name_of(dtype: np.dtype[Any]) -> str:
    return "bfloat16" if dtype == BFLOAT16 else dtype.name


def is_contiguous(strides: Sequence[int] | None, shape: tuple[int, ...], itemsize: int = 1) -> bool:
    """Tell whether an array has its last dimension fastest and no gaps.

    strides: in elements, or with `itemsize` in bytes; None says that it is contiguous.
    """
    if strides is None or 0 in shape:
        return True
    expected = itemsize
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


@dataclass(frozen=True, kw_only=True)
class ScaledIntegers:
    """A tensor of int8 in which each value stands for itself times `scale`."""

    values: NDArray[np.int8]
    scale: float
    """More than 0."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the tensor."""
        return self.values.shape

    def to_float32(self) -> NDArray[np.float32]:
        """Return what the values stand for."""
        return np.multiply(self.values, np.float32(self.scale), dtype=np.float32)


BFLOAT16 = np.dtype([("bfloat16", np.uint16)])
"""The upper halves of float32 numbers, which NumPy has no type of its own for."""

Arrays = Sequence[NDArray[Any] | Buffer | Any]
