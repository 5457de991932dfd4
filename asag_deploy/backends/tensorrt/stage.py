"""One TensorRT engine as a stage of the network.

Every combination of input shapes has an execution context of its own, so that none has to be told its shapes
twice, and whatever was captured from it stays true.  All contexts compute in the same scratch memory, since
one stream runs them one after the other.

A context first runs as it is.  When it is called again with all arrays at the same addresses, as happens as
soon as the loop repeats itself, it is captured in a CUDA graph, and from then on that is replayed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from asag_deploy.backends.declared import UNKNOWN
from asag_deploy.backends.network import check_inputs
from asag_deploy.bundle.manifest import TensorSpec
from asag_deploy.cuda import Device, DeviceArray
from asag_deploy.cuda.captures import captures
from asag_deploy.cuda.graph import why_not_a_part
from asag_deploy.engines.adapter import Library
from asag_deploy.engines.inspector import Layers, layers_of
from asag_deploy.engines.sidecar import Engine
from asag_deploy.errors import BackendError, EngineStaleError, EngineUnfitError, GpuMemoryError
from asag_deploy.loop.stages import Array

MOST_CONTEXTS = 64
"""Combinations of input shapes a stage is ready for; beyond, the one used longest ago goes.

A data set's pictures come in a few dozen shapes, and TensorRT-RTX compiles kernels for a new one.  A context
takes little memory, as all of them compute in the same scratch.
"""
MOST_GRAPHS = 4
"""Captured graphs for each of them, which differ in addresses."""

Shapes = tuple[tuple[int, ...], ...]
Addresses = tuple[int, ...]
MakeContext = Callable[[], Any]

_TYPES: dict[str, np.dtype[Any]] = {
    "FLOAT": np.dtype(np.float32),
    "HALF": np.dtype(np.float16),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
}


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """An input or output of an engine."""

    name: str
    dtype: np.dtype[Any]


class DeviceStage(ABC):
    """A stage on a GPU whose runs can be captured: an engine, or what stands in for one.

    It is used by calling it, or under the device's lock.
    """

    def __init__(
        self, name: str, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...], device: Device
    ) -> None:
        self.name, self.inputs, self.outputs = name, inputs, outputs
        self._device = device
        self._contexts: OrderedDict[Shapes, StageContext] = OrderedDict()

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the stage on those of `inputs` that it declares; the outputs stay on the GPU.

        Raises BackendError for an input that is missing or of another type or if the library fails,
        EngineUnfitError for shapes that the engine was not built for.
        """
        arrays = self._arrays(inputs)
        with self._device.lock:
            shapes = tuple(array.shape for array in arrays)
            context = self._context(shapes)
            results = {
                tensor.name: self._device.empty(shape, tensor.dtype)
                for tensor, shape in zip(self.outputs, context.output_shapes, strict=True)
            }
            self._run(context, shapes, tuple(array.pointer for array in (*arrays, *results.values())))
        return results

    def open_context(self, inputs: Mapping[str, Array]) -> StageContext:
        """Open a context of the caller's own for inputs of these shapes; used under the device's lock.

        Raises what calling the stage does.
        """
        shapes = tuple(array.shape for array in self._arrays(inputs))
        self._check(shapes)
        return self._new_context(shapes)

    def close(self) -> None:
        """Let go of everything; the stream must have done its work."""
        for context in self._contexts.values():
            context.close()
        self._contexts.clear()

    def layers(self) -> Layers | None:
        """Return what the stage was built of; None if it does not say."""
        return None

    @abstractmethod
    def _new_context(self, shapes: Shapes) -> StageContext:
        """Make a context for inputs of these shapes."""

    def _check(self, shapes: Shapes) -> None:  # noqa: B027  (the default: it takes all shapes)
        """Raise EngineUnfitError for inputs of shapes that the stage does not take."""

    def _run(self, context: StageContext, shapes: Shapes, addresses: Addresses) -> None:
        """Run a context that was made for these shapes."""
        context.run(addresses)

    def _arrays(self, inputs: Mapping[str, Array]) -> list[DeviceArray]:
        """Return the inputs that the stage declares, in their order."""
        check_inputs(self.name, [tensor.name for tensor in self.inputs], inputs)
        arrays: list[DeviceArray] = [inputs[tensor.name] for tensor in self.inputs]
        for tensor, array in zip(self.inputs, arrays, strict=True):
            if array.dtype != tensor.dtype:
                raise BackendError(
                    f"the graph '{self.name}' takes '{tensor.name}' as {tensor.dtype}, got {array.dtype}; "
                    "convert it first"
                )
        return arrays

    def _context(self, shapes: Shapes) -> StageContext:
        context = self._contexts.get(shapes)
        if context is None:
            self._check(shapes)
            if len(self._contexts) >= MOST_CONTEXTS:
                self._device.synchronize()  # it may still be running
                _, oldest = self._contexts.popitem(last=False)
                oldest.close()
            context = self._contexts[shapes] = self._new_context(shapes)
        self._contexts.move_to_end(shapes)
        return context


class EngineStage(DeviceStage):
    """An engine that has been deserialised.

    `make_context` creates an execution context without memory of its own.
    """

    def __init__(
        self,
        engine: Engine,
        loaded: Any,
        device: Device,
        *,
        make_context: MakeContext,
        library: Library,
    ) -> None:
        super().__init__(engine.sidecar.recipe.stage, *_tensors(loaded, engine), device)
        self._engine = engine
        self._loaded = loaded
        self._make_context = make_context
        self._library = library
        device.expect_scratch(_most_scratch(loaded))

    def layers(self) -> Layers | None:
        """Return what the engine was built of; None if it does not say."""
        return layers_of(self._library.module, self._loaded)

    def close(self) -> None:
        """Let go of the engine; the stream must have done its work."""
        super().close()
        loaded, self._loaded = (self._loaded, self._make_context), None
        self._make_context = _closed
        captures.when_over(lambda: loaded)  # destroying it frees memory, which a capture forbids

    def _check(self, shapes: Shapes) -> None:
        """Raise EngineUnfitError for inputs of shapes that the engine was not built for."""
        names = (tensor.name for tensor in self.inputs)
        self._engine.sidecar.check_shapes(dict(zip(names, shapes, strict=True)))

    def _new_context(self, shapes: Shapes) -> StageContext:
        capturable = self._engine.sidecar.capturable
        self._library.messages.clear()  # so that what is said from now on is about this one
        return StageContext(
            self._make_context(),
            self.inputs,
            self.outputs,
            shapes,
            self._device,
            self._failed,
            why_not_capturable=None if capturable else self._asks_the_host(),
        )

    def _asks_the_host(self) -> str:
        return (
            f"the engine of the graph '{self.name}' waits for decisions of the host, so that it cannot be "
            "captured; export the bundle with this release and build its engines again with `asag-build`"
        )

    def _failed(self, what: str) -> BackendError:
        messages = self._library.messages
        kind = BackendError if messages.no_room is None else GpuMemoryError
        return kind(
            f"{self._library.title} failed in the graph '{self.name}': it {what} "
            f"({messages.no_room or messages.first_error})"
        )


class StageContext:
    """An execution context for one combination of input shapes, and what was captured of it."""

    output_shapes: Shapes
    """In the order of the stage's outputs."""

    def __init__(
        self,
        context: Any,
        inputs: tuple[Tensor, ...],
        outputs: tuple[Tensor, ...],
        shapes: Shapes,
        device: Device,
        failed: Callable[[str], BackendError],
        *,
        why_not_capturable: str | None = None,
    ) -> None:
        if context is None:
            raise failed("could not create an execution context")
        self._context = context
        self._names = tuple(tensor.name for tensor in (*inputs, *outputs))
        self._device = device
        self._failed = failed
        self._why_not_capturable = why_not_capturable
        self._seen: OrderedDict[Addresses, None] = OrderedDict()
        self._graphs: OrderedDict[Addresses, int] = OrderedDict()
        for tensor, shape in zip(inputs, shapes, strict=True):
            if not context.set_input_shape(tensor.name, shape):
                raise EngineUnfitError(str(failed(f"refused '{tensor.name}' of shape {shape}")))
        missing = context.infer_shapes()
        self.output_shapes = tuple(tuple(context.get_tensor_shape(tensor.name)) for tensor in outputs)
        if missing or any(size < 0 for shape in self.output_shapes for size in shape):
            raise failed("could not tell the shapes of its outputs")
        self._scratch = device.scratch(context.update_device_memory_size_for_shapes())
        if hasattr(context, "set_device_memory"):
            context.set_device_memory(self._scratch.pointer, self._scratch.size)
        else:  # TensorRT 10.0
            context.device_memory = self._scratch.pointer

    def run(self, addresses: Addresses) -> None:
        """Put the engine on the stream, with its tensors at these addresses, in their order."""
        graph = self._graphs.get(addresses)
        if graph is None and self._why_not_capturable is None and addresses in self._seen:
            graph = self._capture(addresses)
        if graph is None:
            self.enqueue(addresses)
            _remember(self._seen, addresses, None, 2 * MOST_GRAPHS)
            return
        self._graphs.move_to_end(addresses)
        self._device.cuda.launch(graph, self._device.stream)

    def close(self) -> None:
        """Let go of everything; the stream must have done its work."""
        for graph in self._graphs.values():
            self._device.cuda.destroy_launchable(graph)
        self._graphs.clear()
        context, self._context = self._context, None
        captures.when_over(lambda: context)

    def enqueue(self, addresses: Addresses, stream: int | None = None) -> None:
        """Put the engine itself on any stream, never a captured graph, so that the caller may capture it."""
        for name, address in zip(self._names, addresses, strict=True):
            if not self._context.set_tensor_address(name, address):
                raise self._failed(f"refused the address of '{name}'")
        if not self._context.execute_async_v3(self._device.stream if stream is None else stream):
            raise self._failed("could not be started")

    def why_not_capturable(self, stream: int) -> str | None:
        """Return what keeps a run on that stream from being captured, as far as is known beforehand."""
        if self._why_not_capturable is None:
            # TensorRT-RTX alone says so.
            says = getattr(self._context, "is_stream_capturable", None)
            if says is not None and not says(stream):
                self._why_not_capturable = str(self._failed("says that its work cannot be captured"))
        return self._why_not_capturable

    def _capture(self, addresses: Addresses) -> int | None:
        """Capture a run as a graph; None, once and for all, if TensorRT does what cannot be captured."""
        cuda = self._device.cuda
        if self.why_not_capturable(self._device.capture_stream) is not None:
            return None
        try:
            graph = self._captured(addresses)
        except BackendError as error:
            self._why_not_capturable = str(error)
            return None
        evicted = _remember(self._graphs, addresses, graph, MOST_GRAPHS)
        if evicted is not None:
            cuda.destroy_launchable(evicted)
        return graph

    def _captured(self, addresses: Addresses) -> int:
        """Capture a run; raise BackendError if that fails, or if what it holds cannot be replayed."""
        cuda = self._device.cuda
        graph = self._device.capture(lambda stream: self.enqueue(addresses, stream))
        try:
            problem = why_not_a_part(cuda, graph, "root")
            if problem is not None:
                raise self._failed(f"did what cannot be replayed: {problem}")
            return cuda.instantiate(graph)
        finally:
            cuda.destroy_graph(graph)


def _closed() -> Any:
    raise BackendError("the engine has been closed; load the detector again")


def _remember(entries: OrderedDict[Addresses, Any], addresses: Addresses, value: Any, most: int) -> Any:
    """Keep an entry, and return the oldest one if there are too many."""
    entries[addresses] = value
    entries.move_to_end(addresses)
    return entries.popitem(last=False)[1] if len(entries) > most else None


def _tensors(loaded: Any, engine: Engine) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return the inputs and outputs of a deserialised engine.

    Raises EngineStaleError if it has a type that no graph of this project has.
    """
    found: dict[str, list[Tensor]] = {"INPUT": [], "OUTPUT": []}
    for i in range(loaded.num_io_tensors):
        name = loaded.get_tensor_name(i)
        kind = loaded.get_tensor_dtype(name).name
        if kind not in _TYPES:
            raise EngineStaleError(
                f"'{engine.path}' has a tensor '{name}' of type {kind}, which no stage has; "
                "build it again with `asag-build --force`"
            )
        found[loaded.get_tensor_mode(name).name].append(Tensor(name=name, dtype=_TYPES[kind]))
    return tuple(found["INPUT"]), tuple(found["OUTPUT"])


def declared(loaded: Any) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Describe the inputs and outputs of a deserialised engine as a manifest does."""
    found: dict[str, list[TensorSpec]] = {"INPUT": [], "OUTPUT": []}
    for i in range(loaded.num_io_tensors):
        name = loaded.get_tensor_name(i)
        kind = loaded.get_tensor_dtype(name).name
        shape = tuple(size if size >= 0 else UNKNOWN for size in loaded.get_tensor_shape(name))
        dtype = str(_TYPES[kind]) if kind in _TYPES else kind
        found[loaded.get_tensor_mode(name).name].append(TensorSpec(name=name, dtype=dtype, shape=shape))
    return found["INPUT"], found["OUTPUT"]


def _most_scratch(loaded: Any) -> int:
    """Return the bytes that the engine computes in at its profile's largest shapes."""
    if hasattr(loaded, "get_device_memory_size_for_profile_v2"):
        return int(loaded.get_device_memory_size_for_profile_v2(0))
    return int(loaded.get_device_memory_size_for_profile(0))  # TensorRT 10.0
