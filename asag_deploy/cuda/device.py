"""One GPU as a network uses it: one stream, its memory, and the way to the host and back."""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asag_deploy.cuda import interchange
from asag_deploy.cuda.graph import capture
from asag_deploy.cuda.memory import ALIGNMENT, Block, DeviceArray, PinnedPool, PinnedSlot, Pool, aligned
from asag_deploy.cuda.runtime import Cuda
from asag_deploy.errors import BackendError

_CONSTANT_BYTES = 4096
_MOST_CONSTANTS = 256


class Device:
    """Memory and one stream of a GPU.  Safe to call from several threads at once.

    Whoever gives several things to the stream that belong together, or captures what is given to it, holds
    `lock` meanwhile.
    """

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        self.lock = threading.RLock()
        self.stream = cuda.create_stream()
        self._pool = Pool(cuda)
        self._pinned = PinnedPool(cuda)
        self._constants: OrderedDict[tuple[Any, ...], Block] = OrderedDict()
        self._scratch: Block | None = None
        self._scratch_to_come = 0
        self._capture_stream: int | None = None
        self._kept: list[tuple[int, object]] = []
        self._closed = False

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> DeviceArray:
        """Take memory for an array whose elements are still to be computed."""
        with self.lock:
            block = self._pool.take(math.prod(shape) * dtype.itemsize)
        return self._array(block, shape, dtype)

    def expect_scratch(self, size: int) -> None:
        """Say that somebody may ask for `size` bytes of scratch, so that so much is taken at once.

        Whoever was given less before would keep that as well.
        """
        with self.lock:
            self._scratch_to_come = max(self._scratch_to_come, size)

    def scratch(self, size: int) -> Block:
        """Return at least `size` bytes for whatever runs on the stream next; the same for all who ask."""
        with self.lock:
            if self._scratch is None or self._scratch.size < size:
                self._scratch = self._scratch_of(size)
            return self._scratch

    @property
    def capture_stream(self) -> int:
        """A stream for captures only, so that nobody else can ask something of it meanwhile."""
        with self.lock:
            if self._capture_stream is None:
                self._capture_stream = self.cuda.create_stream()
            return self._capture_stream

    def capture(self, work: Callable[[int], None]) -> int:
        """Capture what `work` puts on the stream that it is given, as a graph (see `cuda.graph.capture`)."""
        with self.lock:
            stream = self.capture_stream
            return capture(self.cuda, stream, lambda: work(stream))

    def upload(self, array: NDArray[Any]) -> DeviceArray:
        """Copy a host array to the GPU; it may be written to as soon as this returns.

        Small arrays that were uploaded before are not copied again: the result must not be written to.
        """
        contiguous = np.ascontiguousarray(array).reshape(np.shape(array))
        if contiguous.nbytes > _CONSTANT_BYTES:
            return self._array(self._copied(contiguous), contiguous.shape, contiguous.dtype)
        with self.lock:
            key = (contiguous.dtype.str, contiguous.tobytes())
            block = self._constants.get(key)
            if block is None:
                block = self._constants[key] = self._copied(contiguous)
                block.constant = True
                if len(self._constants) > _MOST_CONSTANTS:
                    self._constants.popitem(last=False)
            self._constants.move_to_end(key)
            return self._array(block, contiguous.shape, contiguous.dtype)

    def writable(self, array: DeviceArray) -> DeviceArray:
        """Return the array, or a copy of it if it was uploaded and so may be given out again."""
        if not (isinstance(array.owner, Block) and array.owner.constant):
            return array
        with self.lock:
            made = self.empty(array.shape, array.dtype)
            if made.size:
                self.cuda.copy(made.pointer, array.pointer, array.nbytes, "on_device", self.stream)
            return made

    def adopt(self, array: Any) -> DeviceArray:
        """Take an array of another library on the GPU where it lies; wait for what is still being computed.

        Raises ImageError if it is not contiguous or does not lie on the GPU.
        """
        foreign = interchange.take(array, self.stream)
        with self.lock:
            if foreign.stream is not None:
                self._order(foreign.stream, self.stream)
            found = DeviceArray(foreign.pointer, foreign.shape, foreign.dtype, foreign.owner, self)
            if found.size and not found.pointer % ALIGNMENT:
                return found
            aligned = self.empty(found.shape, found.dtype)
            if found.size:
                self.cuda.copy(aligned.pointer, found.pointer, found.nbytes, "on_device", self.stream)
                self.cuda.synchronize(self.stream)  # the original may go as soon as this returns
            return aligned

    def download(self, array: DeviceArray) -> NDArray[Any]:
        """Copy an array to the host, once it has been computed.  Other threads go on meanwhile."""
        (result,) = self.begin_download([array])()
        return result

    def begin_download(self, arrays: Sequence[DeviceArray]) -> Callable[[], list[NDArray[Any]]]:
        """Put copies to the host on the stream; what is returned waits for them, once, and gives them.

        It is to be called once at most, without `lock`, so that other threads go on meanwhile.
        """
        offsets = [0, *itertools.accumulate(aligned(array.nbytes) for array in arrays)]
        with self.lock:
            slot = self._pinned.take(offsets[-1])
            for array, offset in zip(arrays, offsets, strict=False):
                if array.size:
                    self.cuda.copy(slot.pointer + offset, array.pointer, array.nbytes, "to_host", self.stream)
            self.cuda.record(slot.event, self.stream)
        return _Download(self, self._pinned, slot, arrays, offsets)

    def keep(self, array: object) -> None:
        """Refer to `array` until everything that the stream has been given so far is done."""
        with self.lock:
            self._let_go()
            event = self.cuda.create_event()
            self.cuda.record(event, self.stream)
            self._kept.append((event, array))

    def let_wait(self, stream: int) -> None:
        """Let another stream wait for everything that this one has been given."""
        with self.lock:
            self._order(self.stream, stream)

    def synchronize(self) -> None:
        """Wait until everything has been computed."""
        self.cuda.synchronize(self.stream)

    @property
    def allocated(self) -> int:
        """Bytes of GPU memory that are held, in use or not; without TensorRT's own."""
        return self._pool.allocated

    def close(self) -> None:
        """Free everything, but for arrays that are still referred to: those go with their last reference."""
        with self.lock:
            if self._closed:
                return
            self._closed = True
            with contextlib.suppress(BackendError):  # a GPU that has failed cannot be tidied up
                self.cuda.synchronize(self.stream)
                self._let_go()
                self._constants.clear()
                self._scratch = None
                self._pool.close()
                self._pinned.close()
                self.cuda.destroy_stream(self.stream)
                if self._capture_stream is not None:
                    self.cuda.destroy_stream(self._capture_stream)

    def _scratch_of(self, size: int) -> Block:
        if self._scratch_to_come > size:
            with contextlib.suppress(BackendError):  # no room for shapes that may never come
                return self._pool.take(self._scratch_to_come)
        return self._pool.take(size)

    def _let_go(self) -> None:
        while self._kept and self.cuda.has_happened(self._kept[0][0]):
            event, _ = self._kept.pop(0)
            self.cuda.destroy_event(event)

    def _array(self, block: Block, shape: tuple[int, ...], dtype: np.dtype[Any]) -> DeviceArray:
        return DeviceArray(block.pointer, shape, dtype, block, self)

    def _copied(self, array: NDArray[Any]) -> Block:
        """Copy an array's bytes into a block; they go into pinned memory without the lock."""
        with self.lock:
            block = self._pool.take(array.nbytes)
            if not array.nbytes:
                return block
            slot = self._pinned.take(array.nbytes)
        slot.view(array.shape, array.dtype)[...] = array
        with self.lock:
            self.cuda.copy(block.pointer, slot.pointer, array.nbytes, "to_device", self.stream)
            self.cuda.record(slot.event, self.stream)
            self._pinned.give_back(slot, busy=True)
        return block

    def _order(self, first: int, then: int) -> None:
        event = self.cuda.create_event()
        try:
            self.cuda.record(event, first)
            self.cuda.stream_waits(then, event)
        finally:
            self.cuda.destroy_event(event)  # which CUDA does once it has happened


class _Download:
    """Copies that are on their way into a pinned slot, which goes back also if nobody asks for them."""

    def __init__(
        self,
        device: Device,
        pinned: PinnedPool,
        slot: PinnedSlot,
        arrays: Sequence[DeviceArray],
        offsets: Sequence[int],
    ) -> None:
        self._device, self._pinned, self._slot = device, pinned, slot
        self._arrays, self._offsets = arrays, offsets
        self._given_back = False

    def __call__(self) -> list[NDArray[Any]]:
        self._device.cuda.wait_event(self._slot.event)
        results = [
            self._slot.view(array.shape, array.dtype, offset).copy()
            for array, offset in zip(self._arrays, self._offsets, strict=False)
        ]
        self._given_back = True
        with self._device.lock:
            self._pinned.give_back(self._slot, busy=False)
        return results

    def __del__(self) -> None:
        if not self._given_back:  # without the lock, as a finaliser may come while its thread holds any
            self._pinned.give_back(self._slot, busy=True)
