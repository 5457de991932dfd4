"""A stage that has a graph of its own for pictures of one size.

Feature maps are handed out with the channels last, as convolutions write them.  Only where OpenVINO knows
their sizes when it compiles does it see that nothing has to be moved; else it moves them twice.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from asag_deploy.bundle.manifest import GraphSpec
from asag_deploy.loop.stages import Array, Stage

Shapes = Mapping[str, tuple[int, ...]]
"""The shape of each input of a graph."""


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
    """Runs the shapes that come first in a graph compiled for them, all others in that for any.

    The first call waits until it is compiled.  Safe to call from several threads at once.
    """

    def __init__(self, any_size: _AnySize, compiled_for: Callable[[Shapes], Stage | None]) -> None:
        """Take the graph for any size, and what makes another for one; it returns None if that cannot be."""
        self._any_size = any_size
        self._compiled_for: Callable[[Shapes], Stage | None] | None = compiled_for
        self._lock = threading.Lock()
        self._first: Shapes | None = None
        self._own: Stage | None = None

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the graph that suits the inputs."""
        return self._suiting(self._any_size.shapes(inputs))(inputs)

    def _suiting(self, shapes: Shapes | None) -> Stage:
        if shapes is None:
            return self._any_size  # which says what is missing
        with self._lock:
            if self._compiled_for is not None:
                self._first, self._own = shapes, self._compiled_for(shapes)
                self._compiled_for = None  # the file that it reads is let go
        return self._own if self._own is not None and shapes == self._first else self._any_size
