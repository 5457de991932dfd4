"""A stand-in for `cuda.bindings.runtime` whose GPU is the memory of this process.

It is strict where the real one crashes or computes nonsense, and late where the real one may be: nothing that
is put on a stream happens before somebody waits for it.  So an array that is read, freed or overwritten too
early shows.

What is allocated holds noise, and so does what has been freed; every use of memory checks that it is alive.
"""

from __future__ import annotations

import enum
from types import SimpleNamespace
from typing import Any

from support.simulated_gpu.fake_cuda_parts import ALIGNMENT, NOISE, OK, CudaError, Stream
from support.simulated_gpu.fake_graphs import FakeGraphs

__all__ = ["ALIGNMENT", "NOISE", "CudaError", "FakeCuda"]

_FORBIDDEN = CudaError.cudaErrorStreamCaptureUnsupported


class FakeCuda(FakeGraphs):
    """The module.  `copies` notes every copy: direction, bytes, and the address that was read."""

    cudaError_t = CudaError
    cudaStreamNonBlocking = 1
    cudaEventDefault, cudaEventDisableTiming = 0, 2
    cudaMemcpyKind = enum.IntEnum(
        "cudaMemcpyKind",
        {"cudaMemcpyHostToDevice": 1, "cudaMemcpyDeviceToHost": 2, "cudaMemcpyDeviceToDevice": 3},
    )
    cudaDeviceAttr = enum.IntEnum(
        "cudaDeviceAttr",
        {"cudaDevAttrComputeCapabilityMajor": 75, "cudaDevAttrComputeCapabilityMinor": 76},
    )

    def __init__(self, *, capability: tuple[int, int] = (8, 6)) -> None:
        super().__init__()
        self.capability = capability
        self.devices: tuple[CudaError, int | None] = (CudaError.cudaSuccess, 1)
        self.driver_version, self.runtime_version = 13010, 13010
        self.limit: int | None = None
        """Bytes of device memory, or None for as many as there are."""
        self.events: dict[int, dict[str, Any]] = {}
        self.copies: list[tuple[str, int, int]] = []
        self.allocations = 0

    def leaked(self) -> dict[str, int]:
        """What nobody has let go of."""
        found = {
            "device": len(self.device.alive),
            "pinned": len(self.pinned.alive),
            "streams": len(self.streams) - 2,
            "events": len(self.events),
            "graphs": len(self.graphs) + len(self.launchable),
        }
        return {name: count for name, count in found.items() if count}

    def allocate_for_library(self, size: int) -> int | None:
        """Device memory that another library takes; None if there is no room."""
        with self._lock:
            assert not self.invalidate(here=True), "memory is taken while a graph is captured"
            return self.device.allocate(size, noise=False) if self._has_room(size) else None

    def free_for_library(self, pointer: int) -> None:
        """Give it back, which spoils a capture of this thread."""
        with self._lock:
            self.invalidate(here=True)
            self.device.free(pointer, noise=False)

    def _has_room(self, size: int) -> bool:
        return self.limit is None or sum(n for _, n in self.device.alive.values()) + size <= self.limit

    # From here on the names and results of the real module.

    def cudaGetDeviceCount(self) -> tuple[CudaError, int | None]:
        return self.devices

    def cudaDriverGetVersion(self) -> tuple[CudaError, int]:
        return CudaError.cudaSuccess, self.driver_version

    def cudaRuntimeGetVersion(self) -> tuple[CudaError, int]:
        return CudaError.cudaSuccess, self.runtime_version

    def cudaGetErrorString(self, error: CudaError) -> tuple[CudaError, bytes]:
        return CudaError.cudaSuccess, CudaError(error).name.removeprefix("cudaError").encode()

    def cudaDeviceGetAttribute(self, attr: int, device: int) -> tuple[CudaError, int]:
        assert device == 0
        return CudaError.cudaSuccess, self.capability[attr - 75]

    def cudaGetDeviceProperties(self, device: int) -> tuple[CudaError, Any]:
        assert device == 0
        return CudaError.cudaSuccess, SimpleNamespace(name=b"Imaginary GPU")

    def cudaMalloc(self, size: int) -> tuple[CudaError, int | None]:
        assert size > 0
        with self._lock:
            if self.invalidate(here=True):
                return _FORBIDDEN, None
            if not self._has_room(size):
                return CudaError.cudaErrorMemoryAllocation, None
            self.allocations += 1
            return CudaError.cudaSuccess, self.device.allocate(size)

    def cudaFree(self, devPtr: int) -> tuple[CudaError]:
        with self._lock:
            if self.invalidate(here=True):
                return (_FORBIDDEN,)
            self._run_all()  # as the real one, which waits
            return OK if self.device.free(devPtr) else (CudaError.cudaErrorInvalidValue,)

    def cudaHostAlloc(self, size: int, flags: int) -> tuple[CudaError, int | None]:
        with self._lock:
            if self.invalidate(here=True):
                return _FORBIDDEN, None
            return CudaError.cudaSuccess, self.pinned.allocate(size)

    def cudaFreeHost(self, ptr: int) -> tuple[CudaError]:
        with self._lock:
            if self.invalidate(here=True):
                return (_FORBIDDEN,)
            return OK if self.pinned.free(ptr) else (CudaError.cudaErrorInvalidValue,)

    def cudaMemcpyAsync(self, dst: int, src: int, count: int, kind: int, stream: int) -> tuple[CudaError]:
        name = self.cudaMemcpyKind(kind).name.removeprefix("cudaMemcpy")
        source = self.pinned if name.startswith("Host") else self.device
        target = self.pinned if name.endswith("Host") else self.device

        work, copy = self._memcpy(dst, src, count, target, source)
        self.copies.append((name, count, src))
        return (self.put(stream, work, "Memcpy", copy),)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[CudaError, int]:
        assert flags == self.cudaStreamNonBlocking
        handle = next(self._handles)
        self.streams[handle] = Stream()
        return CudaError.cudaSuccess, handle

    def cudaStreamSynchronize(self, stream: int) -> tuple[CudaError]:
        with self._lock:
            capture = self.stream(stream).capture
            if capture is not None:
                capture.invalidated = True
                return (_FORBIDDEN,)
            if self.invalidate(here=True):
                return (_FORBIDDEN,)
            self.stream(stream).run()
        return OK

    def cudaDeviceSynchronize(self) -> tuple[CudaError]:
        with self._lock:
            if self.invalidate(here=False):  # also those of other threads
                return (_FORBIDDEN,)
            self._run_all()
        return OK

    def cudaStreamDestroy(self, stream: int) -> tuple[CudaError]:
        with self._lock:
            self.stream(stream).run()
            del self.streams[int(stream)]
        return OK

    def cudaEventCreateWithFlags(self, flags: int) -> tuple[CudaError, int]:
        handle = next(self._handles)
        self.events[handle] = {"pending": 0, "stream": None, "timing": flags == self.cudaEventDefault}
        return CudaError.cudaSuccess, handle

    def cudaEventRecord(self, event: int, stream: int) -> tuple[CudaError]:
        state = self.events[event]

        def happen() -> None:
            state["pending"] -= 1

        with self._lock:
            assert self.stream(stream).capture is None, "nothing here records events while it captures"
            state["pending"] += 1
            state["stream"] = self.stream(stream)
            self.put(stream, happen)
        return OK

    def cudaEventSynchronize(self, event: int) -> tuple[CudaError]:
        with self._lock:
            if self.invalidate(here=True):
                return (_FORBIDDEN,)
            self._reach(self.events[event])
        return OK

    def cudaEventQuery(self, event: int) -> tuple[CudaError]:
        if self.invalidate(here=True):
            return (_FORBIDDEN,)
        return (CudaError.cudaErrorNotReady,) if self.events[event]["pending"] else OK

    def cudaStreamWaitEvent(self, stream: int, event: int, flags: int) -> tuple[CudaError]:
        state = self.events[event]
        self.put(stream, lambda: self._reach(state))
        return OK

    def cudaEventElapsedTime(self, start: int, end: int) -> tuple[CudaError, float | None]:
        if not (self.events[start]["timing"] and self.events[end]["timing"]):
            return CudaError.cudaErrorInvalidValue, None
        return CudaError.cudaSuccess, 0.25

    def cudaEventDestroy(self, event: int) -> tuple[CudaError]:
        del self.events[event]
        return OK

    def cudaMemsetAsync(self, devPtr: int, value: int, count: int, stream: int) -> tuple[CudaError]:
        return (self.put(stream, self._memset(devPtr, value, count), "Memset"),)

    def _reach(self, state: dict[str, Any]) -> None:
        if state["stream"] is not None:
            state["stream"].run(until=lambda: not state["pending"])

    def _run_all(self) -> None:
        for stream in list(self.streams.values()):
            stream.run()
