"""CUDA graphs that decide on the device what of them is run.

A conditional node holds a graph of its own, its body, which runs only if a kernel before it has set the
node's handle.  Here they are added to what a stream captures, so that whole stages can be put into a body:

    condition = new_condition(cuda, stream)  # then put a kernel on the stream that sets it
    with if_set(cuda, stream, condition, inner):
        ...                                  # what is put on the stream `inner` becomes the body

The calls are those of cuda-bindings 13; CUDA 12 has them with other arguments.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from asag_deploy.cuda.runtime import Cuda
from asag_deploy.errors import BackendError

_LEAST_CUDA = 13000
_ASSIGN_DEFAULT = 1
"""cudaGraphCondAssignDefault, which the bindings do not name: each launch begins with the default value."""
_CALLS = (
    "cudaGraphConditionalHandleCreate",
    "cudaGraphAddNode",
    "cudaGraphNodeParams",
    "cudaStreamBeginCaptureToGraph",
    "cudaStreamGetCaptureInfo",
    "cudaStreamUpdateCaptureDependencies",
)


def why_no_conditions(cuda: Cuda) -> str | None:
    """What keeps graphs from deciding on the device here, and what to do about it; None if nothing does."""
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


def new_condition(cuda: Cuda, stream: int) -> int:
    """The handle of a condition, not set when a launch begins, for the graph that `stream` is capturing."""
    graph, _, _ = _captured(cuda, stream)
    answer = cuda.module.cudaGraphConditionalHandleCreate(graph, 0, _ASSIGN_DEFAULT)
    return int(cuda.must(answer, "create a condition"))


@contextlib.contextmanager
def if_set(cuda: Cuda, stream: int, condition: int, inner: int) -> Iterator[None]:
    """Capture what the block puts on the stream `inner` as what `stream` does if the condition is set.

    `stream` is capturing, and has captured the kernel that sets the condition; `inner` must be idle.
    Raises BackendError if CUDA refuses a part of it; `stream` is then still capturing.
    """
    module = cuda.module
    body = _add_if(cuda, stream, condition)
    mode = module.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
    begun = module.cudaStreamBeginCaptureToGraph(inner, body, None, None, 0, mode)
    cuda.must(begun, "capture into a conditional node")
    try:
        yield
    except BaseException:
        module.cudaStreamEndCapture(inner)  # the body belongs to the graph around it, and goes with it
        raise
    cuda.must(module.cudaStreamEndCapture(inner), "capture into a conditional node")


def _add_if(cuda: Cuda, stream: int, condition: int) -> Any:
    """Put an If node after what the stream has captured so far; the graph that is its body."""
    module = cuda.module
    graph, before, edges = _captured(cuda, stream)
    params = module.cudaGraphNodeParams()
    params.type = module.cudaGraphNodeType.cudaGraphNodeTypeConditional
    params.conditional.handle = module.cudaGraphConditionalHandle(condition)
    params.conditional.type = module.cudaGraphConditionalNodeType.cudaGraphCondTypeIf
    params.conditional.size = 1
    added = module.cudaGraphAddNode(graph, before, edges, len(before), params)
    node = cuda.must(added, "add a conditional node")
    instead = module.cudaStreamUpdateCaptureDependenciesFlags.cudaStreamSetCaptureDependencies
    updated = module.cudaStreamUpdateCaptureDependencies(stream, [node], None, 1, instead)
    cuda.must(updated, "put a conditional node in its order")
    return params.conditional.phGraph_out[0]


def _captured(cuda: Cuda, stream: int) -> tuple[Any, list[Any], Any]:
    """The graph that a stream is capturing, the nodes that what comes next depends on, and their edges."""
    status, _, *rest = cuda.module.cudaStreamGetCaptureInfo(stream)
    if status != cuda.module.cudaError_t.cudaSuccess or len(rest) < 4 or rest[1] is None:
        cuda.must((status,), "say what a stream captures")
        raise BackendError("CUDA could not say what a stream captures: nothing is being captured")
    _, graph, nodes, edges, *_ = rest
    return graph, list(nodes or ()), edges or None
