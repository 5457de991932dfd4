"""The memory of a captured graph: one block, cleared and copied at once, with named arrays in it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from asag_deploy.cuda import Device, DeviceArray
from asag_deploy.errors import BackendError
from asag_deploy.kernels import Buffer

_ALIGNMENT = 256
"""What TensorRT asks of an address."""


class Arena:
    """Named arrays in one block of a device's memory.

    `add` plans them, `allocate` takes the block.  Until then `blank` stands for an array wherever only its
    shape and type are asked for; `placed` exchanges it for the array itself.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._planned: dict[str, tuple[int, tuple[int, ...], np.dtype[Any]]] = {}
        self._blanks: dict[int, tuple[str, DeviceArray]] = {}
        self._block: DeviceArray | None = None
        self._size = 0

    def __contains__(self, name: str) -> bool:
        return name in self._planned

    def __getitem__(self, name: str) -> DeviceArray:
        return self._views(self._whole())[name]

    def add(self, name: str, shape: tuple[int, ...], dtype: type[np.generic]) -> None:
        """Plan an array."""
        kind = np.dtype(dtype)
        self._planned[name] = (self._size, shape, kind)
        self._size += -(-max(math.prod(shape) * kind.itemsize, 1) // _ALIGNMENT) * _ALIGNMENT

    def blank(self, name: str) -> DeviceArray:
        """An array of the shape and type of the one that is planned, nowhere yet."""
        _, shape, dtype = self._planned[name]
        made = DeviceArray(0, shape, dtype, None, self._device)
        self._blanks[id(made)] = (name, made)
        return made

    def placed(self, array: DeviceArray) -> DeviceArray:
        """The array that a blank one stands for; any other array is returned as it is."""
        found = self._blanks.get(id(array))
        return array if found is None else self[found[0]]

    def allocate(self) -> None:
        """Take the block for everything that has been planned."""
        self._block = self._device.empty((self._size,), np.dtype(np.uint8))

    def clear(self, stream: int) -> None:
        """Set everything to zero in the order of the stream."""
        whole = self._whole()
        self._device.cuda.clear(whole.pointer, whole.nbytes, stream)

    def copy(self) -> dict[str, DeviceArray]:
        """Everything by name, as it is when the device's stream gets here, in a block of its own."""
        whole = self._whole()
        made = self._device.empty(whole.shape, whole.dtype)
        self._device.cuda.copy(made.pointer, whole.pointer, whole.nbytes, "on_device", self._device.stream)
        return self._views(made)

    def _whole(self) -> DeviceArray:
        if self._block is None:
            raise BackendError("the memory of a graph is used before it has been taken")
        return self._block

    def _views(self, whole: DeviceArray) -> dict[str, DeviceArray]:
        return {
            name: DeviceArray(whole.pointer + offset, shape, dtype, whole.owner, self._device)
            for name, (offset, shape, dtype) in self._planned.items()
        }


def buffer(array: DeviceArray) -> Buffer:
    """An array of this network as the kernels take it, without telling its address to another library."""
    return Buffer(
        pointer=array.pointer, shape=array.shape, dtype=array.dtype, on_device=True, owner=array.owner
    )
