"""A stage that has a graph of its own for pictures of one size.

Feature maps are handed out with the channels last, as convolutions write them.  Only where OpenVINO knows
their sizes when it compiles does it see that nothing has to be moved; else it moves them twice.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Protocol

from asag_deploy.loop.stages import Array, Stage

Shapes = Mapping[str, tuple[int, ...]]
"""The shape of each input of a graph."""

OF_ONE_SIZE = frozenset({"backbone"})
"""Graphs that gain by it, and are compiled for the size that comes first."""


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
        self._compiled_for = compiled_for
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
            if self._first is None:
                self._first = shapes
                self._own = self._compiled_for(shapes)
        return self._own if self._own is not None and shapes == self._first else self._any_size
