"""A stage that has a graph of its own for pictures of one size.

Feature maps are handed out with the channels last, as convolutions write them.  Only where OpenVINO knows
their sizes when it compiles does it see that nothing has to be moved; else it moves them twice.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from asag_deploy.bundle.manifest import GraphSpec
from asag_deploy.loop.stages import Array, Stage

Shapes = Mapping[str, tuple[int, ...]]
"""The shape of each input of a graph."""

_AHEAD = 32
"""Calls by which another size must be ahead; twice as many each time, so that sizes in turn do not thrash."""
_SIZES = 64
"""Sizes that are counted; of more, those that came least often are forgotten."""


def takes_pictures(graph: GraphSpec) -> bool:
    """Tell whether a graph gains by it: one that takes pictures of any size, such as `backbone`."""
    return any(spec.name == "image" for spec in graph.inputs)


class KeptFile:
    """A file as it was opened, also when it is deleted or another takes its name meanwhile."""

    def __init__(self, path: Path) -> None:
        """Open the file (OSError if that cannot be); it is closed when this goes."""
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor).atexit = False

    def read(self) -> bytes:
        """Return the content (OSError if it cannot be read)."""
        with os.fdopen(os.dup(self._descriptor), "rb") as stream:
            stream.seek(0)
            return stream.read()


class _AnySize(Protocol):
    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]: ...

    def shapes(self, inputs: Mapping[str, Array]) -> Shapes | None:
        """Return the shapes of a call's inputs, or None if one is missing."""
        ...


class StageOfOneSize:
    """Runs one size of pictures in a graph compiled for it, all others in that for any.

    It is the size that comes first, until another has come so much more often that compiling again pays: in
    a data set, say, or where the first picture was an odd one.  The first call waits until its graph is
    compiled, a later one for another size; meanwhile other threads use the graph for any size.  Safe to
    call from several threads at once.
    """

    def __init__(self, any_size: _AnySize, compiled_for: Callable[[Shapes], Stage | None]) -> None:
        """Take the graph for any size, and what makes another for one; it returns None if that cannot be."""
        self._any_size = any_size
        self._compiled_for = compiled_for
        self._lock = threading.Lock()
        self._compiling = threading.Lock()
        self._shapes: Shapes | None = None
        self._own: Stage | None = None
        self._ahead = _AHEAD
        self._calls: Counter[tuple[tuple[str, tuple[int, ...]], ...]] = Counter()

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the graph that suits the inputs."""
        return self._suiting(self._any_size.shapes(inputs))(inputs)

    def _suiting(self, shapes: Shapes | None) -> Stage:
        if shapes is None:
            return self._any_size  # which says what is missing
        if self._shapes is None:
            with self._compiling:
                if self._shapes is None:
                    self._own, self._shapes = self._compiled_for(shapes), shapes
        if self._is_better(shapes) and self._compiling.acquire(blocking=False):
            try:
                self._change_to(shapes)
            finally:
                self._compiling.release()
        with self._lock:
            return self._own if self._own is not None and shapes == self._shapes else self._any_size

    def _change_to(self, shapes: Shapes) -> None:
        """Compile for another size; the graph that is there stays if that cannot be."""
        own = self._compiled_for(shapes)
        with self._lock:
            if own is not None:
                self._own, self._shapes = own, shapes
            self._ahead *= 2
            self._calls.clear()

    def _is_better(self, shapes: Shapes) -> bool:
        """Count a call; tell whether its size has come so often that the graph should be of that one."""
        with self._lock:
            if self._own is None or self._shapes is None:
                return False  # the first could not be compiled, and so no other is tried
            key, own = (tuple(sorted(each.items())) for each in (shapes, self._shapes))
            self._calls[key] += 1
            if len(self._calls) > _SIZES:
                self._calls = Counter(dict(self._calls.most_common(_SIZES // 2)))
            return self._calls[key] - self._calls[own] >= self._ahead
