"""A stage in pieces: graphs that a library runs, and between them operators that are compiled for the CPU."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from asag_deploy.backends.cutting import DEFORMABLE, TOP_K, Call, Plan, can_cut, has_function, why_no_cutting
from asag_deploy.backends.network import check_inputs, check_shapes
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.bundle.manifest import GraphSpec
from asag_deploy.errors import Problem, first_line
from asag_deploy.kernels.buffers import Buffer, ScaledIntegers
from asag_deploy.kernels.cpu import MOST_THREADS, CpuKernels, cpu_kernels, why_no_cpu_kernels, why_unfit
from asag_deploy.loop.stages import Array, Stage

FLOAT32 = np.dtype(np.float32)
_CUT = frozenset({"decoder"})
"""Graphs that are cut, whatever operators they hold, where these are compiled for the CPU."""

_whole: ContextVar[bool] = ContextVar("graphs run whole", default=False)


@contextmanager
def graphs_run_whole() -> Iterator[None]:
    """Let networks that are opened meanwhile run their graphs whole, to compare them with those in pieces."""
    token = _whole.set(True)
    try:
        yield
    finally:
        _whole.reset(token)


def kernels_for_cutting() -> CpuKernels | None:
    """Return the operators if graphs can and may be cut at them here, else None.

    Warns, once in a process, of an installed package whose library cannot be used.  Raises BackendError for a
    library that `ASAG_CPU_KERNELS_LIBRARY` names and that cannot be used.
    """
    if _whole.get():
        return None
    kernels = cpu_kernels()
    if kernels is None and (unfit := why_unfit()) is not None:
        _warn_of_an_unfit_package(str(unfit))
    return kernels if kernels is not None and can_cut() else None


def is_cut(name: str, path: Path) -> bool:
    """Tell whether the graph `name`, in that file, is cut where the operators are compiled for the CPU."""
    return name in _CUT or has_function(path, DEFORMABLE)


def is_cut_of(bundle: Bundle, name: str) -> bool:
    """Tell it of a graph of a bundle.

    One in float16 is not: what stands between its operators would be in another type than they give.
    """
    return bundle.manifest.precision_of(name) != "fp16" and is_cut(name, bundle.graph_path(name))


def why_no_pieces() -> Problem | None:
    """Say why graphs run whole here, and what to do; None if they are cut at the compiled operators."""
    return why_no_cpu_kernels() or why_no_cutting()


@functools.cache
def _warn_of_an_unfit_package(problem: str) -> None:
    """Say once that graphs are not cut, although a package brought the operators."""
    warnings.warn(f"graphs run whole, which is slower: {problem}", RuntimeWarning, stacklevel=4)


def warn_of_running_whole(name: str, error: Exception) -> None:
    """Say that a graph which was cut could not be loaded in pieces, and so runs whole."""
    warnings.warn(
        f"the graph '{name}' runs whole, which is slower: {first_line(error)}", RuntimeWarning, stacklevel=3
    )


def threads_of_an_operator(threads: int | None, requests: int) -> int:
    """Return how many threads an operator uses if `requests` calls at once share `threads` (None: all)."""
    return max(1, min((threads or len(os.sched_getaffinity(0))) // requests, MOST_THREADS))


class HostMemory(Protocol):
    """How a backend's arrays are reached on the host without a copy."""

    def view(self, array: Array) -> Buffer | NDArray[Any] | ScaledIntegers:
        """Return the memory of an array, which lives as long as the array does."""
        ...

    def wrap(self, values: NDArray[Any]) -> Array:
        """Return an array of the backend in this memory."""
        ...


class StageInPieces:
    """A stage that was cut.  Safe to call from several threads at once."""

    def __init__(
        self,
        graph: GraphSpec,
        plan: Plan,
        pieces: Sequence[Stage],
        kernels: CpuKernels,
        memory: HostMemory,
        *,
        threads: int,
        features: np.dtype[Any] = FLOAT32,
    ) -> None:
        """Put a stage together.

        threads: of each operator; features: the type of those that operators give.
        """
        self._graph, self._plan, self._pieces = graph, plan, pieces
        self._kernels, self._memory = kernels, memory
        self._threads, self._features = threads, features
        self._inputs = [spec.name for spec in plan.inputs]
        self._used_up = _used_up(plan)
        self._operators: dict[str, Callable[[Call, list[Any]], Sequence[NDArray[Any]]]] = {
            "MultiscaleRoIAlign": self._roi_align,
            "PyramidSample": self._pyramid_sample,
            "DeformableSample": self._deformable_sample,
            "AdaptiveMixing": self._adaptive_mixing,
            "PadAnchors": self._pad_anchors,
            TOP_K: self._top_k,
        }

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run all pieces on those of `inputs` that the stage declares."""
        check_inputs(self._graph.name, self._inputs, inputs)
        values = {name: inputs[name] for name in self._inputs}
        steps = zip(self._pieces, self._plan.calls, self._used_up, strict=True)
        for piece, calls, used_up in steps:
            values.update(piece(values))
            for call in calls:
                given = [self._memory.view(values[name]) for name in call.inputs]
                results = self._operators[call.operator](call, given)
                values.update(
                    (name, self._memory.wrap(result))
                    for name, result in zip(call.outputs, results, strict=True)
                )
            for name in used_up:  # so that what comes finds room where it was
                del values[name]
        outputs = {spec.name: values[spec.name] for spec in self._plan.outputs}
        given_shapes, made_shapes = (
            {name: tuple(self._memory.view(values[name]).shape) for name in names}
            for names in (self._inputs, outputs)
        )
        check_shapes(self._graph, given_shapes, made_shapes)
        return outputs

    def _roi_align(self, call: Call, given: list[Any]) -> Sequence[NDArray[Any]]:
        *features, boxes = given
        return (
            self._kernels.multiscale_roi_align(
                features, boxes, strides=call.attributes["strides"], out=self._features, threads=self._threads
            ),
        )

    def _pyramid_sample(self, call: Call, given: list[Any]) -> Sequence[NDArray[Any]]:
        *features, xy, weight = given
        return (
            self._kernels.pyramid_sample(
                features,
                xy,
                weight,
                strides=call.attributes["strides"],
                out=self._features,
                threads=self._threads,
            ),
        )

    def _deformable_sample(self, call: Call, given: list[Any]) -> Sequence[NDArray[Any]]:
        *features, xy, weight = given
        return (
            self._kernels.deformable_sample(features, xy, weight, out=self._features, threads=self._threads),
        )

    def _adaptive_mixing(self, call: Call, given: list[Any]) -> Sequence[NDArray[Any]]:
        sampled, parameters = given
        (out_points,), (activation,) = call.attributes["out_points"], call.attributes["activation"]
        return (
            self._kernels.adaptive_mixing(
                sampled,
                parameters,
                out_points=out_points,
                activation=activation,
                out=self._features,
                threads=self._threads,
            ),
        )

    def _pad_anchors(self, call: Call, given: list[Any]) -> Sequence[NDArray[Any]]:
        anchors, keep, image_size, slots = given
        return self._kernels.pad_anchors(
            anchors,
            keep,
            image_size,
            slots.shape[0],
            **{name: value for name, (value,) in call.attributes.items()},
        )

    def _top_k(self, call: Call, given: list[Any]) -> Sequence[NDArray[Any]]:
        values, count = given
        return self._kernels.top_k(values, int(np.asarray(count).reshape(-1)[0]))


def _used_up(plan: Plan) -> list[list[str]]:
    """List what nobody reads any more after each piece and the calls that follow it."""
    kept = {spec.name for spec in (*plan.inputs, *plan.outputs)}
    last: dict[str, int] = {}
    for i, (piece, calls) in enumerate(zip(plan.pieces, plan.calls, strict=True)):
        names = {*piece.inputs, *piece.outputs}
        for call in calls:
            names.update(call.inputs, call.outputs)
        last.update((name, i) for name in names - kept)
    return [[name for name, when in last.items() if when == i] for i in range(len(plan.pieces))]
