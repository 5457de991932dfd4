"""A stand-in for `cuda.bindings.runtime` whose GPU is the memory of this process.

It is strict where the real one crashes or computes nonsense, and late where the real one may be: nothing that
is put on a stream happens before somebody waits for it.  So an array that is read, freed or overwritten too
early shows.

What is allocated holds noise, and so does what has been freed; every use of memory checks that it is alive.
"""

from __future__ import annotations

import ctypes
import enum
import itertools
import threading
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

NOISE = 0xCD
ALIGNMENT = 256

Work = Callable[[], None]


class CudaError(enum.IntEnum):
    """The results that this project tells apart."""

    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorNotReady = 600
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901


OK = (CudaError.cudaSuccess,)


class Memory:
    """Everything that was ever allocated; nothing is reused, so that a stale address is known as such."""

    def __init__(self) -> None:
        self.alive: dict[int, tuple[np.ndarray[Any, Any], int]] = {}
        self.freed: list[np.ndarray[Any, Any]] = []

    def allocate(self, size: int) -> int:
        whole = np.full(size + ALIGNMENT, NOISE, dtype=np.uint8)
        pointer = -(-whole.ctypes.data // ALIGNMENT) * ALIGNMENT
        self.alive[pointer] = (whole, size)
        return pointer

    def free(self, pointer: int) -> bool:
        if pointer not in self.alive:
            return False
        whole, _ = self.alive.pop(pointer)
        whole[:] = NOISE
        self.freed.append(whole)
        return True

    def holds(self, pointer: int, size: int) -> bool:
        """Whether these bytes lie in one allocation that is alive."""
        return any(start <= pointer and pointer + size <= start + n for start, (_, n) in self.alive.items())


class Stream:
    """Work in its order, not done before somebody waits."""

    def __init__(self) -> None:
        self.work: deque[Work] = deque()
        self.captured: list[Work] | None = None
        self.capturing_thread: int | None = None
        self.graph = 0

    def put(self, work: Work) -> None:
        (self.work if self.captured is None else self.captured).append(work)

    def run(self, until: Callable[[], bool] = lambda: False) -> None:
        while self.work and not until():
            self.work.popleft()()


class FakeCuda:
    """The module.  `copies` notes every copy: direction, bytes, and the address that was read."""

    cudaError_t = CudaError
    cudaStreamNonBlocking = 1
    cudaEventDefault, cudaEventDisableTiming = 0, 2
    cudaMemcpyKind = enum.IntEnum(
        "cudaMemcpyKind",
        {"cudaMemcpyHostToDevice": 1, "cudaMemcpyDeviceToHost": 2, "cudaMemcpyDeviceToDevice": 3},
    )
    cudaStreamCaptureMode = enum.IntEnum("cudaStreamCaptureMode", {"cudaStreamCaptureModeThreadLocal": 1})
    cudaGraphNodeType = enum.IntEnum("cudaGraphNodeType", {"cudaGraphNodeTypeConditional": 13})
    cudaGraphConditionalNodeType = enum.IntEnum("cudaGraphConditionalNodeType", {"cudaGraphCondTypeIf": 0})
    cudaStreamUpdateCaptureDependenciesFlags = enum.IntEnum(
        "cudaStreamUpdateCaptureDependenciesFlags", {"cudaStreamSetCaptureDependencies": 1}
    )
    cudaDeviceAttr = enum.IntEnum(
        "cudaDeviceAttr",
        {"cudaDevAttrComputeCapabilityMajor": 75, "cudaDevAttrComputeCapabilityMinor": 76},
    )

    def __init__(self, *, capability: tuple[int, int] = (8, 6)) -> None:
        self.capability = capability
        self.devices: tuple[CudaError, int | None] = (CudaError.cudaSuccess, 1)
        self.driver_version, self.runtime_version = 13010, 13010
        self.limit: int | None = None
        """Bytes of device memory, or None for as many as there are."""
        self.device, self.pinned = Memory(), Memory()
        self.streams: dict[int, Stream] = {1: Stream(), 2: Stream()}
        self.events: dict[int, dict[str, Any]] = {}
        self.graphs: dict[int, list[Work]] = {}
        self.launchable: dict[int, list[Work]] = {}
        self.bodies: dict[int, list[int]] = {}
        self.conditions: dict[int, int] = {}
        self.copies: list[tuple[str, int, int]] = []
        self.allocations = 0
        self.launches = 0
        self.cudaGraphConditionalHandle = int
        self.cudaGraphNodeParams = lambda: SimpleNamespace(type=None, conditional=SimpleNamespace())
        self._handles = itertools.count(1000)
        self._lock = threading.RLock()

    def stream(self, handle: int) -> Stream:
        """The stream of a handle; AssertionError if there is none any more."""
        assert int(handle) in self.streams, f"there is no stream {handle}"
        return self.streams[int(handle)]

    def put(self, handle: int, work: Work) -> None:
        """Put work on a stream."""
        with self._lock:
            self.stream(handle).put(work)

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
            if self._captures_here():
                return CudaError.cudaErrorStreamCaptureUnsupported, None
            if self.limit is not None and sum(n for _, n in self.device.alive.values()) + size > self.limit:
                return CudaError.cudaErrorMemoryAllocation, None
            self.allocations += 1
            return CudaError.cudaSuccess, self.device.allocate(size)

    def cudaFree(self, devPtr: int) -> tuple[CudaError]:
        with self._lock:
            self._run_all()  # as the real one, which waits
            return OK if self.device.free(devPtr) else (CudaError.cudaErrorInvalidValue,)

    def cudaHostAlloc(self, size: int, flags: int) -> tuple[CudaError, int]:
        with self._lock:
            return CudaError.cudaSuccess, self.pinned.allocate(size)

    def cudaFreeHost(self, ptr: int) -> tuple[CudaError]:
        with self._lock:
            return OK if self.pinned.free(ptr) else (CudaError.cudaErrorInvalidValue,)

    def cudaMemcpyAsync(self, dst: int, src: int, count: int, kind: int, stream: int) -> tuple[CudaError]:
        name = self.cudaMemcpyKind(kind).name.removeprefix("cudaMemcpy")
        source = self.pinned if name.startswith("Host") else self.device
        target = self.pinned if name.endswith("Host") else self.device

        def work() -> None:
            assert source.holds(src, count), f"{name}: the source is not there any more"
            assert target.holds(dst, count), f"{name}: the target is not there any more"
            ctypes.memmove(dst, src, count)

        assert source.holds(src, count), f"{name}: the source is nowhere"
        assert target.holds(dst, count), f"{name}: the target is nowhere"
        self.copies.append((name, count, src))
        self.put(stream, work)
        return OK

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[CudaError, int]:
        assert flags == self.cudaStreamNonBlocking
        handle = next(self._handles)
        self.streams[handle] = Stream()
        return CudaError.cudaSuccess, handle

    def cudaStreamSynchronize(self, stream: int) -> tuple[CudaError]:
        with self._lock:
            if self.stream(stream).captured is not None:
                return (CudaError.cudaErrorStreamCaptureUnsupported,)
            self.stream(stream).run()
        return OK

    def cudaDeviceSynchronize(self) -> tuple[CudaError]:
        with self._lock:
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
            state["pending"] += 1
            state["stream"] = self.stream(stream)
            self.put(stream, happen)
        return OK

    def cudaEventSynchronize(self, event: int) -> tuple[CudaError]:
        with self._lock:
            self._reach(self.events[event])
        return OK

    def cudaEventQuery(self, event: int) -> tuple[CudaError]:
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

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[CudaError]:
        assert mode == self.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        with self._lock:
            found = self.stream(stream)
            assert found.captured is None
            found.graph = next(self._handles)
            found.captured = self.graphs[found.graph] = []
            found.capturing_thread = threading.get_ident()
        return OK

    def cudaStreamEndCapture(self, stream: int) -> tuple[CudaError, int | None]:
        with self._lock:
            found = self.stream(stream)
            assert found.capturing_thread == threading.get_ident()
            found.captured, found.capturing_thread = None, None
            return CudaError.cudaSuccess, found.graph

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[CudaError, int]:
        handle = next(self._handles)
        self.launchable[handle] = list(self.graphs[graph])
        return CudaError.cudaSuccess, handle

    def cudaGraphLaunch(self, graphExec: int, stream: int) -> tuple[CudaError]:
        with self._lock:
            self.launches += 1
            for work in self.launchable[graphExec]:
                self.put(stream, work)
        return OK

    def cudaGraphExecDestroy(self, graphExec: int) -> tuple[CudaError]:
        del self.launchable[graphExec]
        return OK

    def cudaGraphDestroy(self, graph: int) -> tuple[CudaError]:
        del self.graphs[graph]
        for body in self.bodies.pop(graph, []):
            self.cudaGraphDestroy(body)
        return OK

    def cudaMemsetAsync(self, devPtr: int, value: int, count: int, stream: int) -> tuple[CudaError]:
        def work() -> None:
            assert self.device.holds(devPtr, count), "memset: the memory is not there any more"
            ctypes.memset(devPtr, value, count)

        assert self.device.holds(devPtr, count), "memset: the memory is nowhere"
        self.put(stream, work)
        return OK

    def cudaStreamGetCaptureInfo(self, stream: int) -> tuple[Any, ...]:
        found = self.stream(stream)
        if found.captured is None:
            return CudaError.cudaSuccess, 0, None, None, None, None, None
        nodes = [len(found.captured)] if found.captured else []
        return CudaError.cudaSuccess, 1, found.graph, found.graph, nodes, [], len(nodes)

    def cudaGraphConditionalHandleCreate(
        self, graph: int, defaultLaunchValue: int, flags: int
    ) -> tuple[CudaError, int]:
        assert flags == 1, "without cudaGraphCondAssignDefault the last launch's value would stay"
        handle = next(self._handles)

        def assign() -> None:
            self.conditions[handle] = defaultLaunchValue

        self.graphs[graph].insert(0, assign)
        return CudaError.cudaSuccess, handle

    def cudaGraphAddNode(
        self,
        graph: int,
        pDependencies: list[int],
        dependencyData: Any,
        numDependencies: int,
        nodeParams: SimpleNamespace,
    ) -> tuple[CudaError, int]:
        """An If node: whether its body runs is decided when the stream gets there."""
        condition = nodeParams.conditional
        assert nodeParams.type == self.cudaGraphNodeType.cudaGraphNodeTypeConditional
        assert condition.type == self.cudaGraphConditionalNodeType.cudaGraphCondTypeIf
        assert condition.size == 1
        assert pDependencies == [len(self.graphs[graph])], "the decision must come before the node"
        assert numDependencies == 1
        body: list[Work] = []
        handle = next(self._handles)
        self.graphs[handle] = body
        self.bodies.setdefault(graph, []).append(handle)
        condition.phGraph_out = [handle]

        def work() -> None:
            if self.conditions[condition.handle]:
                for part in body:
                    part()

        self.graphs[graph].append(work)
        return CudaError.cudaSuccess, next(self._handles)

    def cudaStreamUpdateCaptureDependencies(
        self, stream: int, dependencies: list[int], dependencyData: Any, numDependencies: int, flags: int
    ) -> tuple[CudaError]:
        assert self.stream(stream).captured is not None
        assert (numDependencies, flags) == (len(dependencies), 1)
        return OK

    def cudaStreamBeginCaptureToGraph(
        self, stream: int, graph: int, dependencies: Any, dependencyData: Any, numDependencies: int, mode: int
    ) -> tuple[CudaError]:
        with self._lock:
            found = self.stream(stream)
            assert found.captured is None
            assert not found.work, "the stream has other things to do"
            found.graph, found.captured = graph, self.graphs[graph]
            found.capturing_thread = threading.get_ident()
        return OK

    def _captures_here(self) -> bool:
        return any(s.capturing_thread == threading.get_ident() for s in self.streams.values())

    def _reach(self, state: dict[str, Any]) -> None:
        if state["stream"] is not None:
            state["stream"].run(until=lambda: not state["pending"])

    def _run_all(self) -> None:
        for stream in list(self.streams.values()):
            stream.run()
