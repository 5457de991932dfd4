"""The probing loop on the GPU: a whole detection is the launch of one graph, which decides by itself.

    backbone -> decide -> if any image goes on: probe P4 -> decide -> if any: probe P3
             -> decoder

The host reads nothing in between.  What it needs for traces, the counts of each level, it reads with the
results, and it holds the GPU's decisions against its own, `asag_deploy.probing.Decisions`.

A graph has fixed shapes.  So a level has room for a fixed number of patches an image, and the decoder for all
queries there can be.  What a level has no room for is noticed afterwards, and the batch is detected again by
`asag_deploy.probing.detect`.
"""

from __future__ import annotations

import contextlib
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from asag_deploy.backends.loop_memory import Arena, buffer
from asag_deploy.cuda import Cuda, Device, DeviceArray
from asag_deploy.cuda.conditional import if_set, new_condition, why_no_conditions
from asag_deploy.errors import BackendError, CaptureError
from asag_deploy.kernels import LIBRARY_VARIABLE, KernelLibrary, decide
from asag_deploy.manifest import FIRST_LEVEL, Level, ProbeLevel, Probing
from asag_deploy.probing import (
    FEATURES,
    Counts,
    Decisions,
    LevelRun,
    Probed,
    StopRule,
    detect,
    patch_limit,
    patches_of,
    round_up,
)
from asag_deploy.stages import Array, Network

if TYPE_CHECKING:
    from asag_deploy.backends.tensorrt_stage import EngineStage, StageContext

MOST_GRAPHS = 8
"""Combinations of image shapes and stop rules that a graph is kept for."""
MOST_SLOTS = 32
"""Patches an image and level that a graph has room for; rare images that need more are detected twice."""
PATCH_BUCKET = 16

_Key = tuple[tuple[int, ...], np.dtype[np.generic], int, int | None, str]


def why_no_device_loop(cuda: Cuda, kernels: KernelLibrary | None) -> str | None:
    """What keeps the loop from running on the GPU, and what to do about it; None if nothing is known to."""
    if kernels is None:
        return (
            f"it takes the compiled kernels; build them as plugins/README.md says and set {LIBRARY_VARIABLE}"
        )
    return why_no_conditions(cuda)


class DeviceLoop:
    """`asag_deploy.probing.detect` for the engines of one network; safe to call from several threads."""

    def __init__(self, stages: Mapping[str, EngineStage], device: Device, kernels: KernelLibrary) -> None:
        self._stages = stages
        self._device = device
        self._kernels = kernels
        self._graphs: OrderedDict[_Key, _LoopGraph] = OrderedDict()
        self.redone = 0
        """Batches that were detected again, since a level asked for more patches than there was room for."""

    def __call__(
        self, network: Network, probing: Probing, rule: StopRule, image: Array, image_size: NDArray[np.int64]
    ) -> Probed:
        """As `detect`, without its deadline; `times_ms` has the one entry `loop`.

        Raises CaptureError if the graph cannot be captured, BackendError if GPU and host decide differently.
        """
        if rule.deadline is not None:
            return detect(network, probing, rule, image, image_size)
        start = time.perf_counter()
        with self._device.lock:
            graph = self._graph(probing, rule, image)
            results, fetch = graph.launch(image, image_size)
        probed = _read(probing, rule, graph.levels, graph.slots, results, fetch())
        if probed is None:
            self.redone += 1
            return detect(network, probing, rule, image, image_size)
        probed.times_ms["loop"] = (time.perf_counter() - start) * 1000
        return probed

    def close(self) -> None:
        """Let go of every graph; the stream must have done its work."""
        for graph in self._graphs.values():
            graph.close()
        self._graphs.clear()

    def _graph(self, probing: Probing, rule: StopRule, image: DeviceArray) -> _LoopGraph:
        key = (image.shape, image.dtype, rule.min_selected, rule.max_patches, rule.max_level)
        graph = self._graphs.get(key)
        if graph is None:
            if len(self._graphs) >= MOST_GRAPHS:
                self._device.synchronize()  # it may still be running
                self._graphs.popitem(last=False)[1].close()
            try:
                graph = _LoopGraph(self._stages, self._device, self._kernels, probing, rule, image)
            except BackendError as error:
                raise CaptureError(
                    f"the loop could not be captured in a graph ({error}); use loop 'host'"
                ) from error
            self._graphs[key] = graph
        self._graphs.move_to_end(key)
        return graph


class _Call(NamedTuple):
    """A stage at its addresses."""

    context: StageContext
    addresses: tuple[int, ...]


class _LoopGraph:
    """The loop captured for one shape of images and one rule.  Everything happens under the device's lock."""

    def __init__(
        self,
        stages: Mapping[str, EngineStage],
        device: Device,
        kernels: KernelLibrary,
        probing: Probing,
        rule: StopRule,
        image: DeviceArray,
    ) -> None:
        self.levels = tuple(level for level in probing.levels if rule.allows(level.level))
        """The levels that the graph can probe."""
        self.slots = tuple(
            round_up(min(patch_limit(rule, level), MOST_SLOTS), PATCH_BUCKET, level.capacity)
            for level in self.levels
        )
        """Patches an image that each has room for."""
        self._stages, self._device, self._kernels, self._rule = stages, device, kernels, rule
        self._calls: dict[str, _Call] = {}
        self._graph: int | None = None
        self._inner: list[int] = []
        batch = image.shape[0]
        self._image = device.empty(image.shape, image.dtype)
        self._size = device.empty((batch, 2), np.dtype(np.int64))
        self._fixed: dict[str, DeviceArray] = {}
        self._arena = Arena(device)
        try:
            self._plan(probing, batch)
            self._warm_up(image)
            self._graph = self._capture()
        except BaseException:
            with contextlib.suppress(BackendError):
                device.synchronize()
            self.close()
            raise

    def launch(
        self, image: DeviceArray, image_size: NDArray[np.int64]
    ) -> tuple[dict[str, DeviceArray], Callable[[], list[NDArray[np.generic]]]]:
        """Begin a detection.  Its results, in memory of their own, and what waits for the numbers among them.

        Those are `probed`, then the counts of the first level and of each that the graph can probe.
        """
        cuda, stream = self._device.cuda, self._device.stream
        if self._graph is None:
            raise BackendError("the graph of the loop has been closed; load the detector again")
        self._take(image, self._device.upload(image_size))
        cuda.launch(self._graph, stream)
        results = self._arena.copy()
        names = [f"{name}/counts" for name in ("backbone", *map(_stage_name, self.levels))]
        return results, self._device.begin_download([results[name] for name in ("probed", *names)])

    def close(self) -> None:
        """Let go of the graph, its contexts and its memory; the stream must have done its work."""
        if self._graph is not None:
            self._device.cuda.destroy_graph(self._graph)
            self._graph = None
        for call in self._calls.values():
            call.context.close()
        for stream in self._inner:
            self._device.cuda.destroy_stream(stream)
        self._calls.clear()
        self._inner.clear()
        self._fixed.clear()

    def _take(self, image: DeviceArray, size: DeviceArray) -> None:
        for target, source in ((self._image, image), (self._size, size)):
            self._device.cuda.copy(
                target.pointer, source.pointer, source.nbytes, "on_device", self._device.stream
            )

    def _plan(self, probing: Probing, batch: int) -> None:
        """A context for every stage, and memory for everything, which cannot be taken while capturing."""
        arena = self._arena
        arena.add("probed", (batch, len(probing.levels)), np.bool_)
        arena.add("any", (1,), np.int32)
        opened = {"backbone": self._open("backbone", {"image": self._image, "image_size": self._size})}
        features = {name: self._fixed[f"backbone/{name}"] for name in FEATURES}
        before = "backbone"
        for level, slots in zip(self.levels, self.slots, strict=True):
            name = _stage_name(level)
            arena.add(f"{name}/patch_count", (batch,), np.int64)
            inputs = {
                "feature": features[level.level.lower()],
                "image_size": self._size,
                "patches": arena.blank(f"{before}/origins"),
                "patch_count": arena.blank(f"{name}/patch_count"),
                "slots": self._numbers(slots),
            }
            opened[name] = self._open(name, inputs)
            before = name
        anchors = self._decoder_anchors(probing, batch)
        rest = {"image_size": self._size, "query_slots": self._numbers(probing.anchor_cap)}
        opened["decoder"] = self._open("decoder", {**features, **anchors, **rest})
        arena.allocate()
        for name, (context, inputs) in opened.items():
            stage = self._stages[name]
            arrays = [inputs[tensor.name] for tensor in stage.inputs]
            outputs = [self._output(name, tensor.name) for tensor in stage.outputs]
            placed = [*(arena.placed(array) for array in arrays), *outputs]
            self._calls[name] = _Call(context, tuple(array.pointer for array in placed))

    def _open(self, name: str, inputs: dict[str, DeviceArray]) -> tuple[StageContext, dict[str, DeviceArray]]:
        """A context, and room for its outputs: features where they stay, all else where results are."""
        stage = self._stages[name]
        context = stage.open_context(inputs)
        # Known from now on, so that it is closed whatever goes wrong.
        self._calls[name] = _Call(context, ())
        for tensor, shape in zip(stage.outputs, context.output_shapes, strict=True):
            if name == "backbone" and tensor.name in FEATURES:
                self._fixed[f"{name}/{tensor.name}"] = self._device.empty(shape, tensor.dtype)
            else:
                self._arena.add(f"{name}/{tensor.name}", shape, tensor.dtype.type)
        return context, inputs

    def _output(self, stage: str, tensor: str) -> DeviceArray:
        name = f"{stage}/{tensor}"
        return self._fixed[name] if name in self._fixed else self._arena[name]

    def _numbers(self, count: int) -> DeviceArray:
        name = f"0..{count}"
        self._fixed[name] = self._device.upload(np.arange(count, dtype=np.int64))
        return self._fixed[name]

    def _decoder_anchors(self, probing: Probing, batch: int) -> dict[str, DeviceArray]:
        """A level that is not run has its anchors cleared, and one beyond `max_level` a patch of zeros."""
        inputs = {"probed": self._arena.blank("probed")}
        names = ["backbone", *map(_stage_name, probing.levels)]
        run = [True, *(level in self.levels for level in probing.levels)]
        for i, name in enumerate(names):
            level = FIRST_LEVEL if i == 0 else probing.levels[i - 1].level
            for part, kind in (("anchors", np.float32), ("selected", np.bool_)):
                here = f"{name}/{part}"
                if run[i] and here in self._arena:
                    inputs[f"{part}_{level.lower()}"] = self._arena.blank(here)
                elif not run[i]:
                    shape = (batch, probing.levels[i - 1].anchors_per_patch)
                    zeros = np.zeros((*shape, 5) if part == "anchors" else shape, dtype=kind)
                    self._fixed[here] = inputs[f"{part}_{level.lower()}"] = self._device.upload(zeros)
        return inputs

    def _warm_up(self, image: DeviceArray) -> None:
        """Run every stage once as it is, on nothing: TensorRT refuses to be captured before it has run."""
        self._take(image, self._device.upload(np.full((image.shape[0], 2), image.shape[2:], np.int64)))
        self._arena.clear(self._device.stream)
        for call in self._calls.values():
            call.context.enqueue(call.addresses)
        self._inner = [self._device.cuda.create_stream() for _ in self.levels]
        self._device.synchronize()

    def _capture(self) -> int:
        cuda, stream = self._device.cuda, self._device.stream
        cuda.begin_capture(stream)
        try:
            self._arena.clear(stream)
            self._run("backbone", stream)
            self._probe(0, "backbone", stream)
            self._run("decoder", stream)
        except BaseException:
            with contextlib.suppress(BackendError):
                cuda.abandon_capture(stream)
            raise
        return cuda.end_capture(stream)

    def _probe(self, number: int, before: str, stream: int) -> None:
        """Decide, and in the body of a conditional node probe the level, and after it the next one."""
        if number == len(self.levels):
            return
        level, inner = self.levels[number], self._inner[number]
        name, cuda = _stage_name(level), self._device.cuda
        condition = new_condition(cuda, stream)
        decide(
            self._kernels,
            buffer(self._arena[f"{before}/counts"]),
            buffer(self._arena["probed"]),
            buffer(self._arena[f"{name}/patch_count"]),
            buffer(self._arena["any"]),
            level=number,
            min_selected=self._rule.min_selected,
            max_patches=patch_limit(self._rule, level),
            condition=condition,
            stream=stream,
        )
        with if_set(cuda, stream, condition, inner):
            self._run(name, inner)
            self._probe(number + 1, name, inner)

    def _run(self, name: str, stream: int) -> None:
        call = self._calls[name]
        call.context.enqueue(call.addresses, stream)


def _read(
    probing: Probing,
    rule: StopRule,
    possible: Sequence[ProbeLevel],
    slots: Sequence[int],
    results: Mapping[str, DeviceArray],
    numbers: Sequence[NDArray[np.generic]],
) -> Probed | None:
    """What `detect` would have returned; None if a level had no room for all its patches.

    Raises BackendError if the GPU has decided otherwise than the host does.
    """
    went_on, *by_level = numbers
    counts = [Counts(*of_level.astype(np.int64).T) for of_level in by_level]
    decisions = Decisions(len(went_on))
    zeros = np.zeros_like(counts[0].selected)
    levels = [_run_of("backbone", FIRST_LEVEL, zeros + 5, zeros, None, counts[0], results)]
    for i, level in enumerate(probing.levels):
        running = decisions.who_goes_on(rule, level.level, levels[-1].counts)
        if not running.any() or i == len(possible):
            break
        patches, dropped = patches_of(probing, rule, level, levels[-1].counts, running)
        if patches.max() > slots[i]:
            return None
        origins = levels[-1].next_origins
        levels.append(
            _run_of(_stage_name(level), level.level, patches, dropped, origins, counts[i + 1], results)
        )
    probed = decisions.probed(len(probing.levels))
    if not np.array_equal(probed, went_on):
        raise BackendError(
            "the loop on the device has probed other levels than the host would have; "
            "load the detector with loop='host', and report this"
        )
    prefix = "decoder/"
    outputs = {name.removeprefix(prefix): a for name, a in results.items() if name.startswith(prefix)}
    return Probed(outputs=outputs, levels=levels, probed=probed, stop=decisions.reasons(levels[-1].level))


def _run_of(
    stage: str,
    level: Level,
    patches: NDArray[np.int64],
    dropped: NDArray[np.int64],
    origins: DeviceArray | None,
    counts: Counts,
    results: Mapping[str, DeviceArray],
) -> LevelRun:
    return LevelRun(
        level=level,
        patches=patches,
        patches_dropped=dropped,
        origins=origins,
        anchors=results[f"{stage}/anchors"],
        selected=results.get(f"{stage}/selected"),
        next_origins=results.get(f"{stage}/origins"),
        counts=counts,
    )


def _stage_name(level: ProbeLevel) -> str:
    return f"probe_{level.level.lower()}"
