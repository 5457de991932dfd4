"""CUDA graphs put together by hand, of parts that were captured alone.

    part = capture(cuda, stream, lambda: engine.enqueue(stream))
    with new_graph(cuda) as root:
        root.add_clear(pointer, size)
        root.add_part(part)
        condition = root.new_condition()
        root.add_kernel(...)             # which sets the condition
        body = root.add_if(condition)    # runs if it is set
        body.add_part(other)
        launchable = root.instantiate()

A capture straight into the body of a conditional node would be shorter.  But if such a capture is
invalidated, by whatever any library does in any thread, the process ends in the driver.  A capture on a
stream of its own just fails.

A part holds whatever another library does.  Before it is added its nodes are looked at, so that what CUDA
would refuse, or what would go wrong without a word, is refused in a sentence.

A conditional node holds a graph of its own, its body, which runs only if a kernel before it has set the
node's handle.  The calls for it are those of cuda-bindings 13; CUDA 12 has them with other arguments.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

from asag_deploy.cuda.captures import captures
from asag_deploy.cuda.runtime import Cuda
from asag_deploy.errors import BackendError, CaptureError

Place = Literal["root", "body"]
"""In a graph itself, or in the body of a conditional node."""

_ATTEMPTS = 3
"""A capture is begun again if it was invalidated, which what another thread does can do at any time."""

_LEAST_CUDA = 13000
_ASSIGN_DEFAULT = 1
"""cudaGraphCondAssignDefault, which the bindings do not name: each launch begins with the default value."""
_CALLS = (
    "cudaGraphConditionalHandleCreate",
    "cudaGraphAddNode",
    "cudaGraphAddChildGraphNode",
    "cudaGraphNodeParams",
    "cudaStreamIsCapturing",
)
_PREFIX = "cudaGraphNodeType"
_HARMLESS = ("Kernel", "Empty", "Memset")
_WORDS = {
    "Host": "a function on the host",
    "MemAlloc": "an allocation of memory",
    "MemFree": "a release of memory",
    "EventRecord": "the record of an event",
    "WaitEvent": "a wait for an event",
    "Conditional": "a conditional node, which a child graph cannot hold",
}

AddKernel = Callable[[int, list[int]], int]
"""Adds a kernel to a graph, after these of its nodes, and gives the node."""


class _InvalidatedError(CaptureError):
    """A capture that may go well another time."""


def capture(cuda: Cuda, stream: int, work: Callable[[], None]) -> int:
    """Note down as a graph what `work` puts on `stream`, which has nothing else to do, instead of doing it.

    The graph is the caller's, to be let go of with `destroy_graph`.  Raises CaptureError if CUDA refuses to
    capture it, and what `work` raises; the stream can be used again in either case.
    """
    for _ in range(_ATTEMPTS - 1):
        with contextlib.suppress(_InvalidatedError):
            return _capture_once(cuda, stream, work)
    return _capture_once(cuda, stream, work)


def _capture_once(cuda: Cuda, stream: int, work: Callable[[], None]) -> int:
    with captures.going_on():
        cuda.begin_capture(stream)
        try:
            work()
        except BaseException as error:
            invalidated = cuda.capture_status(stream) == "invalidated"
            cuda.abandon_capture(stream)
            if invalidated and isinstance(error, BackendError):
                raise _InvalidatedError(str(error)) from error
            raise
        try:
            return cuda.end_capture(stream)
        except BackendError as error:
            raise _InvalidatedError(str(error)) from error


class Chain:
    """A graph, or the body of a conditional node, whose nodes run one after the other."""

    def __init__(self, cuda: Cuda, graph: int, place: Place = "root") -> None:
        self._cuda = cuda
        self._place: Place = place
        self._last: list[int] = []
        self.graph = graph
        """Its handle; a body belongs to the graph around it."""

    def add_part(self, part: int, name: str) -> None:
        """Add a copy of a captured graph; `name` says in messages whose it is.

        Raises CaptureError if it holds what may not be here, which is found before anything is instantiated.
        """
        problem = why_not_a_part(self._cuda, part, self._place)
        if problem is not None:
            raise CaptureError(f"what '{name}' does cannot be a part of the graph: {problem}")
        module = self._cuda.module
        answer = module.cudaGraphAddChildGraphNode(self.graph, self._handles(), len(self._last), part)
        self._add(self._cuda.must(answer, f"make '{name}' a part of a graph"))

    def add_kernel(self, add: AddKernel) -> None:
        """Add a kernel by calling `add`."""
        self._add(add(self.graph, list(self._last)))

    def add_clear(self, pointer: int, size: int) -> None:
        """Set `size` bytes of device memory to zero."""
        module = self._cuda.module
        params = module.cudaMemsetParams()
        params.dst, params.value = pointer, 0
        params.elementSize, params.width, params.height, params.pitch = 1, size, 1, 0
        answer = module.cudaGraphAddMemsetNode(self.graph, self._handles(), len(self._last), params)
        self._add(self._cuda.must(answer, "let a graph clear memory"))

    def new_condition(self) -> int:
        """Make the handle of a condition for `add_if`, not set when a launch begins."""
        answer = self._cuda.module.cudaGraphConditionalHandleCreate(self.graph, 0, _ASSIGN_DEFAULT)
        return int(self._cuda.must(answer, "create a condition"))

    def add_if(self, condition: int) -> Chain:
        """Add a conditional node; return its body, which runs if a kernel before it has set the condition."""
        module = self._cuda.module
        params = module.cudaGraphNodeParams()
        params.type = module.cudaGraphNodeType.cudaGraphNodeTypeConditional
        params.conditional.handle = module.cudaGraphConditionalHandle(condition)
        params.conditional.type = module.cudaGraphConditionalNodeType.cudaGraphCondTypeIf
        params.conditional.size = 1
        answer = module.cudaGraphAddNode(self.graph, self._handles(), None, len(self._last), params)
        self._add(self._cuda.must(answer, "add a conditional node"))
        return Chain(self._cuda, int(params.conditional.phGraph_out[0]), "body")

    def instantiate(self) -> int:
        """Make the finished graph one that can be launched; the caller has to let go of it."""
        return self._cuda.instantiate(self.graph)

    def _handles(self) -> list[Any]:
        return [self._cuda.module.cudaGraphNode_t(node) for node in self._last]

    def _add(self, node: Any) -> None:
        self._last = [int(node)]


@contextlib.contextmanager
def new_graph(cuda: Cuda) -> Iterator[Chain]:
    """Make an empty graph, which goes with the block; what was instantiated of it stays."""
    graph = cuda.create_graph()
    try:
        yield Chain(cuda, graph)
    finally:
        cuda.destroy_graph(graph)


class Node(NamedTuple):
    """A node of a graph, or of a graph in it."""

    kind: str
    """As in `cudaGraphNodeType`: `Kernel`, `Memset`, `Memcpy`, `Host`, ...; `Graph` is not among them, as
    its own nodes are."""
    source_on_host: bool = False
    target_on_host: bool = False
    """Whether a copy reads or writes memory that is not the GPU's."""


def nodes(cuda: Cuda, graph: int) -> Iterator[Node]:
    """Yield every node of a graph; in place of a child graph, the nodes of that.

    Raises BackendError if CUDA does not say.
    """
    module, what = cuda.module, "say what a graph holds"
    for node in _handles(cuda, graph):
        kind = cuda.must(module.cudaGraphNodeGetType(node), what).name.removeprefix(_PREFIX)
        if kind == "Graph":
            yield from nodes(cuda, int(cuda.must(module.cudaGraphChildGraphNodeGetGraph(node), what)))
        elif kind == "Memcpy":
            copy = cuda.must(module.cudaGraphMemcpyNodeGetParams(node), what)
            yield Node(kind, _on_host(cuda, copy.srcPtr, what), _on_host(cuda, copy.dstPtr, what))
        else:
            yield Node(kind)


def why_not_a_part(cuda: Cuda, graph: int, place: Place) -> str | None:
    """Return what keeps a captured graph from being a part of another one there; None if nothing does.

    A body holds no copy from or to the host's memory: CUDA allows kernels, memory of the GPU, child graphs
    and conditional nodes there.  In the root a copy *from* the host is let through.  TensorRT puts one there
    for sizes that it computes with (`ShapeHostToDeviceCopy`); they follow from the shapes, which stay what
    they are as long as the context and with it the graph, and the library itself has captured runs replayed
    so.  A copy *to* the host never is: what is read back there decides something, once, at the capture.
    """
    for node in nodes(cuda, graph):
        if node.kind == "Memcpy":
            if node.target_on_host:
                return "it copies to the host's memory, where a replayed graph has nobody to read it"
            if node.source_on_host and place == "body":
                return (
                    "it copies from the host's memory, which the body of a conditional node cannot; "
                    "export the bundle again with this release, whose probes take all sizes from the GPU"
                )
        elif node.kind not in _HARMLESS:
            what = _WORDS.get(node.kind, f"a node of type {node.kind}")
            return f"it holds {what}, and only kernels, copies and cleared memory can be replayed in it"
    return None


def _handles(cuda: Cuda, graph: int) -> list[Any]:
    what = "say what a graph holds"
    answer = cuda.module.cudaGraphGetNodes(graph, 0)
    cuda.must(answer, what)
    count = int(answer[2])
    return list(cuda.must(cuda.module.cudaGraphGetNodes(graph, count), what)) if count else []


def _on_host(cuda: Cuda, side: Any, what: str) -> bool:
    """Tell whether one side of a copy is not the GPU's memory, whatever the copy itself says."""
    address = int(side.ptr or 0)
    if not address:  # a CUDA array, which is always on the GPU
        return False
    found = cuda.must(cuda.module.cudaPointerGetAttributes(address), what)
    return bool(found.type != cuda.module.cudaMemoryType.cudaMemoryTypeDevice)


def why_no_conditions(cuda: Cuda) -> str | None:
    """Return what keeps graphs from deciding on the device, and what to do about it; None if nothing does."""
    driver, runtime = cuda.versions()
    if runtime < _LEAST_CUDA or any(not hasattr(cuda.module, name) for name in _CALLS):
        return (
            f"conditional nodes of CUDA graphs take cuda-bindings 13, but the one here is for CUDA "
            f"{runtime // 1000}.{runtime % 1000 // 10}; install `pip install 'cuda-bindings==13.*'`"
        )
    if driver < _LEAST_CUDA:
        return (
            f"conditional nodes of CUDA graphs take a driver for CUDA 13, but the one here supports CUDA "
            f"{driver // 1000}.{driver % 1000 // 10}; install a newer driver"
        )
    return None
