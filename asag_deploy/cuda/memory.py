"""Memory that is allocated once and used again, on the GPU and pinned on the host.

Everything a network does is put on one stream.  So memory that Python lets go of can be given out again at
once, although the GPU may still be at work on it: whatever uses it next comes after that on the stream.  And
because it is the free block with the lowest address that is given out, in whatever order blocks came back, a
loop that does the same again finds its arrays at the same addresses, which lets it replay captured graphs.
"""

from __future__ import annotations

import contextlib
import ctypes
import heapq
import math
from collections import deque
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from asag_deploy.cuda import interchange
from asag_deploy.cuda.runtime import Cuda
from asag_deploy.errors import BackendError
from asag_deploy.kernels import Buffer

ALIGNMENT = 256
"""What TensorRT asks of an address."""
_LEAST_BYTES = 512
_STEPS_PER_OCTAVE = 8
# Streams as DLPack numbers them; all others are addresses.
_NO_WAITING, _LEGACY_STREAM = -1, 1


class Streaming(Protocol):
    """What an array has to know of its device."""

    stream: int

    def let_wait(self, stream: int) -> None:
        """Let another stream wait for everything that this one has been given."""
        ...


class Block:
    """Device memory on loan from a pool; it goes back when nobody refers to it any more."""

    def __init__(self, pool: Pool, pointer: int, size: int) -> None:
        self._pool = pool
        self.pointer = pointer
        self.size = size
        self.shared = False
        """Whether another library has been given the address, whose streams are not ours."""
        self.constant = False
        """Whether it is given out again and again, so that nobody may write to it."""

    def __del__(self) -> None:
        self._pool.give_back(self.pointer, self.size, shared=self.shared)


class Pool:
    """Device memory in blocks of a few sizes.  `take` is called under the device's lock."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._free: dict[int, list[int]] = {}  # heaps of addresses
        # Blocks come back whenever Python collects them, even in the midst of `take`: appending is safe.
        self._returned: deque[tuple[int, int, bool]] = deque()
        self._shared: list[tuple[int, int]] = []
        self._closed = False
        self.allocated = 0
        """Bytes that are held, in use or not."""

    def take(self, size: int) -> Block:
        """Return a block of at least `size` bytes."""
        bucket = bucket_of(size)
        self._collect()
        if not self._free.get(bucket) and any(other == bucket for _, other in self._shared):
            self._reclaim_shared()
        free = self._free.get(bucket)
        pointer = heapq.heappop(free) if free else self._allocate(bucket)
        return Block(self, pointer, bucket)

    def give_back(self, pointer: int, size: int, *, shared: bool) -> None:
        """Take back a block that is no longer referred to."""
        if self._closed:
            with contextlib.suppress(BackendError):  # the process may be ending
                self._cuda.free(pointer)
            return
        self._returned.append((pointer, size, shared))

    def close(self) -> None:
        """Free what is not in use, and the rest as soon as it is given back."""
        self._closed = True
        self._collect()
        self._free_unused()

    def _allocate(self, size: int) -> int:
        try:
            pointer = self._cuda.allocate(size)
        except BackendError:
            self._reclaim_shared()
            self._free_unused()  # blocks of other sizes, which may have served other image sizes
            pointer = self._cuda.allocate(size)
        self.allocated += size
        return pointer

    def _collect(self) -> None:
        while self._returned:
            pointer, size, shared = self._returned.popleft()
            if shared:
                self._shared.append((pointer, size))
            else:
                heapq.heappush(self._free.setdefault(size, []), pointer)

    def _reclaim_shared(self) -> None:
        """Wait for other libraries' streams, on which blocks may be in use that they have let go of."""
        if self._shared:
            self._cuda.synchronize_device()
            for pointer, size in self._shared:
                heapq.heappush(self._free.setdefault(size, []), pointer)
            self._shared.clear()

    def _free_unused(self) -> None:
        self._reclaim_shared()
        for size, pointers in self._free.items():
            for pointer in pointers:
                self._cuda.free(pointer)
                self.allocated -= size
        self._free.clear()


class DeviceArray:
    """A contiguous array on the GPU, which CuPy, PyCUDA, Numba and PyTorch take without a copy.

    It is exported through `__cuda_array_interface__` and DLPack; whoever takes it lets its stream wait for
    the network's, as the two protocols say, and must not write to it.
    """

    def __init__(
        self, pointer: int, shape: tuple[int, ...], dtype: np.dtype[Any], owner: object, device: Streaming
    ) -> None:
        self.pointer = pointer
        self.shape = shape
        self.dtype = dtype
        self.owner = owner
        """What must live as long as this."""
        self._device = device

    @property
    def size(self) -> int:
        """How many elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes."""
        return self.size * self.dtype.itemsize

    def buffer(self, shape: tuple[int, ...] | None = None, offset: int = 0) -> Buffer:
        """Return the array as the kernels take it, or a part of it that begins `offset` bytes from its start.

        (Through `__cuda_array_interface__` it would count as lent to another library, whose streams are
        unknown.)
        """
        return Buffer(
            pointer=self.pointer + offset,
            shape=self.shape if shape is None else shape,
            dtype=self.dtype,
            on_device=True,
            owner=self,
        )

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        self._share()
        return {
            "version": 3,
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.pointer if self.size else 0, False),
            "strides": None,
            "stream": self._device.stream,
        }

    def __dlpack__(self, *, stream: int | None = None, **_: Any) -> object:
        """Return a DLPack capsule; the consumer's `stream` waits for what is still to be computed."""
        self._share()
        if stream != _NO_WAITING:
            self._device.let_wait(_LEGACY_STREAM if stream is None else stream)
        return interchange.export(self)

    def __dlpack_device__(self) -> tuple[int, int]:
        return (interchange.CUDA, 0)

    def _share(self) -> None:
        if isinstance(self.owner, Block):
            self.owner.shared = True


class PinnedSlot:
    """Pinned host memory with the event after which it may be written again."""

    def __init__(self, cuda: Cuda, size: int) -> None:
        self.pointer = cuda.allocate_pinned(size)
        self.size = size
        self.event = cuda.create_event()

    def view(self, shape: tuple[int, ...], dtype: np.dtype[Any], offset: int = 0) -> NDArray[Any]:
        """View the bytes from `offset` on as an array."""
        count = math.prod(shape)
        if count == 0:
            return np.empty(shape, dtype)
        memory = memoryview((ctypes.c_uint8 * self.size).from_address(self.pointer)).cast("B")
        array: NDArray[Any] = np.frombuffer(memory, dtype=dtype, count=count, offset=offset)
        return array.reshape(shape)


class PinnedPool:
    """Pinned host memory in slots of a few sizes.

    Everything is called under the device's lock, but for a finaliser's giving back of a slot that is busy.
    """

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._idle: dict[int, list[PinnedSlot]] = {}
        self._busy: dict[int, deque[PinnedSlot]] = {}
        self._all: list[PinnedSlot] = []

    def take(self, size: int) -> PinnedSlot:
        """Return at least `size` bytes that nothing is copying from or to."""
        bucket = bucket_of(size)
        busy = self._busy.setdefault(bucket, deque())
        if busy and self._cuda.has_happened(busy[0].event):
            return busy.popleft()
        idle = self._idle.get(bucket)
        if idle:
            return idle.pop()
        slot = PinnedSlot(self._cuda, bucket)
        self._all.append(slot)
        return slot

    def give_back(self, slot: PinnedSlot, *, busy: bool) -> None:
        """Take back a slot; `busy` if the GPU is to copy from it until its event has happened."""
        if busy:
            self._busy.setdefault(slot.size, deque()).append(slot)
        else:
            self._idle.setdefault(slot.size, []).append(slot)

    def close(self) -> None:
        """Free all; the stream must have done its work."""
        for slot in self._all:
            self._cuda.destroy_event(slot.event)
            self._cuda.free_pinned(slot.pointer)
        self._all.clear()
        self._idle.clear()
        self._busy.clear()


def bucket_of(size: int) -> int:
    """Round `size` up to one of eight sizes per power of two: at most an eighth is wasted."""
    if size <= _LEAST_BYTES:
        return _LEAST_BYTES
    octave = 1 << ((size - 1).bit_length() - 1)
    step = max(_LEAST_BYTES, octave // _STEPS_PER_OCTAVE)
    return -(-size // step) * step


def aligned(size: int, alignment: int = ALIGNMENT) -> int:
    """Round `size` up, so that what comes after so many bytes is aligned."""
    return -(-size // alignment) * alignment
