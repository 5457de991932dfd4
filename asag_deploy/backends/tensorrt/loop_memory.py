"""The memory of the loop's graphs: named arrays in blocks, and one piece of memory for all graphs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from asag_deploy.cuda import Device, DeviceArray
from asag_deploy.cuda.memory import aligned
from asag_deploy.errors import BackendError

_BYTE: np.dtype[Any] = np.dtype(np.uint8)


class Workspace:
    """Memory that all graphs of a loop work in, since they run one after the other on one stream.

    A graph keeps the addresses that it was captured with, and so the memory of when it was made.  As each
    new piece is half as large again as the one before, all of them together stay within three times the
    largest.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._whole: DeviceArray | None = None

    def take(self, size: int) -> DeviceArray:
        """Return at least `size` bytes."""
        if self._whole is None or self._whole.nbytes < size:
            before = 0 if self._whole is None else self._whole.nbytes
            self._whole = self._device.empty((max(size, before + before // 2),), _BYTE)
        return self._whole

    def close(self) -> None:
        """Let go of the memory; graphs that work in it keep it."""
        self._whole = None


class Arena:
    """Named arrays in one block of a device's memory.

    `add` plans them, `place` says where the block begins.  Until then `blank` stands for an array wherever
    only its shape and type are asked for; `placed` exchanges it for the array itself.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
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
        self.size += aligned(max(math.prod(shape) * kind.itemsize, 1))

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
        self._block = DeviceArray(pointer, (self.size,), _BYTE, memory.owner, self._device)

    @property
    def whole(self) -> DeviceArray:
        """The block.  Raises BackendError if it has not been placed."""
        if self._block is None:
            raise BackendError("the memory of a graph is used before it has been taken")
        return self._block

    def copy(self) -> dict[str, DeviceArray]:
        """Copy everything, as it is when the device's stream gets here, into a block of its own; by name."""
        made = self._device.empty(self.whole.shape, _BYTE)
        self._device.cuda.copy(made.pointer, self.whole.pointer, self.size, "on_device", self._device.stream)
        return {name: self._view(made, name) for name in self._planned}

    def _view(self, whole: DeviceArray, name: str) -> DeviceArray:
        offset, shape, dtype = self._planned[name]
        return DeviceArray(whole.pointer + offset, shape, dtype, whole.owner, self._device)
