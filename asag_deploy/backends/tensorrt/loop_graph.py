"""One CUDA graph that is a whole detection, for one shape of images and one stop rule.

    clear -> backbone, select -> decide -> [if set: probe P4, select -> decide -> [if set: probe P3]]
          -> decoder

What stands between two arrows was captured alone, on a stream of its own, and is a child graph here; `decide`
is a kernel node, and what is in brackets the body of a conditional node.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from asag_deploy.bundle.manifest import FIRST_LEVEL, ProbeLevel, Probing
from asag_deploy.cuda import Device, DeviceArray
from asag_deploy.cuda.arena import BYTE, Arena
from asag_deploy.cuda.graph import Chain, new_graph
from asag_deploy.engines.shapes import MOST_SLOTS, PATCH_BUCKET, fixed_slots
from asag_deploy.errors import BackendError
from asag_deploy.kernels import KernelLibrary, add_decide, decide, patch_nms
from asag_deploy.loop.probing import patch_limit, round_up, stage_name
from asag_deploy.loop.stages import FEATURES, LevelOutputs, features_among
from asag_deploy.loop.stopping import StopRule

if TYPE_CHECKING:
    from asag_deploy.backends.tensorrt.stage import DeviceStage, StageContext


class Workspace:
    """Memory that all graphs of a loop work in, since they run one after the other on one stream.

    A graph keeps the addresses that it was captured with, and so the memory of when it was made.  As each
    new piece is half as large again as the one before, all of them together stay within three times the
    largest.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._whole: DeviceArray | None = None

    def take(self, size: int) -> DeviceArray:
        """Return at least `size` bytes."""
        if self._whole is None or self._whole.nbytes < size:
            before = 0 if self._whole is None else self._whole.nbytes
            self._whole = self._device.empty((max(size, before + before // 2),), BYTE)
        return self._whole

    def close(self) -> None:
        """Let go of the memory; graphs that work in it keep it."""
        self._whole = None


class _Call(NamedTuple):
    """A stage at its addresses."""

    context: StageContext
    addresses: tuple[int, ...]


class LoopGraph:
    """The loop as a graph.  Everything happens under the device's lock.

    `results` are cleared before each run and copied after it; all else is only worked in.
    """

    def __init__(
        self,
        stages: Mapping[str, DeviceStage],
        device: Device,
        kernels: KernelLibrary,
        workspace: Workspace,
        probing: Probing,
        rule: StopRule,
        image: DeviceArray,
        *,
        fixed: bool,
    ) -> None:
        """Build the graph for images of the shape and type of `image`.

        fixed: whether the stages are engines of one shape, which have room for `fixed_slots` patches on
        every level, whatever the rule.

        Raises BackendError if a stage cannot be captured, or holds what a graph that decides cannot.
        """
        self.levels = tuple(level for level in probing.levels if rule.allows(level.level))
        """The levels that the graph can probe."""
        self.slots = tuple(
            fixed_slots(level)
            if fixed
            else round_up(min(patch_limit(rule, level), MOST_SLOTS), PATCH_BUCKET, level.capacity)
            for level in self.levels
        )
        """Patches an image that each has room for; rare images that need more are detected twice."""
        self.results = Arena(device)
        self.fixed = fixed
        """Whether its stages are engines of one shape."""
        self._stages, self._device, self._kernels = stages, device, kernels
        self._probing, self._rule = probing, rule
        self._within = Arena(device)
        self._constants: dict[str, DeviceArray] = {}
        self._calls: dict[str, _Call] = {}
        self._graph: int | None = None
        try:
            self._plan(workspace, image)
            self._warm_up(image)
            self._check()
            self._graph = self._build()
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
        if self._graph is None:
            raise BackendError("the graph of the loop has been closed; load the detector again")
        self._take(image, self._device.upload(image_size))
        self._device.cuda.launch(self._graph, self._device.stream)
        results = self.results.copy()
        names = [f"{name}/counts" for name in ("backbone", *map(stage_name, self.levels))]
        return results, self._device.begin_download([results[name] for name in ("probed", *names)])

    def close(self) -> None:
        """Let go of the graph, its contexts and its memory; the stream must have done its work."""
        if self._graph is not None:
            self._device.cuda.destroy_launchable(self._graph)
            self._graph = None
        for call in self._calls.values():
            call.context.close()
        self._calls.clear()
        self._constants.clear()

    def _take(self, image: DeviceArray, size: DeviceArray) -> None:
        for name, source in (("image", image), ("image_size", size)):
            target = self._within[name].pointer
            self._device.cuda.copy(target, source.pointer, source.nbytes, "on_device", self._device.stream)

    def _plan(self, workspace: Workspace, image: DeviceArray) -> None:
        """Open a context for every stage and take all memory, which cannot be taken while capturing."""
        results, within, batch = self.results, self._within, image.shape[0]
        within.add("image", image.shape, image.dtype)
        within.add("image_size", (batch, 2), np.int64)
        results.add("probed", (batch, len(self._probing.levels)), np.bool_)
        results.add("any", (1,), np.int32)
        size = within.blank("image_size")
        given = {"backbone": {"image": within.blank("image"), "image_size": size}}
        self._open("backbone", given["backbone"])
        given_by_backbone = (tensor.name for tensor in self._stages["backbone"].outputs)
        features = {name: within.blank(f"backbone/{name}") for name in features_among(given_by_backbone)}
        for level, slots in zip(self.levels, self.slots, strict=True):
            name, feature = stage_name(level), features[level.level.lower()]
            results.add(f"{name}/patch_count", (batch,), np.int64)
            results.add(f"{name}/origins", (batch, level.capacity, 2), np.int64)
            given[name] = {
                "feature": feature,
                "feature_size": self._constant(np.array(feature.shape[1:3], dtype=np.int64)),
                "image_size": size,
                "patches": results.blank(f"{name}/origins"),
                "patch_count": results.blank(f"{name}/patch_count"),
                "slots": self._constant(np.arange(slots, dtype=np.int64)),
            }
            self._open(name, given[name])
        queries = self._constant(np.arange(self._probing.anchor_cap, dtype=np.int64))
        given["decoder"] = {
            **features,
            **self._decoder_anchors(batch),
            "image_size": size,
            "query_slots": queries,
        }
        self._open("decoder", given["decoder"])
        memory = workspace.take(results.size + within.size)
        results.place(memory, 0)
        within.place(memory, results.size)
        for name, inputs in given.items():
            self._place(name, inputs)

    def _open(self, name: str, inputs: Mapping[str, DeviceArray]) -> None:
        """Open a stage's context, and plan room for its outputs."""
        stage = self._stages[name]
        context = stage.open_context(inputs)
        # Known from now on, so that it is closed whatever goes wrong.
        self._calls[name] = _Call(context, ())
        for tensor, shape in zip(stage.outputs, context.output_shapes, strict=True):
            self._room(name, tensor.name).add(f"{name}/{tensor.name}", shape, tensor.dtype)

    def _place(self, name: str, inputs: Mapping[str, DeviceArray]) -> None:
        stage = self._stages[name]
        arrays = [self.results.placed(self._within.placed(inputs[tensor.name])) for tensor in stage.inputs]
        outputs = [self._room(name, tensor.name)[f"{name}/{tensor.name}"] for tensor in stage.outputs]
        addresses = tuple(array.pointer for array in (*arrays, *outputs))
        self._calls[name] = _Call(self._calls[name].context, addresses)

    def _room(self, stage: str, output: str) -> Arena:
        """Choose where an output lies: features are needed while the graph runs, all else is a result."""
        return self._within if stage == "backbone" and output in FEATURES else self.results

    def _constant(self, values: NDArray[np.generic]) -> DeviceArray:
        made = self._device.upload(values)
        self._constants[str(len(self._constants))] = made
        return made

    def _decoder_anchors(self, batch: int) -> dict[str, DeviceArray]:
        """Return the anchor inputs of the decoder.

        A level that is not run has its anchors cleared; one beyond `max_level` has zeros.
        """
        inputs = {"probed": self.results.blank("probed")}
        levels = [(FIRST_LEVEL, "backbone"), *((level.level, stage_name(level)) for level in self.levels)]
        for level, name in levels:
            for part in ("anchors", "selected"):
                if f"{name}/{part}" in self.results:
                    inputs[f"{part}_{level.lower()}"] = self.results.blank(f"{name}/{part}")
        for beyond in self._probing.levels[len(self.levels) :]:
            patches, name = fixed_slots(beyond) if self.fixed else 1, beyond.level.lower()
            shape = (batch, patches * beyond.anchors_per_patch)
            inputs[f"anchors_{name}"] = self._constant(np.zeros((*shape, 5), dtype=np.float32))
            inputs[f"selected_{name}"] = self._constant(np.zeros(shape, dtype=np.bool_))
        return inputs

    def _warm_up(self, image: DeviceArray) -> None:
        """Run everything once as it is: TensorRT refuses to be captured before, and kernels are loaded."""
        sizes = np.full((image.shape[0], 2), image.shape[2:], dtype=np.int64)
        stream, whole = self._device.stream, self.results.whole
        self._take(image, self._device.upload(sizes))
        self._device.cuda.clear(whole.pointer, whole.nbytes, stream)
        self._run("backbone", 0, stream)
        for number, level in enumerate(self.levels):
            decide(self._kernels, *self._decision(number), **self._settings(number), stream=stream)
            self._run(stage_name(level), number + 1, stream)
        self._run("decoder", None, stream)
        self._device.synchronize()

    def _check(self) -> None:
        """Raise BackendError if a stage is known not to be capturable."""
        for call in self._calls.values():
            problem = call.context.why_not_capturable(self._device.capture_stream)
            if problem is not None:
                raise BackendError(problem)

    def _build(self) -> int:
        """Build the graph, ready to be launched."""
        with new_graph(self._device.cuda) as root:
            whole = self.results.whole
            root.add_clear(whole.pointer, whole.nbytes)
            self._add(root, "backbone", 0)
            self._add_probe(root, 0)
            self._add(root, "decoder", None)
            return root.instantiate()

    def _add_probe(self, chain: Chain, number: int) -> None:
        """Decide, and in the body of a conditional node probe the level, and after it the next one."""
        if number == len(self.levels):
            return
        condition = chain.new_condition()
        chain.add_kernel(
            lambda graph, before: add_decide(
                self._kernels,
                *self._decision(number),
                **self._settings(number),
                graph=graph,
                dependencies=before,
                condition=condition,
            )
        )
        body = chain.add_if(condition)
        self._add(body, stage_name(self.levels[number]), number + 1)
        self._add_probe(body, number + 1)

    def _add(self, chain: Chain, name: str, following: int | None) -> None:
        """Capture a stage, together with the search for the next level's patches, and add it."""
        part = self._device.capture(lambda stream: self._run(name, following, stream))
        try:
            chain.add_part(part, name)
        finally:
            self._device.cuda.destroy_graph(part)

    def _run(self, name: str, following: int | None, stream: int) -> None:
        call = self._calls[name]
        call.context.enqueue(call.addresses, stream)
        if following is not None and following < len(self.levels):
            self._select(name, self.levels[following], stream)

    def _select(self, name: str, level: ProbeLevel, stream: int) -> None:
        before = LevelOutputs(*(self.results[f"{name}/{output}"] for output in LevelOutputs._fields))
        image_size, origins = self._within["image_size"], self.results[f"{stage_name(level)}/origins"]
        find_patches(self._kernels, self._probing, level, before, image_size, origins, stream)

    def _decision(self, number: int) -> tuple[object, ...]:
        """Return the arrays of `decide` for the level of that number."""
        before = "backbone" if number == 0 else stage_name(self.levels[number - 1])
        names = (f"{before}/counts", "probed", f"{stage_name(self.levels[number])}/patch_count", "any")
        return tuple(self.results[name].buffer() for name in names)

    def _settings(self, number: int) -> dict[str, int]:
        return {
            "level": number,
            "min_selected": self._rule.min_selected,
            "max_patches": patch_limit(self._rule, self.levels[number]),
        }


def find_patches(
    kernels: KernelLibrary,
    probing: Probing,
    level: ProbeLevel,
    before: LevelOutputs,
    image_size: DeviceArray,
    origins: DeviceArray,
    stream: int,
) -> None:
    """Put patch NMS for `level` on the stream: it writes `origins`, and the column `patches` of the counts.

    The arrays are those of `Network.select`.  Raises BackendError if it cannot be launched.
    """
    patch_nms(
        kernels,
        *(array.buffer() for array in (before.anchors, before.selected, image_size, origins, before.counts)),
        stride=level.stride,
        patch_size=probing.patch_size,
        iou_threshold=probing.patch_nms_iou,
        max_candidates=probing.max_candidates,
        stream=stream,
    )
