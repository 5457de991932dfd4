"""ONNX Runtime, on the CPU or through its CUDA provider: one code for both, only the device differs.

Graphs are run with IO binding: arrays are OrtValues on the device, passed from one graph to the next as they
are, and copied to the host only by `download`.  On a GPU their memory comes from the arena of the graph that
made them, and goes back to it with the last reference.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import re
import threading
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from asag_deploy.backends.cuda_libraries import load_cuda_libraries
from asag_deploy.backends.cutting import cut_into_files
from asag_deploy.backends.declared import UNKNOWN, check_declared
from asag_deploy.backends.network import Network, check_inputs, check_shapes, takes_float32_images
from asag_deploy.backends.pieces import (
    StageInPieces,
    is_cut_of,
    kernels_for_cutting,
    threads_of_an_operator,
    warn_of_running_whole,
)
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.bundle.manifest import GraphSpec, TensorSpec
from asag_deploy.bundle.manifest_json import export_again
from asag_deploy.errors import BackendError, Problem, first_line
from asag_deploy.kernels.cpu import CpuKernels
from asag_deploy.loop.stages import Array, Stage
from asag_deploy.scratch import path_in_utf8

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, OrtValue, SessionOptions

Device = Literal["cpu", "cuda"]

_PROVIDERS: dict[Device, str] = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_CUDA_OPTIONS = {
    # By default every convolution is tried out in all ways again for each new size of image.
    "cudnn_conv_algo_search": "HEURISTIC",
    "cudnn_conv_use_max_workspace": "1",
    # Every graph has an arena: five that double whenever they grow would take most of a small card.
    "arena_extend_strategy": "kSameAsRequested",
    "do_copy_in_default_stream": "1",
}
_CUDA_FAILURE = re.compile(r"CUDA failure \d+: [^;\n]+")
_TOO_NEW = re.compile(r"Unsupported model IR version|Opset \d+ is under development")
_UNKNOWN_OPERATOR = re.compile(
    r"error: (\S+?)\(-?\d+\) is not a registered|No opset import for domain '([^']*)'"
    r"|No Op registered for (\S+)"
)
_NOISE = re.compile(
    r"^\[ONNXRuntimeError\] : \d+ : \w+ : |/onnxruntime_src/\S+ (?:[^()]*\([^()]*\)(?: const)? )?"
)
_TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(bool)": "bool",
    **{f"tensor({name})": name for name in ("int8", "uint8", "int32", "int64")},
}
_CONSTANT_BYTES = 4096
_MOST_CONSTANTS = 256
_ERRORS_ONLY = 3
_NOTHING = 4


@dataclass(frozen=True, kw_only=True)
class OnnxRuntime:
    """ONNX Runtime as an `asag_deploy.backends.Backend`."""

    name: str
    device: Device
    tf32: bool = False
    """Whether products of float32 may lose 13 bits of mantissa on a GPU, for speed."""

    @property
    def distributions(self) -> tuple[str, ...]:
        """The distributions that hold ONNX Runtime; one of them alone reaches a GPU."""
        return ("onnxruntime", "onnxruntime-gpu") if self.device == "cpu" else ("onnxruntime-gpu",)

    @property
    def cuts_graphs(self) -> bool:
        """Whether it cuts graphs at the operators that are compiled for the CPU."""
        return self.device == "cpu"

    def problem(self) -> Problem | None:
        """Return what keeps ONNX Runtime from reaching the device; None if nothing does."""
        if importlib.util.find_spec("onnxruntime") is None:
            return Problem("ONNX Runtime is not installed", "install it with `pip install onnxruntime`")
        return None if self.device == "cpu" else _cuda_problem()

    def open(self, bundle: Bundle, *, threads: int | None, requests: int = 1) -> OrtNetwork:
        """Load every graph of a bundle.

        Raises BackendError if one cannot be loaded, BundleCorruptError if it is not what the manifest says.
        """
        import onnxruntime

        kernels = None
        workers = threads_of_an_operator(threads, requests)
        if self.cuts_graphs:
            threads = threads_of_a_call(threads, requests)
            kernels = kernels_for_cutting()

        def open_stage(graph: GraphSpec) -> Stage:
            if kernels is not None and is_cut_of(bundle, graph.name):
                in_pieces = self._open_pieces(bundle, graph, threads, kernels, workers)
                if in_pieces is not None:
                    return in_pieces
            session = self._open_session(bundle, graph.name, threads)
            _check(bundle, graph.name, session)
            return _OrtStage(graph, session, self.device)

        graphs = bundle.manifest.graphs
        with ThreadPoolExecutor() as pool:  # creating a session releases the interpreter lock
            opened = pool.map(open_stage, graphs)
            stages = {graph.name: stage for graph, stage in zip(graphs, opened, strict=True)}
        if self.device == "cuda":
            # For each convolution and each way of fusing that cuDNN cannot do, the provider writes a red line
            # and then takes another way: hundreds for a network in float16.  They go past the session's own
            # logger to that of the process.  What really fails, from here on, comes as an exception.
            onnxruntime.set_default_logger_severity(_NOTHING)
        on_host = self.device == "cpu" and takes_float32_images(bundle.manifest)
        return OrtNetwork(stages, self.device, kernels=kernels, normalizes_on_host=on_host)

    def _open_pieces(
        self, bundle: Bundle, graph: GraphSpec, threads: int | None, kernels: CpuKernels, workers: int
    ) -> Stage | None:
        """Load a graph in pieces; None if that cannot be."""
        try:
            with cut_into_files(bundle.graph_path(graph.name)) as found:
                if found is None:
                    return None
                plan, files = found
                sessions = [self._session(file, threads, {}, shares_memory=True) for file in files]
        except Exception as error:  # of ONNX or ONNX Runtime, which have no other base
            warn_of_running_whole(graph.name, error)
            return None
        check_declared(bundle, graph.name, plan.inputs, plan.outputs)
        pieces = [_OrtStage(graph.name, session, self.device) for session in sessions]
        return StageInPieces(graph, plan, pieces, kernels, _Memory(), threads=workers)

    def _open_session(self, bundle: Bundle, name: str, threads: int | None) -> InferenceSession:
        """Open a graph; on a GPU, try float16 with channels last, which its convolutions are made for."""
        path = bundle.graph_path(name)
        options = {**_CUDA_OPTIONS, "use_tf32": str(int(self.tf32))}
        if self.device == "cpu" or bundle.manifest.precision_of(name) != "fp16":
            return self._session(path, threads, options)
        try:
            return self._session(path, threads, {**options, "prefer_nhwc": "1"})
        except BackendError as error:
            session = self._session(path, threads, options)
            warnings.warn(
                f"the graph '{name}' runs with channels first, which is slower on this GPU: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
            return session

    def _session(
        self,
        path: Path,
        threads: int | None,
        options: Mapping[str, str],
        *,
        shares_memory: bool = False,
    ) -> InferenceSession:
        import onnxruntime

        on_gpu: list[str | tuple[str, dict[str, str]]] = [(_PROVIDERS["cuda"], dict(options))]
        providers = [*(on_gpu if self.device == "cuda" else []), _PROVIDERS["cpu"]]
        try:
            with path_in_utf8(path) as known:
                session = onnxruntime.InferenceSession(
                    known,
                    _session_options(threads, shares_memory=shares_memory),
                    providers=providers,
                    enable_fallback=0,  # which would print on stdout, amid the results, before it tries
                )
        except Exception as error:  # ONNX Runtime's exceptions have no other base
            raise BackendError(
                f"the backend '{self.name}' could not load '{path}': {_why_not_loaded(error)}"
            ) from error
        if session.get_providers()[0] != _PROVIDERS[self.device]:  # it falls back without an exception
            raise BackendError(
                f"the backend '{self.name}' could not start on this machine; "
                "check the GPU's driver, and that CUDA and cuDNN are of the versions onnxruntime-gpu wants"
            )
        return session


class OrtNetwork(Network):
    """The sessions of one bundle.  Sizes are dynamic in ONNX Runtime, so nothing needs to be rounded up."""

    def __init__(
        self,
        stages: Mapping[str, Stage],
        device: Device,
        *,
        kernels: CpuKernels | None,
        normalizes_on_host: bool,
    ) -> None:
        self.cpu_kernels = kernels
        self.normalizes_on_host = normalizes_on_host
        self._device = device
        self._lock = threading.Lock()
        self._constants: OrderedDict[tuple[Any, ...], OrtValue] = OrderedDict()
        self._stages = dict(stages)

    def stage(self, name: str) -> Stage:
        """Return the stage called `name` (KeyError if there is none)."""
        return self._stages[name]

    def upload(self, array: NDArray[Any]) -> OrtValue:
        """Bring a host array to the device; on the CPU without a copy, so that it must not be written to.

        On a GPU small arrays that were uploaded before are not copied again.
        """
        from onnxruntime import OrtValue

        contiguous = np.ascontiguousarray(array)
        if self._device == "cpu":  # the OrtValue borrows the array's memory, and keeps a reference to it
            return OrtValue.ortvalue_from_numpy(contiguous, "cpu")
        with self._lock:  # for these, ONNX Runtime has one allocator on the GPU, which is not safe by itself
            if contiguous.nbytes > _CONSTANT_BYTES:
                return OrtValue.ortvalue_from_numpy(contiguous, self._device)
            key = (contiguous.dtype.str, contiguous.shape, contiguous.tobytes())
            if key not in self._constants:
                self._constants[key] = OrtValue.ortvalue_from_numpy(contiguous, self._device)
                if len(self._constants) > _MOST_CONSTANTS:
                    self._constants.popitem(last=False)
            self._constants.move_to_end(key)
            return self._constants[key]

    def download(self, array: OrtValue) -> NDArray[Any]:
        """Copy an array to the host.  (On the CPU `numpy()` is only a view of the runtime's memory.)"""
        return np.array(array.numpy())

    def shape(self, array: OrtValue) -> tuple[int, ...]:
        """Return the shape of an array."""
        return tuple(array.shape())


class _Memory:
    """ONNX Runtime's arrays on the CPU, where they lie (`asag_deploy.backends.pieces.HostMemory`)."""

    def view(self, array: OrtValue) -> NDArray[Any]:
        """Return the memory of an array."""
        values: NDArray[Any] = array.numpy()
        return values

    def wrap(self, values: NDArray[Any]) -> OrtValue:
        """Return an array of ONNX Runtime in this memory, to which it keeps a reference."""
        from onnxruntime import OrtValue

        return OrtValue.ortvalue_from_numpy(values, "cpu")


class _OrtStage:
    """One session as a stage.  Bindings belong to a call, so that several threads can run it at once."""

    def __init__(self, graph: GraphSpec | str, session: InferenceSession, device: Device) -> None:
        """Take a graph as the manifest has it, or the name of one of which this is a piece."""
        self._graph = graph if isinstance(graph, GraphSpec) else None
        self._name = graph.name if isinstance(graph, GraphSpec) else graph
        self._session = session
        self._device = device
        self._inputs = [node.name for node in session.get_inputs()]
        self._outputs = [node.name for node in session.get_outputs()]

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the graph on those of `inputs` that it declares; the outputs stay on the device."""
        import onnxruntime

        check_inputs(self._name, self._inputs, inputs)
        binding = self._session.io_binding()
        options = onnxruntime.RunOptions()
        options.log_severity_level = _NOTHING  # what goes wrong comes as an exception
        try:
            for name in self._inputs:
                binding.bind_ortvalue_input(name, inputs[name])
            for name in self._outputs:
                binding.bind_output(name, self._device)
            self._session.run_with_iobinding(binding, options)
        except Exception as error:  # ONNX Runtime's exceptions have no other base
            raise BackendError(
                f"ONNX Runtime failed in the graph '{self._name}': {first_line(error)}"
            ) from error
        made = binding.get_outputs()
        if len(made) != len(self._outputs):  # it leaves out what it takes for optional
            raise BackendError(
                f"the graph '{self._name}' gave {len(made)} of {len(self._outputs)} outputs; {export_again()}"
            )
        outputs = dict(zip(self._outputs, made, strict=True))
        if self._graph is not None:
            given = {name: tuple(inputs[name].shape()) for name in self._inputs}
            check_shapes(self._graph, given, {name: tuple(array.shape()) for name, array in outputs.items()})
        return outputs


def _check(bundle: Bundle, name: str, session: InferenceSession) -> None:
    """Raise BundleCorruptError unless a session's graph is what the manifest says of it."""
    # An input with a value of its own is no input to a session, but can be given all the same.
    inputs = [*session.get_inputs(), *session.get_overridable_initializers()]
    check_declared(bundle, name, _specs(inputs), _specs(session.get_outputs()))


def _specs(nodes: Sequence[Any]) -> list[TensorSpec]:
    return [
        TensorSpec(
            name=node.name,
            dtype=_TYPES.get(node.type, node.type),
            # Dimensions without a name are None, or a name that ONNX Runtime makes up.
            shape=tuple(size if isinstance(size, int | str) else UNKNOWN for size in node.shape),
        )
        for node in nodes
    ]


def _why_not_loaded(error: Exception) -> str:
    """Say in half a sentence why ONNX Runtime does not load a graph, and what to do where that is known."""
    import onnxruntime

    text = first_line(error)
    if _TOO_NEW.search(text):
        return (
            f"it was written for a newer ONNX Runtime than {onnxruntime.__version__}, which is installed; "
            "upgrade it with `pip install --upgrade onnxruntime`, or export with a lower --opset"
        )
    unknown = _UNKNOWN_OPERATOR.search(text)
    if unknown:
        operator = next(part for part in unknown.groups() if part)
        return (
            f"it uses '{operator}', which ONNX Runtime {onnxruntime.__version__} does not have; upgrade it "
            "with `pip install --upgrade onnxruntime`, or export the bundle again with `asag-export`"
        )
    return _NOISE.sub("", text).strip()


def threads_of_a_call(threads: int | None, requests: int) -> int | None:
    """Return how many threads a call may use, its caller's included, so that `requests` calls use `threads`.

    None is ONNX Runtime's choice, for one call at a time; several share all the cores there are.  All calls
    of a session share its pool and each brings its caller's thread, so that the pool is what the callers
    leave; it goes to whoever has work, and the weights are held once.
    """
    if requests == 1:
        return threads
    return max((threads or len(os.sched_getaffinity(0))) - requests + 1, 1)


def _threads_by_default() -> int:
    """Return 0, which is ONNX Runtime's choice, or as many as there are processors where some are not ours.

    It would start a thread for each processor of the machine and bind it there, against `taskset`, and with a
    line on stderr each where a container's --cpuset-cpus forbids it.
    """
    ours = len(os.sched_getaffinity(0))
    return 0 if ours == os.cpu_count() else ours


@functools.cache
def _make_shared_memory() -> None:
    """Make the memory that the sessions of this process share which ask for it, if nobody has before."""
    import onnxruntime

    kind, use = onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, onnxruntime.OrtMemType.DEFAULT
    with contextlib.suppress(Exception):  # it is there already
        onnxruntime.create_and_register_allocator(onnxruntime.OrtMemoryInfo("Cpu", kind, 0, use), None)


def _session_options(threads: int | None, *, shares_memory: bool = False) -> SessionOptions:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.intra_op_num_threads = threads or _threads_by_default()
    # Patterns are kept per input shape, and every image may bring another.
    options.enable_mem_pattern = False
    # Each session has its own threads, which by default go on spinning after a run and so take the cores
    # from the session that runs next: a convolution net took 37 ms instead of 9 next to four small graphs on
    # two cores.  Spinning within a run pays (13.7 ms without, 12.8 with), so it only has to end with it.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # The CPU arena stays as it is, growing in powers of two: with a ResNet-50 bundle and images of changing
    # size the process stood at 922 MB after 13 images and at 925 after 200.  On a smaller net, growing by
    # just what is asked for fragmented to half as much again, and going without an arena cost a tenth of the
    # time in page faults.
    if shares_memory:
        # Pieces run one after the other, and what one has let go of serves the next: a network of six
        # encoder layers over 18,071 cells stood at 962 MB instead of 1770.
        _make_shared_memory()
        options.add_session_config_entry("session.use_env_allocators", "1")
    return options


def _cuda_problem() -> Problem | None:
    import onnxruntime

    if _PROVIDERS["cuda"] not in onnxruntime.get_available_providers():
        return Problem(
            "the installed ONNX Runtime has no CUDA provider",
            "replace it with `pip uninstall --yes onnxruntime onnxruntime-gpu && pip install --no-deps "
            "onnxruntime-gpu`",
        )
    load_cuda_libraries()
    try:
        onnxruntime.OrtValue.ortvalue_from_shape_and_type([1], np.float32, "cuda", 0)
    except Exception as error:  # ONNX Runtime's exceptions have no other base
        found = _CUDA_FAILURE.search(str(error))  # among the names of functions and files
        reason = first_line(error) if found is None else found.group().strip()
        return Problem(f"ONNX Runtime finds no usable CUDA device ({reason})", "check with `nvidia-smi`")
    return None
