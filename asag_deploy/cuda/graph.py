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
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from asag_deploy.cuda.captures import captures
from asag_deploy.cuda.conditional import add_if, new_condition
from asag_deploy.cuda.graph_nodes import Place, why_not
from asag_deploy.cuda.runtime import Cuda
from asag_deploy.errors import BackendError, CaptureError

_ATTEMPTS = 3
"""A capture is begun again if it was invalidated, which what another thread does can do at any time."""

AddKernel = Callable[[int, list[int]], int]
"""Adds a kernel to a graph, after these of its nodes, and gives the node."""


class _InvalidatedError(CaptureError):
    """A capture that may go well another time."""


def capture(cuda: Cuda, stream: int, work: Callable[[], None]) -> int:
    """What `work` puts on `stream`, which has nothing else to do, noted down as a graph instead of done.

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
        """A copy of a captured graph; `name` says in messages whose it is.

        Raises CaptureError if it holds what may not be here, which is found before anything is instantiated.
        """
        problem = why_not(self._cuda, part, self._place)
        if problem is not None:
            raise CaptureError(f"what '{name}' does cannot be a part of the graph: {problem}")
        module = self._cuda.module
        answer = module.cudaGraphAddChildGraphNode(self.graph, self._handles(), len(self._last), part)
        self._add(self._cuda.must(answer, f"make '{name}' a part of a graph"))

    def add_kernel(self, add: AddKernel) -> None:
        """A kernel that `add` adds."""
        self._add(add(self.graph, list(self._last)))

    def add_clear(self, pointer: int, size: int) -> None:
        """Set `size` bytes of device memory to zero."""
        module = self._cuda.module
        params = module.cudaMemsetParams()
        params.dst, params.value = pointer, 0
        params.elementSize, params.width, params.height, params.pitch = 1, size, 1, 0
        answer = module.cudaGraphAddMemsetNode(self.graph, self._handles(), len(self._last), params)
        self._add(self._cuda.must(answer, "let a graph clear memory"))

    def add_copy(self, target: int, source: int, size: int) -> None:
        """Copy `size` bytes from device memory to device memory."""
        module = self._cuda.module
        kind = module.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        before = (self._handles(), len(self._last))
        answer = module.cudaGraphAddMemcpyNode1D(self.graph, *before, target, source, size, kind)
        self._add(self._cuda.must(answer, "let a graph copy memory"))

    def new_condition(self) -> int:
        """The handle of a condition for `add_if`, not set when a launch begins."""
        return new_condition(self._cuda, self.graph)

    def add_if(self, condition: int) -> Chain:
        """A conditional node; what runs if a kernel before it has set the condition."""
        node, body = add_if(self._cuda, self.graph, self._handles(), condition)
        self._add(node)
        return Chain(self._cuda, body, "body")

    def instantiate(self) -> int:
        """The finished graph as one that can be launched; the caller's, to be let go of."""
        return self._cuda.instantiate(self.graph)

    def _handles(self) -> list[Any]:
        return [self._cuda.module.cudaGraphNode_t(node) for node in self._last]

    def _add(self, node: Any) -> None:
        self._last = [int(node)]


@contextlib.contextmanager
def new_graph(cuda: Cuda) -> Iterator[Chain]:
    """An empty graph, which goes with the block, and everything in it; what was made of it stays."""
    graph = cuda.create_graph()
    try:
        yield Chain(cuda, graph)
    finally:
        cuda.destroy_graph(graph)
