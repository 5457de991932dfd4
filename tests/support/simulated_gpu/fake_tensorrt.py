"""A stand-in for TensorRT's runtime on the GPU of `fake_cuda`: engines are ONNX files, run by ONNX Runtime.

It refuses what the real one refuses, does on the host what the real one does there (control flow, and sizes
that are computed with), and notes what the real one would silently get wrong: an execution
context that runs without all its shapes, addresses and memory, or whose captured graph is replayed after it
was told other shapes.
"""

from __future__ import annotations

import ctypes
import enum
import functools
import json
import math
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime

from support.simulated_gpu.fake_cuda import ALIGNMENT, FakeCuda

VERSION = "1.7.1.116"
MOST_SCRATCH = 1 << 16
WORKING_MEMORY = 0
"""Bytes on the GPU that an engine takes beside those of its file; for tests to change."""
_CONTROL_FLOW = {"If", "Loop", "Scan"}
# What TensorRT computes on the host if all that goes in is known there.
_ON_SIZES = {"Cast", "Concat", "Gather", "Identity", "Slice", "Squeeze", "Unsqueeze"}
_ARITHMETIC = {"Add", "Clip", "Div", "Less", "Max", "Min", "Mul", "Sub", "Where"}
_TYPES: dict[str, tuple[str, Any]] = {
    "tensor(float)": ("FLOAT", np.float32),
    "tensor(float16)": ("HALF", np.float16),
    "tensor(int32)": ("INT32", np.int32),
    "tensor(int64)": ("INT64", np.int64),
    "tensor(bool)": ("BOOL", np.bool_),
    "tensor(uint8)": ("UINT8", np.uint8),
    "tensor(double)": ("STRANGE", np.float64),
}

DataType = enum.Enum("DataType", ["FLOAT", "HALF", "INT32", "INT64", "BOOL", "UINT8", "STRANGE"])
TensorIOMode = enum.Enum("TensorIOMode", ["NONE", "INPUT", "OUTPUT"])
LayerInformationFormat = enum.Enum("LayerInformationFormat", ["ONELINE", "JSON"])
Strategy = enum.Enum("Strategy", ["STATIC", "ON_PROFILE_CHANGE", "USER_MANAGED"])


class ILogger:
    """Base of loggers."""

    Severity = enum.IntEnum("Severity", {"INTERNAL_ERROR": 0, "ERROR": 1, "WARNING": 2, "INFO": 3})

    def log(self, severity: int, msg: str) -> None:
        raise NotImplementedError


class Runtime:
    """Deserialises engines."""

    def __init__(self, logger: ILogger) -> None:
        self.logger = logger
        self.cuda = _CUDA[-1]
        self.engine_host_code_allowed = False

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        try:
            graph = _read(bytes(serialized_engine))
        except Exception:
            self.logger.log(ILogger.Severity.ERROR, "the magic tag does not match")
            return None
        memory = self.cuda.allocate_for_library(len(serialized_engine) + WORKING_MEMORY)
        if memory is None:
            self.logger.log(ILogger.Severity.ERROR, "Error Code 1: Cuda Runtime (out of memory)")
            return None
        return ICudaEngine(graph, self, memory)


class IRuntimeCache:
    """What TensorRT-RTX has compiled."""

    def __init__(self) -> None:
        self.content = b"compiled"
        self.given: bytes | None = None

    def deserialize(self, blob: bytes) -> bool:
        self.given = blob
        return True

    def serialize(self) -> bytes:
        return self.content


class IRuntimeConfig:
    """How TensorRT-RTX runs an engine."""

    __slots__ = ("cache", "cuda_graph_strategy", "dynamic_shapes_kernel_specialization_strategy", "strategy")

    cache: IRuntimeCache
    cuda_graph_strategy: Any
    dynamic_shapes_kernel_specialization_strategy: Any
    strategy: Any

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> IRuntimeCache:
        return IRuntimeCache()

    def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
        self.cache = cache
        return True


class ICudaEngine:
    """An engine; its weights lie in memory that nobody asks `cudaMalloc` for."""

    def __init__(self, graph: _Graph, runtime: Runtime, memory: int) -> None:
        self.memory = memory
        self.session = session = graph.session
        self.runtime = runtime
        self.asks_the_host = graph.asks_the_host
        self.takes_sizes_from_the_host = graph.takes_sizes_from_the_host
        self.cuda = runtime.cuda
        self.io = {
            **{node.name: (node, TensorIOMode.INPUT) for node in session.get_inputs()},
            **{node.name: (node, TensorIOMode.OUTPUT) for node in session.get_outputs()},
        }

    def __del__(self) -> None:
        self.cuda.free_for_library(self.memory)

    @property
    def num_io_tensors(self) -> int:
        return len(self.io)

    def get_tensor_name(self, index: int) -> str:
        return str(list(self.io)[index])

    def get_tensor_mode(self, name: str) -> Any:
        return self.io[name][1]

    def get_tensor_dtype(self, name: str) -> Any:
        return DataType[_TYPES[self.io[name][0].type][0]]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(size if isinstance(size, int) else -1 for size in self.io[name][0].shape)

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        assert profile_index == 0
        return MOST_SCRATCH

    def create_engine_inspector(self) -> EngineInspector:
        return EngineInspector(self)

    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig()

    def create_execution_context(self, strategy: Any = Strategy.STATIC) -> IExecutionContext:
        config = strategy if isinstance(strategy, IRuntimeConfig) else None
        strategy = strategy if config is None else config.strategy
        return IExecutionContext(self, config, needs_memory=strategy is Strategy.USER_MANAGED)


class EngineInspector:
    """Says that an engine is one layer, from its inputs to its outputs."""

    def __init__(self, engine: ICudaEngine) -> None:
        self._engine = engine

    def get_engine_information(self, format: Any) -> str:
        assert format is LayerInformationFormat.JSON
        sides: dict[str, list[dict[str, str]]] = {"Inputs": [], "Outputs": []}
        for name, (node, mode) in self._engine.io.items():
            kind = _TYPES[node.type][0].capitalize()
            side = "Inputs" if mode is TensorIOMode.INPUT else "Outputs"
            sides[side].append({"Name": name, "Format/Datatype": kind})
        return json.dumps({"Layers": [{"Name": "all", **sides}], "Bindings": list(self._engine.io)})


class IExecutionContext:
    """An engine about to run."""

    def __init__(self, engine: ICudaEngine, config: IRuntimeConfig | None, *, needs_memory: bool) -> None:
        self.config = config
        self._engine = engine
        self._needs_memory = needs_memory
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._memory: tuple[int, int] | None = None
        self._outputs: dict[str, tuple[int, ...]] | None = None
        self._ran_with: dict[str, tuple[int, ...]] | None = None
        self.runs = 0

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        node = self._engine.io[name][0]
        fits = len(node.shape) == len(shape) and all(
            isinstance(size, str) or size == given for size, given in zip(node.shape, shape, strict=True)
        )
        if not fits:
            self._engine.runtime.logger.log(ILogger.Severity.ERROR, f"no profile holds {name}")
            return False
        self._shapes[name] = tuple(shape)
        self._outputs = None
        return True

    def infer_shapes(self) -> list[str]:
        missing = [name for name in self._inputs() if name not in self._shapes]
        if not missing:
            self._outputs = self._shapes_of_outputs()
        return missing

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self._shapes:
            return self._shapes[name]
        if self._outputs is None:
            return tuple(size if isinstance(size, int) else -1 for size in self._engine.io[name][0].shape)
        return self._outputs[name]

    def update_device_memory_size_for_shapes(self) -> int:
        assert set(self._shapes) == set(self._inputs())
        return min(sum(4 * math.prod(shape) for shape in self._shapes.values()), MOST_SCRATCH)

    def set_device_memory(self, memory: int, size: int) -> None:
        assert memory % ALIGNMENT == 0
        assert self._needs_memory
        assert size >= self.update_device_memory_size_for_shapes()
        self._memory = (memory, size)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert name in self._engine.io
        assert memory % ALIGNMENT == 0, f"the address of {name} is not aligned"
        self._addresses[name] = memory
        return memory != 0

    def is_stream_capturable(self, stream: int) -> bool:
        return not self._engine.asks_the_host

    def execute_async_v3(self, stream_handle: int) -> bool:
        cuda = self._engine.cuda
        assert self._outputs is not None, "enqueued before all shapes were set"
        assert set(self._addresses) == set(self._engine.io), "enqueued before all addresses were set"
        assert self._memory is not None or not self._needs_memory, "enqueued without memory"
        capturing = cuda.stream(stream_handle).capture is not None
        if capturing and self._ran_with != self._shapes:
            self._engine.runtime.logger.log(ILogger.Severity.ERROR, "capture before the first run")
            return False
        self._ran_with = dict(self._shapes)
        if capturing and self._engine.asks_the_host:
            cuda.cudaStreamSynchronize(stream_handle)  # for a condition
            self._engine.runtime.logger.log(ILogger.Severity.ERROR, "a condition could not be read")
            return False
        if self._engine.takes_sizes_from_the_host:
            self._copy_sizes(stream_handle)
        shapes, outputs = dict(self._shapes), dict(self._outputs)
        addresses, memory = dict(self._addresses), self._memory

        def work() -> None:
            assert self._shapes == shapes, "a graph was replayed after other shapes were set"
            self._run(shapes, outputs, addresses, memory)

        return bool(cuda.put(stream_handle, work) == 0)

    def _copy_sizes(self, stream: int) -> None:
        """`ShapeHostToDeviceCopy`: from memory on the host that the context keeps, to some of its scratch."""
        assert self._memory is not None
        values = np.array([size for shape in self._shapes.values() for size in shape], dtype=np.int64)
        self._sizes = values
        sides = {"srcPtr": values.ctypes.data, "dstPtr": self._memory[0]}
        copy = SimpleNamespace(**{side: SimpleNamespace(ptr=at) for side, at in sides.items()})
        self._engine.cuda.put(stream, lambda: None, "Memcpy", copy)

    def _run(
        self,
        shapes: dict[str, tuple[int, ...]],
        outputs: dict[str, tuple[int, ...]],
        addresses: dict[str, int],
        memory: tuple[int, int] | None,
    ) -> None:
        self.runs += 1
        if memory is not None:
            view(self._engine.cuda, memory[0], (memory[1],), np.dtype(np.uint8))[:] = 0xAA
        feeds = {name: self._view(name, addresses, shape).copy() for name, shape in shapes.items()}
        results = self._engine.session.run(list(outputs), feeds)
        for name, result in zip(outputs, results, strict=True):
            assert result.shape == outputs[name]
            self._view(name, addresses, result.shape)[...] = result

    def _view(self, name: str, addresses: dict[str, int], shape: tuple[int, ...]) -> Any:
        dtype = np.dtype(_TYPES[self._engine.io[name][0].type][1])
        return view(self._engine.cuda, addresses[name], shape, dtype)

    def _inputs(self) -> list[str]:
        return [node.name for node in self._engine.session.get_inputs()]

    def _shapes_of_outputs(self) -> dict[str, tuple[int, ...]]:
        """By running it on zeros: no shape depends on values."""
        names = [node.name for node in self._engine.session.get_outputs()]
        zeros: dict[str, Any] = {
            node.name: np.zeros(self._shapes[node.name], _TYPES[node.type][1])
            for node in self._engine.session.get_inputs()
        }
        results = self._engine.session.run(names, zeros)
        return {name: result.shape for name, result in zip(names, results, strict=True)}


class _Graph(NamedTuple):
    """What an engine computes, which many engines can share."""

    session: onnxruntime.InferenceSession
    asks_the_host: bool
    takes_sizes_from_the_host: bool


@functools.cache
def _read(content: bytes) -> _Graph:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session, model = onnxruntime.InferenceSession(content, options), onnx.load_from_string(content)
    return _Graph(session, has_control_flow(model), computes_with_sizes(model))


def has_control_flow(model: onnx.ModelProto) -> bool:
    """Whether a graph holds If, Loop or Scan, also in its functions."""
    nodes = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    return any(node.op_type in _CONTROL_FLOW for node in nodes)


def computes_with_sizes(model: onnx.ModelProto) -> bool:
    """Whether the size of a tensor is not only a shape but meets values that are on the GPU."""
    known = {constant.name for constant in model.graph.initializer}
    sizes: set[str] = set()
    for node in model.graph.node:
        given = set(filter(None, node.input))
        if node.op_type == "Shape":
            sizes.update(node.output)
        elif node.op_type == "Constant":
            known.update(node.output)
        elif given & sizes and node.op_type in _ON_SIZES | _ARITHMETIC:
            if given <= known | sizes:
                sizes.update(node.output)
            elif node.op_type in _ARITHMETIC:
                return True
    return False


def view(cuda: FakeCuda, pointer: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    """Device memory as an array; AssertionError if it is not alive."""
    size = max(math.prod(shape) * dtype.itemsize, 1)
    assert cuda.device.holds(pointer, size), "device memory is used that is not there"
    raw = memoryview((ctypes.c_uint8 * size).from_address(pointer)).cast("B")
    return np.frombuffer(raw, dtype=dtype, count=math.prod(shape)).reshape(shape)


_CUDA: list[FakeCuda] = []


def module(name: str, cuda: FakeCuda, version: str = VERSION) -> ModuleType:
    """TensorRT's module, running on this GPU."""
    _CUDA.append(cuda)
    made = ModuleType(name)
    made.__dict__["__version__"] = version
    made.__dict__.update(
        ILogger=ILogger,
        Runtime=Runtime,
        LayerInformationFormat=LayerInformationFormat,
        ExecutionContextAllocationStrategy=Strategy,
        CudaGraphStrategy=enum.Enum("CudaGraphStrategy", ["DISABLED", "WHOLE_GRAPH_CAPTURE"]),
        DynamicShapesKernelSpecializationStrategy=enum.Enum("KernelStrategy", ["LAZY", "EAGER", "NONE"]),
    )
    if name == "tensorrt_rtx":
        capabilities = ["NONE", "SM75", "SM80", "SM86", "SM89", "SM120", "SM121"]
        made.__dict__["ComputeCapability"] = enum.IntEnum("ComputeCapability", capabilities)
    return made
