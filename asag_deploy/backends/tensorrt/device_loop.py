"""The probing loop on the GPU: a whole detection is the launch of one graph, which decides by itself.

The host reads nothing in between.  What it needs for traces, the counts of each level, it reads with the
results, and it holds the GPU's decisions against its own, `asag_deploy.loop.stopping.Decisions`.

A graph has fixed shapes (`asag_deploy.backends.tensorrt.loop_graph`).  So a level has room for a fixed
number of patches an image, and the decoder for all queries there can be.  What a level has no room for is
noticed afterwards, and the batch is detected again by `asag_deploy.loop.probing.detect`.
"""

from __future__ import annotations

import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from asag_deploy.backends.tensorrt.loop_graph import LoopGraph, Workspace
from asag_deploy.bundle.manifest import FIRST_LEVEL, Level, Probing
from asag_deploy.cuda import Cuda, Device, DeviceArray
from asag_deploy.cuda.graph import why_no_conditions
from asag_deploy.errors import BackendError, CaptureError, GpuMemoryError
from asag_deploy.kernels import LIBRARY_VARIABLE, KernelLibrary
from asag_deploy.loop.loop import Begun, HostLoop, Loop
from asag_deploy.loop.probing import FIRST_PATCHES, LevelRun, Probed, detect, patches_of, stage_name
from asag_deploy.loop.stages import Array, Counts, Stages
from asag_deploy.loop.stopping import Decisions, StopRule
from asag_deploy.processing.canvases import Canvas
from asag_deploy.timing import since

if TYPE_CHECKING:
    from asag_deploy.backends.tensorrt.stage import DeviceStage

MOST_GRAPHS = 64
"""Combinations of image shapes, stop rules and anchor caps that a graph is kept for.

A data set's pictures come in a few dozen shapes (COCO's, padded to 32, in some 36), each of which is to be
captured once.  A graph costs little: all of them share the memory that they work in.
"""

_Key = tuple[tuple[int, ...], np.dtype[np.generic], int, int | None, str, int]


def why_no_device_loop(cuda: Cuda, kernels: KernelLibrary | None) -> str | None:
    """Return what keeps the loop from the GPU, and what to do about it; None if nothing is known to."""
    if kernels is None:
        return (
            f"it takes the compiled kernels; build them as plugins/README.md says and set {LIBRARY_VARIABLE}"
        )
    return why_no_conditions(cuda)


class _NoRoomError(CaptureError, GpuMemoryError):
    """No room for a graph: the loop may go to the host, or without this one image to the next."""


class DeviceLoop(Loop):
    """`asag_deploy.loop.probing.detect` for the engines of one network; safe to call from several threads."""

    def __init__(
        self,
        stages: Mapping[str, DeviceStage],
        device: Device,
        kernels: KernelLibrary,
        on_canvas: Mapping[Canvas, Mapping[str, DeviceStage]] | None = None,
        *,
        keep_compiled: Callable[[], None] = lambda: None,
    ) -> None:
        """Run these stages on their device.

        on_canvas: stages that are engines for one image of exactly that shape, which are preferred.
        keep_compiled: called after each detection, for kernels that came with a new graph.
        """
        self._stages = stages
        self._on_canvas = dict(on_canvas or {})
        self._keep_compiled = keep_compiled
        self._device = device
        self._kernels = kernels
        self._graphs: OrderedDict[_Key, LoopGraph] = OrderedDict()
        self._workspace = Workspace(device)
        self.redone = 0
        """Batches that were detected again, since a level asked for more patches than there was room for."""

    def begin(
        self, network: Stages, probing: Probing, rule: StopRule, image: Array, image_size: NDArray[np.int64]
    ) -> Begun:
        """Put the launch on the stream, without waiting for the GPU.  A deadline is kept by the host's loop.

        So what comes after the network can be put on the stream before the host has read anything.  The
        decision is held against the host's, and a batch detected again, in `finish`, which must be called.
        `times_ms` has the one entry `loop`.

        Raises CaptureError if the graph cannot be captured; `finish` raises BackendError if GPU and host
        decide differently.
        """
        if rule.deadline is not None:
            return HostLoop().begin(network, probing, rule, image, image_size)
        start = time.perf_counter()
        with self._device.lock:
            graph = self._graph(probing, rule, image)
            results, fetch = graph.launch(image, image_size)
        prefix = "decoder/"
        outputs = {name.removeprefix(prefix): a for name, a in results.items() if name.startswith(prefix)}

        def finish() -> Probed:
            numbers = fetch()
            self._keep_compiled()
            probed = _read(probing, rule, graph, results, outputs, numbers)
            if probed is None:
                self.redone += 1
                return detect(network, probing, rule, image, image_size)
            probed.times_ms["loop"] = since(start)
            return probed

        return Begun(outputs, finish)

    def close(self) -> None:
        """Let go of every graph; the stream must have done its work."""
        for graph in self._graphs.values():
            graph.close()
        self._graphs.clear()
        self._workspace.close()

    def _graph(self, probing: Probing, rule: StopRule, image: DeviceArray) -> LoopGraph:
        stop = (rule.min_selected, rule.max_patches, rule.max_level)
        key = (image.shape, image.dtype, *stop, probing.anchor_cap)
        graph = self._graphs.get(key)
        if graph is None:
            if len(self._graphs) >= MOST_GRAPHS:
                self._device.synchronize()  # it may still be running
                self._graphs.popitem(last=False)[1].close()
            graph = self._graphs[key] = self._captured(probing, rule, image)
        self._graphs.move_to_end(key)
        return graph

    def _captured(self, probing: Probing, rule: StopRule, image: DeviceArray) -> LoopGraph:
        """Capture a new graph; where there is no room, the engines of canvases go, once and for all."""
        batch, _, height, width = image.shape
        common = (self._device, self._kernels, self._workspace)
        while True:
            fixed = self._on_canvas.get(Canvas(height, width)) if batch == 1 else None
            stages = self._stages if fixed is None else fixed
            try:
                return LoopGraph(stages, *common, probing, rule, image, fixed=fixed is not None)
            except BackendError as error:
                full = isinstance(error, GpuMemoryError)
                if not full or not self._on_canvas:
                    if not self._graphs:  # nobody works in it
                        self._workspace.close()
                    kind = _NoRoomError if full else CaptureError
                    raise kind(
                        f"the loop could not be captured in a graph ({error}); use loop 'host'"
                    ) from error
                reason = str(error)
            self._leave_canvases(reason)

    def _leave_canvases(self, reason: str) -> None:
        """Let go of the engines of canvases; those that take every shape do their work from now on."""
        self._device.synchronize()  # they may still be running
        for key in [key for key, graph in self._graphs.items() if graph.fixed]:
            self._graphs.pop(key).close()
        left = ", ".join(str(canvas) for canvas in self._on_canvas)
        for stages in self._on_canvas.values():
            for stage in stages.values():
                stage.close()
        self._on_canvas.clear()
        message = f"pictures on the canvas {left} go through the engines that take every shape: {reason}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)


def _read(
    probing: Probing,
    rule: StopRule,
    graph: LoopGraph,
    results: Mapping[str, DeviceArray],
    outputs: dict[str, DeviceArray],
    numbers: Sequence[NDArray[np.generic]],
) -> Probed | None:
    """Return what `detect` would have returned; None if a level had no room for all its patches.

    Raises BackendError if the GPU has decided otherwise than the host does.
    """
    went_on, *by_level = numbers
    stages = ("backbone", *(stage_name(level) for level in graph.levels))
    counts = [Counts(*of_level.astype(np.int64).T) for of_level in by_level]
    origins = [None, *(results[f"{stage}/origins"] for stage in stages[1:]), None]
    decisions = Decisions(len(went_on))

    def run(number: int, level: Level, patches: tuple[NDArray[np.int64], NDArray[np.int64]]) -> LevelRun:
        prefix, looked = f"{stages[number]}/", (origins[number], origins[number + 1])
        of_stage = {name.removeprefix(prefix): a for name, a in results.items() if name.startswith(prefix)}
        return LevelRun.of(level, patches, looked, counts[number], of_stage)

    zeros = np.zeros_like(counts[0].selected)
    levels = [run(0, FIRST_LEVEL, (zeros + FIRST_PATCHES, zeros))]
    for i, level in enumerate(probing.levels):
        running = decisions.who_goes_on(rule, level.level, levels[-1].counts)
        if not running.any() or i == len(graph.levels):
            break
        patches = patches_of(probing, rule, level, levels[-1].counts, running)
        if patches[0].max() > graph.slots[i]:
            return None
        levels.append(run(i + 1, level.level, patches))
    probed = decisions.probed(len(probing.levels))
    if not np.array_equal(probed, went_on):
        raise BackendError(
            "the loop on the device has probed other levels than the host would have; "
            "load the detector with loop='host', and report this"
        )
    return Probed(outputs=outputs, levels=levels, probed=probed, stop=decisions.reasons(levels[-1].level))
