"""What `fake_cuda` is made of: memory, streams, the nodes of graphs, and the errors that it gives."""

from __future__ import annotations

import bisect
import enum
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
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
    cudaErrorNotSupported = 801
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901


OK = (CudaError.cudaSuccess,)


class NodeType(enum.IntEnum):
    """`cudaGraphNodeType`."""

    cudaGraphNodeTypeKernel = 0
    cudaGraphNodeTypeMemcpy = 1
    cudaGraphNodeTypeMemset = 2
    cudaGraphNodeTypeHost = 3
    cudaGraphNodeTypeGraph = 4
    cudaGraphNodeTypeEmpty = 5
    cudaGraphNodeTypeWaitEvent = 6
    cudaGraphNodeTypeEventRecord = 7
    cudaGraphNodeTypeMemAlloc = 10
    cudaGraphNodeTypeMemFree = 11
    cudaGraphNodeTypeConditional = 13
    cudaGraphNodeTypeMemcpyBatch = 14


class Memory:
    """Everything that was ever allocated; nothing is reused, so that a stale address is known as such."""

    def __init__(self) -> None:
        self.alive: dict[int, tuple[np.ndarray[Any, Any], int]] = {}
        self.freed: list[np.ndarray[Any, Any]] = []
        self._lock = threading.Lock()
        self._starts: list[int] = []
        """Of what is alive, in ascending order."""

    def allocate(self, size: int, *, noise: bool = True) -> int:
        """Memory full of noise, or as it is, for what nobody reads."""
        whole = np.empty(size + ALIGNMENT, dtype=np.uint8)
        if noise:
            whole[:] = NOISE
        pointer = -(-whole.ctypes.data // ALIGNMENT) * ALIGNMENT
        with self._lock:
            self.alive[pointer] = (whole, size)
            bisect.insort(self._starts, pointer)
        return pointer

    def free(self, pointer: int, *, noise: bool = True) -> bool:
        with self._lock:
            if pointer not in self.alive:
                return False
            whole, _ = self.alive.pop(pointer)
            self._starts.remove(pointer)
        if noise:
            whole[:] = NOISE
        self.freed.append(whole)
        return True

    def holds(self, pointer: int, size: int) -> bool:
        """Whether these bytes lie in one allocation that is alive."""
        with self._lock:
            position = bisect.bisect_right(self._starts, pointer) - 1
            start = self._starts[position] if position >= 0 else pointer + 1
            return start <= pointer and pointer + size <= start + self.alive[start][1]


class NodeHandle(int):
    """`cudaGraphNode_t`, which lists of nodes must be made of."""


@dataclass(eq=False)
class Node:
    """A node.  `graph` is what a child graph node embeds, or the body of a conditional one."""

    kind: str
    work: Work = lambda: None
    copy: SimpleNamespace | None = None
    graph: int | None = None
    condition: int | None = None
    handle: NodeHandle = field(default_factory=NodeHandle)


@dataclass(eq=False)
class Graph:
    """Nodes in an order in which they can run."""

    nodes: list[Node] = field(default_factory=list)
    conditions: dict[int, int] = field(default_factory=dict)
    """The handles that were created for it, and what they are when a launch begins."""


@dataclass(eq=False)
class Capture:
    """What a stream is capturing."""

    graph: int
    thread: int
    invalidated: bool = False


class Stream:
    """Work in its order, not done before somebody waits."""

    def __init__(self) -> None:
        self.work: deque[Work] = deque()
        self.capture: Capture | None = None

    def run(self, until: Callable[[], bool] = lambda: False) -> None:
        while self.work and not until():
            self.work.popleft()()
