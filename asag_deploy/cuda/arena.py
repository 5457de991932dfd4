"""Named arrays in one block of a device's memory, which one copy brings to the host."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asag_deploy.cuda.device import Device
from asag_deploy.cuda.memory import ALIGNMENT, DeviceArray, aligned
from asag_deploy.errors import BackendError

BYTE: np.dtype[Any] = np.dtype(np.uint8)


class Arena:
    """Named arrays in one block of a device's memory.

    `add` plans them; `place` says where the block begins, `take` has one of its own.  Until then `blank`
    stands for an array wherever only its shape and type are asked for; `placed` exchanges it for the array.
    """

    def __init__(self, device: Device, *, alignment: int = ALIGNMENT) -> None:
        """Plan arrays that each begin at a multiple of `alignment` bytes."""
        self._device = device
        self._alignment = alignment
        self._planned: dict[str, tuple[int, tuple[int, ...], np.dtype[Any]]] = {}
        self._blanks: dict[int, tuple[str, DeviceArray]] = {}
        self._block: DeviceArray | None = None
        self.size = 0
        """Bytes of what has been planned."""

    def __contains__(self, name: str) -> bool:
        return name in self._planned

    def __getitem__(self, name: str) -> DeviceArray:
        return self._view(self.whole, name)

    def add(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any] | type[np.generic]) -> None:
        """Plan an array."""
        kind: np.dtype[Any] = np.dtype(dtype)
        self._planned[name] = (self.size, shape, kind)
        self.size += aligned(max(math.prod(shape) * kind.itemsize, 1), self._alignment)

    def blank(self, name: str) -> DeviceArray:
        """Return an array of the planned shape and type that has no address yet."""
        _, shape, dtype = self._planned[name]
        made = DeviceArray(0, shape, dtype, None, self._device)
        self._blanks[id(made)] = (name, made)
        return made

    def placed(self, array: DeviceArray) -> DeviceArray:
        """Exchange a blank array of this arena for the array itself; return any other array as it is."""
        found = self._blanks.get(id(array))
        return array if found is None else self[found[0]]

    def place(self, memory: DeviceArray, offset: int) -> None:
        """Put the block into `memory`, `offset` bytes from its beginning."""
        pointer = memory.pointer + offset
        self._block = DeviceArray(pointer, (self.size,), BYTE, memory.owner, self._device)

    def take(self) -> None:
        """Put the block into memory of its own."""
        self.place(self._device.empty((self.size,), BYTE), 0)

    @property
    def whole(self) -> DeviceArray:
        """The block.  Raises BackendError if it has not been placed."""
        if self._block is None:
            raise BackendError("the memory of a graph is used before it has been taken")
        return self._block

    def copy(self) -> dict[str, DeviceArray]:
        """Copy everything, as it is when the device's stream gets here, into a block of its own; by name."""
        made = self._device.empty(self.whole.shape, BYTE)
        self._device.cuda.copy(made.pointer, self.whole.pointer, self.size, "on_device", self._device.stream)
        return {name: self._view(made, name) for name in self._planned}

    def on_host(self, content: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """View the downloaded bytes of the block as the arrays, by name."""
        return {
            name: np.frombuffer(content, kind, math.prod(shape), offset).reshape(shape)
            for name, (offset, shape, kind) in self._planned.items()
        }

    def _view(self, whole: DeviceArray, name: str) -> DeviceArray:
        offset, shape, dtype = self._planned[name]
        return DeviceArray(whole.pointer + offset, shape, dtype, whole.owner, self._device)
