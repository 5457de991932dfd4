"""What a captured graph consists of, and what of it may not go where a graph decides.

A graph that a stream has captured from another library holds whatever that library does.  Before such a
graph becomes a part of a larger one, its nodes are looked at, so that what CUDA would refuse, or what would
go wrong without a word, is refused in a sentence.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from asag_deploy.cuda.runtime import Cuda

Place = Literal["root", "body"]
"""In a graph itself, or in the body of a conditional node."""

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


class Node(NamedTuple):
    """A node of a graph, or of a graph in it."""

    kind: str
    """As in `cudaGraphNodeType`: `Kernel`, `Memset`, `Memcpy`, `Host`, ...; `Graph` is not among them, as
    its own nodes are."""
    source_on_host: bool = False
    target_on_host: bool = False
    """Of a copy: whether it reads or writes memory that is not the GPU's."""


def nodes(cuda: Cuda, graph: int) -> Iterator[Node]:
    """Every node of a graph, with those of its child graphs instead of these.

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


def why_not(cuda: Cuda, graph: int, place: Place) -> str | None:
    """What keeps a captured graph from being a part of another one there; None if nothing does.

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
    """Whether one side of a copy is not the GPU's memory, whatever the copy itself says it were."""
    address = int(side.ptr or 0)
    if not address:  # a CUDA array, which is always on the GPU
        return False
    found = cuda.must(cuda.module.cudaPointerGetAttributes(address), what)
    return bool(found.type != cuda.module.cudaMemoryType.cudaMemoryTypeDevice)
