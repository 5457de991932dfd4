"""OpenVINO on the CPU, in float32, or in bfloat16 where the processor multiplies it; INT8 bundles in either.

A stage's outputs stay in the memory of the inference request that wrote them and go into the next stage as
they are.  The request serves another call only when the last of its outputs has been let go.

OpenVINO reads no ONNX functions, so what `compiled` loads has them inlined; compiled graphs are cached
(`asag_deploy.backends.compiled_cache`), and what bfloat16 leaves in float32 is decided in
`asag_deploy.backends.openvino.precision`.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from asag_deploy.backends.compiled_cache import CompiledCache
from asag_deploy.backends.cutting import DEFORMABLE, Plan, cut_into_files, has_function
from asag_deploy.backends.declared import UNKNOWN, check_declared
from asag_deploy.backends.forking import kept_in_forks
from asag_deploy.backends.network import Network, check_inputs, check_shapes, takes_float32_images
from asag_deploy.backends.openvino.compiled import DEVICE, ONE_COMPILES, Compiled, compile_into, load_from
from asag_deploy.backends.openvino.long_sums import split_long_sums
from asag_deploy.backends.openvino.map_ends import SCALE, maps_for_the_decoder, shorten_ends
from asag_deploy.backends.openvino.models import (
    break_ties_by_index,
    convert,
    in_bfloat16,
    mixed_precision,
    read_graph,
    read_kept,
    with_bfloat16,
)
from asag_deploy.backends.openvino.one_size import KeptFile, Shapes, StageOfOneSize, takes_pictures
from asag_deploy.backends.openvino.products import multiply_in_bfloat16
from asag_deploy.backends.pieces import (
    FLOAT32,
    StageInPieces,
    is_cut_of,
    kernels_for_cutting,
    threads_of_an_operator,
    warn_of_running_whole,
)
from asag_deploy.backends.resident_memory import return_freed_memory
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.bundle.manifest import GraphSpec, TensorSpec
from asag_deploy.errors import BackendError, FieldError, Problem
from asag_deploy.kernels.buffers import BFLOAT16, ScaledIntegers
from asag_deploy.kernels.cpu import CpuKernels
from asag_deploy.loop.stages import FEATURE_TENSORS, Array, Stage
from asag_deploy.telemetry import silent_openvino

if TYPE_CHECKING:
    from openvino import Core, InferRequest, Tensor

Precision = Literal["f32", "bf16"]

_RECIPE = 6
"""Counted up whenever another model is made of a graph, so that what is cached is made anew."""
_COMPUTED_IN_FLOAT32 = frozenset({"decoder"})
"""Graphs that take bfloat16 features but compute in float32.  In bfloat16 the decoder alone costs 0.02 AP on
the demo's scenes, and it is a small part of the arithmetic.  Marking its layers does not save it: OpenVINO
makes products with weights into layers of another type, which lose the mark.  Cut into pieces, its products
are in bfloat16 (`asag_deploy.backends.openvino.products`)."""
_OUTPUT_SUFFIX = "/sink_port_0"
_TYPES = {
    "f32": "float32",
    "f16": "float16",
    "f64": "float64",
    "boolean": "bool",
    "u8": "uint8",
    "i8": "int8",
    "i32": "int32",
    "i64": "int64",
}
_NOISE = ("Exception from ", "Check '", "FrontEnd API failed")


@dataclass(frozen=True, kw_only=True)
class OpenVino:
    """OpenVINO as an `asag_deploy.backends.Backend`."""

    name: str
    precision: Precision

    distributions = ("openvino",)
    cuts_graphs = True

    def problem(self) -> Problem | None:
        """Return what keeps OpenVINO from running in this precision; None if nothing does."""
        if importlib.util.find_spec("openvino") is None:
            return Problem(
                "OpenVINO is not installed", "install it with `pip install 'asag-deploy[openvino]'`"
            )
        if self.precision == "f32":
            return None
        if "BF16" in _core().get_property(DEVICE, "OPTIMIZATION_CAPABILITIES"):
            return None
        return Problem(
            "this processor has no bfloat16 arithmetic (AVX512-BF16 or AMX)", "use the backend 'openvino'"
        )

    def open(self, bundle: Bundle, *, threads: int | None, requests: int = 1) -> OpenVinoNetwork:
        """Load every graph of a bundle.

        Raises BackendError if one cannot be loaded, BundleCorruptError if it is not what the manifest says.
        """
        core = _core()
        cache = CompiledCache.of_user(self._recipe(core))
        graphs = bundle.manifest.graphs
        kernels = kernels_for_cutting()
        workers = threads_of_an_operator(threads, requests)
        integers = maps_for_the_decoder(bundle.manifest) if kernels is not None else frozenset()
        with ThreadPoolExecutor() as pool:  # compiling releases the interpreter lock
            config = _config(threads, requests)

            def open_stage(graph: GraphSpec) -> Stage:
                if kernels is not None and is_cut_of(bundle, graph.name):
                    in_pieces = self._open_pieces(core, cache, bundle, graph, config, kernels, workers)
                    if in_pieces is not None:
                        return in_pieces
                samples = has_function(bundle.graph_path(graph.name), DEFORMABLE)
                load = functools.partial(self._compiled, core, cache, graph, config, integers, samples)
                compiled = self._load(bundle, graph, load)
                ports = compiled.model.inputs, compiled.model.outputs
                check_declared(bundle, graph.name, *map(_specs, ports))
                stage = _OpenVinoStage(graph, compiled)
                if not takes_pictures(graph):
                    return stage
                file = KeptFile(bundle.graph_path(graph.name))
                return StageOfOneSize(stage, functools.partial(_load_for, graph, load, file))

            stages = list(pool.map(open_stage, graphs))
        return OpenVinoNetwork(
            {graph.name: stage for graph, stage in zip(graphs, stages, strict=True)},
            kernels=kernels,
            normalizes_on_host=takes_float32_images(bundle.manifest),
        )

    def _recipe(self, core: Core) -> str:
        """Name everything besides the graph that decides what compiling it gives."""
        import openvino

        device = core.get_property(DEVICE, "FULL_DEVICE_NAME")
        capabilities = sorted(core.get_property(DEVICE, "OPTIMIZATION_CAPABILITIES"))
        return f"{_RECIPE} {openvino.get_version()} {device} {' '.join(capabilities)} {self.precision}"

    def _load(self, bundle: Bundle, graph: GraphSpec, load: Callable[[Path], Compiled]) -> Compiled:
        path = bundle.graph_path(graph.name)
        try:
            return load(path)
        except Exception as error:  # OpenVINO's and ONNX Runtime's exceptions have no other base
            raise BackendError(
                f"the backend '{self.name}' could not load '{path}': {_reason(error)}"
            ) from error

    def _compiled(
        self,
        core: Core,
        cache: CompiledCache,
        graph: GraphSpec,
        how: Mapping[str, Any],
        integers: Collection[str],
        samples: bool,
        source: Path | KeptFile,
        shapes: Shapes | None = None,
    ) -> Compiled:
        """Load a graph as it was compiled before, or compile it.

        integers: results that are handed out as such if they are; samples: whether it computes where maps are
        sampled; shapes: of the only inputs that it is for.
        """
        exact = samples or graph.name in _COMPUTED_IN_FLOAT32
        precision = "f32" if exact else self.precision
        config = {"INFERENCE_PRECISION_HINT": precision, **how}
        key = f"{graph.sha256} {sorted(integers)} {shapes and sorted(shapes.items())}"
        cached = load_from(core, cache, key, config)
        if cached is not None:
            return cached
        with ONE_COMPILES:
            read = read_graph(source) if isinstance(source, Path) else read_kept(source, graph)
            model = split_long_sums(break_ties_by_index(read))
            shorten_ends(model, integers)
            if self.precision == "bf16":
                model = mixed_precision(core, model)
            if self.precision == "bf16" and graph.name not in _COMPUTED_IN_FLOAT32 and samples:
                # OpenVINO rewrites what computes the places, and the new layers are not marked as precise.
                model = multiply_in_bfloat16(model, {output.name for output in graph.outputs})
            if shapes is not None:
                model.reshape({name: list(shape) for name, shape in shapes.items()})
            return compile_into(core, cache, key, model, config)

    def _open_pieces(
        self,
        core: Core,
        cache: CompiledCache,
        bundle: Bundle,
        graph: GraphSpec,
        how: Mapping[str, Any],
        kernels: CpuKernels,
        threads: int,
    ) -> Stage | None:
        """Load a graph in pieces; None if that cannot be."""
        path = bundle.graph_path(graph.name)
        config = {"INFERENCE_PRECISION_HINT": "f32", **how}
        try:
            found = _cached_pieces(core, cache, graph.sha256, config)
            if found is None:
                with ONE_COMPILES:
                    found = self._compile_pieces(core, cache, path, graph.sha256, config)
        except Exception as error:  # of OpenVINO or ONNX, which have no other base
            warn_of_running_whole(graph.name, error)
            return None
        if found is None:
            return None
        plan, models = found
        check_declared(bundle, graph.name, plan.inputs, plan.outputs)
        pieces = [_OpenVinoStage(graph.name, model) for model in models]
        features = BFLOAT16 if self.precision == "bf16" else FLOAT32
        return StageInPieces(graph, plan, pieces, kernels, _Memory(), threads=threads, features=features)

    def _compile_pieces(
        self, core: Core, cache: CompiledCache, path: Path, digest: str, config: Mapping[str, Any]
    ) -> tuple[Plan, list[Compiled]] | None:
        compiled = []
        with cut_into_files(path) as found:
            if found is None:
                return None
            plan, files = found
            calls = [call for calls in plan.calls for call in calls]
            narrow = {name for call in calls for name in call.outputs if call.gives_features}
            narrow |= FEATURE_TENSORS
            outputs = {spec.name for spec in plan.outputs}
            for i, file in enumerate(files):
                model = split_long_sums(break_ties_by_index(convert(file)))
                if self.precision == "bf16":
                    wrapped = with_bfloat16(model, inputs=narrow, outputs=FEATURE_TENSORS)
                    model = multiply_in_bfloat16(wrapped, outputs)
                    narrow |= in_bfloat16(model.outputs)
                compiled.append(compile_into(core, cache, _piece_key(digest, i), model, config))
        cache.write(_plan_key(digest), plan.to_json())
        return plan, compiled


def _load_for(
    graph: GraphSpec, load: Callable[[KeptFile, Shapes], Compiled], file: KeptFile, shapes: Shapes
) -> Stage | None:
    """Load a graph for inputs of these shapes alone; None if that cannot be."""
    try:
        stage = _OpenVinoStage(graph, load(file, shapes))
    except Exception as error:  # whatever it is, the graph for any size is there
        sizes = " and ".join("x".join(map(str, shape)) for shape in shapes.values())
        warnings.warn(
            f"the graph '{graph.name}' is not compiled for its inputs of {sizes}, and so is slower: "
            f"{_reason(error)}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return_freed_memory()
    return stage


def _plan_key(digest: str) -> str:
    return f"{digest} plan"


def _piece_key(digest: str, number: int) -> str:
    return f"{digest} piece {number}"


def _cached_pieces(
    core: Core, cache: CompiledCache, digest: str, config: Mapping[str, Any]
) -> tuple[Plan, list[Compiled]] | None:
    """Load the pieces that an earlier start compiled; None if one is not there."""
    text = cache.read(_plan_key(digest))
    if text is None:
        return None
    try:
        plan = Plan.from_json(text)
    except (ValueError, FieldError):  # of another release
        return None
    models = [load_from(core, cache, _piece_key(digest, i), config) for i in range(len(plan.pieces))]
    whole = [model for model in models if model is not None]
    return (plan, whole) if len(whole) == len(models) else None


@functools.cache
def _core() -> Core:
    """Return the one OpenVINO of this process.

    Where the processor has AMX, each Core gives its thread another stack to handle signals on, and gives back
    the one before when it ends.  Of several that end in the order of their beginning, the last would leave a
    stack behind that is freed already: the next signal, such as Ctrl-C, would be a segmentation fault.
    """
    with silent_openvino():
        import openvino

    return kept_in_forks(openvino.Core())


class OpenVinoArray:
    """An array in OpenVINO's memory, or in a NumPy array's that OpenVINO reads in place."""

    __slots__ = ("_owner", "scale", "tensor")

    def __init__(self, tensor: Tensor, owner: object, scale: float | None = None) -> None:
        """Take a tensor; scale: of its integers, by which they are what the array stands for."""
        self.tensor = tensor
        self.scale = scale
        self._owner = owner  # the memory lives, and is not written to again, for as long as this does


class _Memory:
    """OpenVINO's arrays, where they lie (`asag_deploy.backends.pieces.HostMemory`)."""

    def view(self, array: OpenVinoArray) -> NDArray[Any] | ScaledIntegers:
        """Return the memory of an array."""
        import openvino

        values: NDArray[Any] = array.tensor.data
        if array.scale is not None:
            return ScaledIntegers(values=values, scale=array.scale)
        if array.tensor.get_element_type() != openvino.Type.bf16:
            return values
        return values.view(BFLOAT16)  # OpenVINO calls the same bits float16

    def wrap(self, values: NDArray[Any]) -> OpenVinoArray:
        """Return an array of OpenVINO in this memory."""
        import openvino

        if values.dtype != BFLOAT16:
            return OpenVinoArray(openvino.Tensor(values, shared_memory=True), values)
        halves = values.view(np.float16)
        return OpenVinoArray(openvino.Tensor(halves, halves.shape, openvino.Type.bf16), values)


class OpenVinoNetwork(Network):
    """The compiled graphs of a bundle: for any sizes, and for pictures of the size that comes most.

    A graph prepares its nodes again for each number of patches or queries that differs from the last.
    Rounded up, few differ: a light network is 3 to 5% faster on other pictures each time.
    """

    patch_bucket = 8
    query_bucket = 16

    def __init__(
        self, stages: Mapping[str, Stage], *, kernels: CpuKernels | None, normalizes_on_host: bool
    ) -> None:
        self.cpu_kernels = kernels
        self.normalizes_on_host = normalizes_on_host
        self._stages = dict(stages)

    def stage(self, name: str) -> Stage:
        """Return the stage called `name` (KeyError if there is none)."""
        return self._stages[name]

    def upload(self, array: NDArray[Any]) -> OpenVinoArray:
        """Lend a host array to OpenVINO.  It is not copied, and must not be written to any more."""
        import openvino

        whole = np.ascontiguousarray(array)
        whole = whole.view(whole.dtype.name)  # of C's two 8-byte integers, OpenVINO knows one
        return OpenVinoArray(openvino.Tensor(whole, shared_memory=True), whole)

    def download(self, array: OpenVinoArray) -> NDArray[Any]:
        """Copy an array to the host; bfloat16 comes as float32, for NumPy does not know it."""
        return _values_of(array)

    def shape(self, array: OpenVinoArray) -> tuple[int, ...]:
        """Return the shape of an array."""
        return _shape_of(array.tensor)


class _OpenVinoStage:
    """One compiled graph as a stage.  A call has its own request, so several threads can run it at once."""

    def __init__(self, graph: GraphSpec | str, compiled: Compiled) -> None:
        """Take a graph as the manifest has it, or the name of one of which this is a piece."""
        self._graph = graph if isinstance(graph, GraphSpec) else None
        self._name = graph.name if isinstance(graph, GraphSpec) else graph
        self._model, self._file = compiled.model, compiled.file
        self._calls = 0
        model = compiled.model
        self._inputs = {_own_name(port): port.get_element_type() for port in model.inputs}
        self._outputs = [_own_name(port) for port in model.outputs]
        self._idle: SimpleQueue[InferRequest] = SimpleQueue()

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the graph on those of `inputs` that it declares."""
        check_inputs(self._name, self._inputs, inputs)
        try:
            request = self._request()
            given = [_cast(_floats_of(inputs[name]), kind) for name, kind in self._inputs.items()]
            for index, tensor in enumerate(given):
                request.set_input_tensor(index, tensor)
            request.infer()
        except Exception as error:  # OpenVINO's exceptions have no other base
            raise BackendError(f"OpenVINO failed in the graph '{self._name}': {_reason(error)}") from error
        self._spare_ram()
        lease = _Lease()
        weakref.finalize(lease, self._idle.put, request).atexit = False
        outputs = {name: request.get_output_tensor(index) for index, name in enumerate(self._outputs)}
        scales = {
            name.removesuffix(SCALE): float(outputs.pop(name).data[0])
            for name in self._outputs
            if name.endswith(SCALE)
        }
        if self._graph is not None:
            taken = {name: _shape_of(tensor) for name, tensor in zip(self._inputs, given, strict=True)}
            made = {name: _shape_of(tensor) for name, tensor in outputs.items()}
            check_shapes(self._graph, taken, made)
        return {name: OpenVinoArray(tensor, lease, scales.get(name)) for name, tensor in outputs.items()}

    def shapes(self, inputs: Mapping[str, Array]) -> Shapes | None:
        """Return the shapes of a call's inputs, or None if one is missing."""
        if not self._inputs.keys() <= inputs.keys():
            return None
        return {name: _shape_of(inputs[name].tensor) for name in self._inputs}

    def _spare_ram(self) -> None:
        """Let the constants leave RAM after the first call, the second, the fourth and so on.

        The first call with a size copies weights into the order its products want them in, and reads only
        the copies from then on.
        """
        self._calls += 1
        if self._file is not None and self._calls & (self._calls - 1) == 0:
            self._file.leave_ram()

    def _request(self) -> InferRequest:
        try:
            return self._idle.get_nowait()
        except Empty:
            return self._model.create_infer_request()


class _Lease:
    """What the outputs of a call hold together; when it goes, their request is free for another call."""

    __slots__ = ("__weakref__",)


def _config(threads: int | None, requests: int) -> dict[str, Any]:
    """Tell OpenVINO how to use the cores: all for one call, or divided among several at once."""
    config: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
    if requests > 1:
        config = {"PERFORMANCE_HINT": "THROUGHPUT", "NUM_STREAMS": requests}
    if threads is not None:
        config["INFERENCE_NUM_THREADS"] = threads
    return config


def _cast(tensor: Tensor, kind: Any) -> Tensor:
    """Return the tensor in the type that the graph wants: bfloat16 for float32 features from the host."""
    import openvino

    if tensor.get_element_type() == kind or kind != openvino.Type.bf16:
        return tensor
    bits = np.array(tensor.data, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)  # to nearest, ties to even
    copy = openvino.Tensor(openvino.Type.bf16, tensor.get_shape())
    copy.data.view(np.uint16)[...] = rounded
    return copy


def _shape_of(tensor: Tensor) -> tuple[int, ...]:
    """Return a tensor's shape by way of NumPy, for OpenVINO's own takes sixty times as long to read."""
    shape: tuple[int, ...] = tensor.data.shape
    return shape


def _values_of(array: OpenVinoArray) -> NDArray[Any]:
    if array.scale is None:
        return _to_numpy(array.tensor)
    return ScaledIntegers(values=array.tensor.data, scale=array.scale).to_float32()


def _floats_of(array: OpenVinoArray) -> Tensor:
    """Return the tensor of an array; of integers, what they stand for."""
    import openvino

    return array.tensor if array.scale is None else openvino.Tensor(_values_of(array))


def _to_numpy(tensor: Tensor) -> NDArray[Any]:
    import openvino

    if tensor.get_element_type() != openvino.Type.bf16:
        return np.array(tensor.data)
    halves: NDArray[np.uint16] = tensor.data.view(np.uint16)  # OpenVINO calls the same bits float16
    return (halves.astype(np.uint32) << 16).view(np.float32)


def _specs(ports: Sequence[Any]) -> list[TensorSpec]:
    """Describe the inputs or outputs of a compiled graph as a manifest does."""
    return [
        TensorSpec(
            name=_own_name(port),
            dtype=_dtype(port),
            shape=tuple(
                UNKNOWN if size.is_dynamic else size.get_length() for size in port.get_partial_shape()
            ),
        )
        for port in ports
        if not _own_name(port).endswith(SCALE)
    ]


def _dtype(port: Any) -> str:
    """Name a port's type as NumPy does; feature maps of bfloat16 or integers are float32 to the graph."""
    name: str = port.get_element_type().get_type_name()
    is_map = _own_name(port) in FEATURE_TENSORS
    return "float32" if name == "bf16" or (name == "i8" and is_map) else _TYPES.get(name, name)


def _own_name(port: Any) -> str:
    """Return a compiled port's name in the graph; compiling may have merged it with another value."""
    name: str = port.node.friendly_name.removesuffix(_OUTPUT_SUFFIX)
    return name if name in port.names else port.any_name


def _reason(error: Exception) -> str:
    """Pick the first line that says something from OpenVINO's several lines of where an error arose."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith(_NOISE)]
    return next(iter([*telling, *lines]), type(error).__name__)
