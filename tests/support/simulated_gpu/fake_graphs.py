"""The graphs of `fake_cuda`: captured, put together by hand, looked at, instantiated and launched.

What the real ones refuse, these refuse, and a capture is invalidated by what invalidates a real one.
"""

from __future__ import annotations

import ctypes
import enum
import itertools
import threading
from types import SimpleNamespace
from typing import Any

from support.simulated_gpu.fake_cuda_parts import (
    OK,
    Capture,
    CudaError,
    Graph,
    Memory,
    Node,
    NodeHandle,
    NodeType,
    Stream,
    Work,
)

_IN_BODIES = ("Kernel", "Empty", "Memset", "Memcpy", "Graph", "Conditional")
_NOT_IN_CHILDREN = ("MemAlloc", "MemFree", "Conditional")


class FakeGraphs:
    """The part of the module that is about graphs."""

    cudaStreamCaptureMode = enum.IntEnum("cudaStreamCaptureMode", {"cudaStreamCaptureModeThreadLocal": 1})
    cudaStreamCaptureStatus = enum.IntEnum(
        "cudaStreamCaptureStatus",
        {
            "cudaStreamCaptureStatusNone": 0,
            "cudaStreamCaptureStatusActive": 1,
            "cudaStreamCaptureStatusInvalidated": 2,
        },
    )
    cudaGraphNodeType = NodeType
    cudaGraphConditionalNodeType = enum.IntEnum("cudaGraphConditionalNodeType", {"cudaGraphCondTypeIf": 0})
    cudaMemoryType = enum.IntEnum(
        "cudaMemoryType",
        {"cudaMemoryTypeUnregistered": 0, "cudaMemoryTypeHost": 1, "cudaMemoryTypeDevice": 2},
    )

    def __init__(self) -> None:
        self.device, self.pinned = Memory(), Memory()
        self.streams: dict[int, Stream] = {1: Stream(), 2: Stream()}
        self.graphs: dict[int, Graph] = {}
        self.nodes: dict[int, Node] = {}
        self.launchable: dict[int, tuple[list[Work], dict[int, int]]] = {}
        self.conditions: dict[int, int] = {}
        self.launches = 0
        self.cudaGraphNode_t = NodeHandle
        self.cudaGraphConditionalHandle = int
        self.cudaGraphNodeParams = lambda: SimpleNamespace(type=None, conditional=SimpleNamespace())
        self.cudaMemsetParams = SimpleNamespace
        self._handles = itertools.count(1000)
        self._lock = threading.RLock()

    def stream(self, handle: int) -> Stream:
        """The stream of a handle; AssertionError if there is none any more."""
        assert int(handle) in self.streams, f"there is no stream {handle}"
        return self.streams[int(handle)]

    def put(
        self, handle: int, work: Work, kind: str = "Kernel", copy: SimpleNamespace | None = None
    ) -> CudaError:
        """Put work on a stream, or a node of that kind into what it captures."""
        with self._lock:
            stream = self.stream(handle)
            if stream.capture is None:
                stream.work.append(work)
            elif stream.capture.invalidated:
                return CudaError.cudaErrorStreamCaptureInvalidated
            else:
                self._append(stream.capture.graph, Node(kind, work, copy))
            return CudaError.cudaSuccess

    def add_kernel_node(self, graph: int, dependencies: list[int], work: Work) -> int:
        """A kernel in a graph that is put together by hand, after these of its nodes; its handle."""
        with self._lock:
            self._check_order(graph, dependencies)
            return self._append(graph, Node("Kernel", work))

    def kinds(self, graph: int) -> list[str]:
        """What the nodes of a graph are, with those of bodies and child graphs after theirs."""
        found: list[str] = []
        for node in self.graphs[graph].nodes:
            found += [node.kind, *(self.kinds(node.graph) if node.graph is not None else [])]
        return found

    def invalidate(self, *, here: bool) -> bool:
        """Invalidate this thread's captures (`here`), or everybody's; whether there was one."""
        mine = threading.get_ident()
        found = [
            stream.capture
            for stream in self.streams.values()
            if stream.capture is not None and (not here or stream.capture.thread == mine)
        ]
        for one in found:
            one.invalidated = True
        return bool(found)

    # From here on the names and results of the real module.

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[CudaError]:
        assert mode == self.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        with self._lock:
            found = self.stream(stream)
            assert found.capture is None
            found.capture = Capture(self._new_graph(), threading.get_ident())
        return OK

    def cudaStreamIsCapturing(self, stream: int) -> tuple[CudaError, int]:
        return CudaError.cudaSuccess, self._status(self.stream(stream).capture)

    def cudaStreamEndCapture(self, stream: int) -> tuple[CudaError, int | None]:
        with self._lock:
            found = self.stream(stream)
            capture, found.capture = found.capture, None
            assert capture is not None
            assert capture.thread == threading.get_ident()
            if not capture.invalidated:
                return CudaError.cudaSuccess, capture.graph
            self.cudaGraphDestroy(capture.graph)
            return CudaError.cudaErrorStreamCaptureInvalidated, None

    def cudaGraphCreate(self, flags: int) -> tuple[CudaError, int]:
        assert flags == 0
        return CudaError.cudaSuccess, self._new_graph()

    def cudaGraphGetNodes(self, graph: int, numNodes: int = 0) -> tuple[CudaError, list[NodeHandle], int]:
        handles = [node.handle for node in self.graphs[graph].nodes]
        return CudaError.cudaSuccess, handles[:numNodes], len(handles)

    def cudaGraphNodeGetType(self, node: int) -> tuple[CudaError, NodeType]:
        return CudaError.cudaSuccess, NodeType[f"cudaGraphNodeType{self.nodes[node].kind}"]

    def cudaGraphMemcpyNodeGetParams(self, node: int) -> tuple[CudaError, Any]:
        assert self.nodes[node].kind == "Memcpy"
        return CudaError.cudaSuccess, self.nodes[node].copy

    def cudaGraphChildGraphNodeGetGraph(self, node: int) -> tuple[CudaError, int | None]:
        assert self.nodes[node].kind == "Graph"
        return CudaError.cudaSuccess, self.nodes[node].graph

    def cudaPointerGetAttributes(self, ptr: int) -> tuple[CudaError, Any]:
        types = self.cudaMemoryType
        if self.device.holds(ptr, 1):
            return CudaError.cudaSuccess, SimpleNamespace(type=types.cudaMemoryTypeDevice)
        pinned = self.pinned.holds(ptr, 1)
        found = types.cudaMemoryTypeHost if pinned else types.cudaMemoryTypeUnregistered
        return CudaError.cudaSuccess, SimpleNamespace(type=found)

    def cudaGraphAddChildGraphNode(
        self, graph: int, pDependencies: list[int], numDependencies: int, childGraph: int
    ) -> tuple[CudaError, int | None]:
        with self._lock:
            self._check_handles(graph, pDependencies, numDependencies)
            if any(node.kind in _NOT_IN_CHILDREN for node in self.graphs[childGraph].nodes):
                return CudaError.cudaErrorInvalidValue, None
            return CudaError.cudaSuccess, self._append(graph, Node("Graph", graph=self._clone(childGraph)))

    def cudaGraphAddMemsetNode(
        self, graph: int, pDependencies: list[int], numDependencies: int, pMemsetParams: Any
    ) -> tuple[CudaError, int]:
        given = pMemsetParams
        assert (given.elementSize, given.height, given.pitch) == (1, 1, 0)
        self._check_handles(graph, pDependencies, numDependencies)
        work = self._memset(given.dst, given.value, given.width)
        return CudaError.cudaSuccess, self._append(graph, Node("Memset", work))

    def cudaGraphConditionalHandleCreate(
        self, graph: int, defaultLaunchValue: int, flags: int
    ) -> tuple[CudaError, int]:
        assert flags == 1, "without cudaGraphCondAssignDefault the last launch's value would stay"
        handle = next(self._handles)
        self.graphs[graph].conditions[handle] = defaultLaunchValue
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
        assert nodeParams.type == NodeType.cudaGraphNodeTypeConditional
        assert condition.type == self.cudaGraphConditionalNodeType.cudaGraphCondTypeIf
        assert condition.size == 1
        assert condition.handle in self.graphs[graph].conditions, "the handle is of another graph"
        self._check_handles(graph, pDependencies, numDependencies)
        assert numDependencies == 1, "the decision must come before the node"
        body = self._new_graph()
        condition.phGraph_out = [body]
        node = Node("Conditional", graph=body, condition=condition.handle)
        return CudaError.cudaSuccess, self._append(graph, node)

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[CudaError, int | None]:
        with self._lock:
            if not self._allowed(graph, in_body=False):
                return CudaError.cudaErrorNotSupported, None
            defaults: dict[int, int] = {}
            used: list[int] = []
            program = self._program(graph, defaults, used)
            if sorted(used) != sorted(defaults):
                return CudaError.cudaErrorInvalidValue, None  # a handle without its node
            handle = next(self._handles)
            self.launchable[handle] = (program, defaults)
        return CudaError.cudaSuccess, handle

    def cudaGraphLaunch(self, graphExec: int, stream: int) -> tuple[CudaError]:
        with self._lock:
            assert self.stream(stream).capture is None
            self.launches += 1
            program, defaults = self.launchable[graphExec]
            for work in (lambda: self.conditions.update(defaults), *program):
                self.put(stream, work)
        return OK

    def cudaGraphExecDestroy(self, graphExec: int) -> tuple[CudaError]:
        del self.launchable[graphExec]
        return OK

    def cudaGraphDestroy(self, graph: int) -> tuple[CudaError]:
        with self._lock:
            for node in self.graphs.pop(graph).nodes:
                del self.nodes[node.handle]
                if node.graph is not None:
                    self.cudaGraphDestroy(node.graph)
        return OK

    def _memset(self, pointer: int, value: int, count: int) -> Work:
        def work() -> None:
            assert self.device.holds(pointer, count), "memset: the memory is not there any more"
            ctypes.memset(pointer, value, count)

        assert self.device.holds(pointer, count), "memset: the memory is nowhere"
        return work

    def _memcpy(
        self, target: int, source: int, count: int, targets: Memory, sources: Memory
    ) -> tuple[Work, SimpleNamespace]:
        def work() -> None:
            assert sources.holds(source, count), "memcpy: the source is not there any more"
            assert targets.holds(target, count), "memcpy: the target is not there any more"
            ctypes.memmove(target, source, count)

        assert sources.holds(source, count), "memcpy: the source is nowhere"
        assert targets.holds(target, count), "memcpy: the target is nowhere"
        sides = {"srcPtr": SimpleNamespace(ptr=source), "dstPtr": SimpleNamespace(ptr=target)}
        return work, SimpleNamespace(**sides)

    def _status(self, capture: Capture | None) -> int:
        return 0 if capture is None else 2 if capture.invalidated else 1

    def _new_graph(self) -> int:
        handle = next(self._handles)
        self.graphs[handle] = Graph()
        return handle

    def _append(self, graph: int, node: Node) -> NodeHandle:
        node.handle = NodeHandle(next(self._handles))
        self.nodes[node.handle] = node
        self.graphs[graph].nodes.append(node)
        return node.handle

    def _check_handles(self, graph: int, dependencies: list[int], count: int) -> None:
        assert count == len(dependencies)
        assert all(isinstance(node, NodeHandle) for node in dependencies), "nodes are cudaGraphNode_t"
        self._check_order(graph, dependencies)

    def _check_order(self, graph: int, dependencies: list[int]) -> None:
        last = [node.handle for node in self.graphs[graph].nodes[-1:]]
        assert list(dependencies) == last, "nothing says that the node comes after the one before it"

    def _clone(self, graph: int) -> int:
        made = self._new_graph()
        for node in self.graphs[graph].nodes:
            inner = None if node.graph is None else self._clone(node.graph)
            self._append(made, Node(node.kind, node.work, node.copy, inner))
        return made

    def _allowed(self, graph: int, *, in_body: bool) -> bool:
        return all(
            (not in_body or (node.kind in _IN_BODIES and self._on_device(node)))
            and (
                node.graph is None or self._allowed(node.graph, in_body=in_body or node.condition is not None)
            )
            for node in self.graphs[graph].nodes
        )

    def _on_device(self, node: Node) -> bool:
        sides = () if node.copy is None else (node.copy.srcPtr.ptr, node.copy.dstPtr.ptr)
        return all(self.device.holds(pointer, 1) for pointer in sides)

    def _program(self, graph: int, defaults: dict[int, int], used: list[int]) -> list[Work]:
        """What a graph does; collects the handles of its conditions, and those that nodes use."""
        defaults.update(self.graphs[graph].conditions)
        program: list[Work] = []
        for node in self.graphs[graph].nodes:
            inner = [] if node.graph is None else self._program(node.graph, defaults, used)
            if node.condition is None:
                program += inner if node.graph is not None else [node.work]
                continue
            used.append(node.condition)
            program.append(lambda handle=node.condition, body=inner: self._if(handle, body))  # type: ignore[misc]
        return program

    def _if(self, condition: int, body: list[Work]) -> None:
        if self.conditions[condition]:
            for work in body:
                work()
