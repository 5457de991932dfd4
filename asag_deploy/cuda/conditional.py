"""Conditional nodes of CUDA graphs: what of a graph is run is decided on the device.

A conditional node holds a graph of its own, its body, which runs only if a kernel before it has set the
node's handle.

The calls are those of cuda-bindings 13; CUDA 12 has them with other arguments.
"""

from __future__ import annotations

from typing import Any

from asag_deploy.cuda.runtime import Cuda

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


def new_condition(cuda: Cuda, graph: int) -> int:
    """The handle of a condition, not set when a launch begins, for a conditional node of this graph."""
    answer = cuda.module.cudaGraphConditionalHandleCreate(graph, 0, _ASSIGN_DEFAULT)
    return int(cuda.must(answer, "create a condition"))


def add_if(cuda: Cuda, graph: int, before: list[Any], condition: int) -> tuple[int, int]:
    """Add an If node after the nodes `before`; the node, and the graph that is its body, still empty."""
    module = cuda.module
    params = module.cudaGraphNodeParams()
    params.type = module.cudaGraphNodeType.cudaGraphNodeTypeConditional
    params.conditional.handle = module.cudaGraphConditionalHandle(condition)
    params.conditional.type = module.cudaGraphConditionalNodeType.cudaGraphCondTypeIf
    params.conditional.size = 1
    added = module.cudaGraphAddNode(graph, before, None, len(before), params)
    node = cuda.must(added, "add a conditional node")
    return int(node), int(params.conditional.phGraph_out[0])
