"""The stages in PyTorch where engines would be, so that everything around them runs on any NVIDIA GPU.

TensorRT-RTX does not serve every GPU (H100 and H200 it does not).  Here PyTorch takes TensorRT's place, and
only that: a `TorchContext` answers as an execution context does, and what drives it is the project's own code
for engines: memory and stream of `asag_deploy.cuda.Device`, captured graphs, the kernels, both loops.

    network = open_torch_network(modules, interfaces)
    loop = network.open_device_loop()

PyTorch's temporaries come from a pool of memory that nothing else uses and that lives as long as the network:
a captured graph finds them where they were.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch

from asag_bench.runners.torch_cuda_operators import KernelOperators
from asag_deploy.backends.tensorrt.backend import EngineNetwork
from asag_deploy.backends.tensorrt.stage import Addresses, DeviceStage, Shapes, StageContext, Tensor
from asag_deploy.cuda import Device, open_cuda
from asag_deploy.errors import BackendError, first_line
from asag_deploy.kernels import LIBRARY_VARIABLE, KernelLibrary, open_cuda_library
from asag_training.network.operator_choice import Operators, use_operators
from asag_training.network.stages import StageModule

if TYPE_CHECKING:
    from asag_deploy.backends.tensorrt.device_loop import DeviceLoop

_MOST_VIEWS = 8
"""Sets of addresses that a context keeps tensors for."""


class Interface(NamedTuple):
    """What a stage takes and gives, in order."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


class TorchAccess(Protocol):
    """How PyTorch gets at the memory and the streams of a `Device`."""

    def view(self, address: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> torch.Tensor:
        """Return the memory at that address as a tensor."""
        ...

    def run(self, stream: int, work: Callable[[], None]) -> None:
        """Put what `work` does on that stream, which may be capturing."""
        ...


class OnGpu:
    """PyTorch's CUDA: a `TorchAccess`."""

    def __init__(self) -> None:
        # The weights have been put there on PyTorch's own stream, which none of a `Device` waits for.
        torch.cuda.synchronize()
        self._pool = torch.cuda.MemPool()
        self._streams: dict[int, torch.cuda.Stream] = {}

    def view(self, address: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> torch.Tensor:
        """Return the memory at that address as a tensor."""
        if 0 in shape:
            return torch.empty(shape, dtype=getattr(torch, dtype.name), device="cuda")
        if dtype == np.bool_:
            return self.view(address, shape, np.dtype(np.uint8)).view(torch.bool)
        return torch.as_tensor(_Memory(address, shape, dtype), device="cuda")

    def run(self, stream: int, work: Callable[[], None]) -> None:
        """Put what `work` does on that stream, with temporaries from the pool."""
        if stream not in self._streams:
            self._streams[stream] = torch.cuda.ExternalStream(stream)  # type: ignore[no-untyped-call]  # PyTorch's
        with torch.cuda.stream(self._streams[stream]), torch.cuda.use_mem_pool(self._pool):
            work()


class _Memory:
    """Memory of another owner, as PyTorch takes it in."""

    def __init__(self, address: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.__cuda_array_interface__ = {
            "version": 3,
            "shape": shape,
            "typestr": dtype.str,
            "data": (address, False),
            "strides": None,
            "stream": None,
        }


class TorchStage(DeviceStage):
    """A stage as PyTorch computes it, in a network of engines."""

    def __init__(
        self,
        module: StageModule,
        interface: Interface,
        device: Device,
        access: TorchAccess,
        operators: Operators,
    ) -> None:
        super().__init__(module.name, *interface, device)
        self._module, self._access, self._operators = module, access, operators
        self._shapes_alone = _without_weights(module)
        self._output_shapes: dict[Shapes, Shapes] = {}
        self._thread = threading.local()

    def output_shapes(self, given: Shapes) -> Shapes:
        """Find the shapes of the outputs without computing anything.

        Raises BackendError for inputs of shapes that the stage does not take.
        """
        if given not in self._output_shapes:
            inputs = [
                torch.empty(shape, dtype=_type_of(tensor), device="meta")
                for tensor, shape in zip(self.inputs, given, strict=True)
            ]
            try:
                with torch.inference_mode():
                    found = self._shapes_alone(*inputs)
            except RuntimeError as error:
                raise BackendError(
                    f"the stage '{self.name}' takes no inputs of these shapes: {error}"
                ) from error
            self._output_shapes[given] = tuple(tuple(value.shape) for value in found)
        return self._output_shapes[given]

    def compute(self, stream: int, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
        """Put the stage on the stream.  Raises RuntimeError or BackendError if PyTorch fails."""

        def work() -> None:
            with torch.inference_mode(), use_operators(self._operators):
                for target, value in zip(outputs, self._module(*inputs), strict=True):
                    target.copy_(value)

        self._access.run(stream, work)

    def view(self, address: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> torch.Tensor:
        """Return the memory at that address as a tensor."""
        return self._access.view(address, shape, dtype)

    def _run(self, context: StageContext, shapes: Shapes, addresses: Addresses) -> None:
        """Run a context that was made for these shapes.

        In a thread that has not run the stage on such shapes before, nothing is captured: libraries make
        handles and plans for each thread, which they cannot while a stream captures.
        """
        if not hasattr(self._thread, "shapes"):
            self._thread.shapes = set()
        if shapes in self._thread.shapes:
            context.run(addresses)
        else:
            self._thread.shapes.add(shapes)
            context.enqueue(addresses)

    def _new_context(self, shapes: Shapes) -> StageContext:
        context = TorchContext(self)

        def failed(what: str) -> BackendError:
            return BackendError(f"PyTorch failed in the stage '{self.name}': it {what} ({context.problem})")

        return StageContext(context, self.inputs, self.outputs, shapes, self._device, failed)


class TorchContext:
    """PyTorch behind the interface of TensorRT's execution contexts, whose names and answers these are."""

    def __init__(self, stage: TorchStage) -> None:
        self._stage = stage
        self._tensors = {tensor.name: tensor for tensor in (*stage.inputs, *stage.outputs)}
        self._inputs = len(stage.inputs)
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._views: OrderedDict[Addresses, list[torch.Tensor]] = OrderedDict()
        self.problem = "nothing was wrong"
        """What PyTorch said last when it failed."""

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        """Take an input's shape; any will do."""
        self._shapes[name] = shape
        return True

    def infer_shapes(self) -> list[str]:
        """Find the shapes of the outputs; return the inputs that lack one, none.  Raises BackendError."""
        names = list(self._tensors)
        found = self._stage.output_shapes(tuple(self._shapes[name] for name in names[: self._inputs]))
        self._shapes.update(zip(names[self._inputs :], found, strict=True))
        return []

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of an input or output, once the shapes have been inferred."""
        return self._shapes[name]

    def update_device_memory_size_for_shapes(self) -> int:
        """Return 0: PyTorch has memory of its own."""
        return 0

    def set_device_memory(self, pointer: int, size: int) -> None:
        """Do nothing: PyTorch has memory of its own."""

    def set_tensor_address(self, name: str, address: int) -> bool:
        """Take the address where an input or output lies from now on."""
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        """Put the stage on the stream; return False, with `problem`, if PyTorch failed."""
        tensors = self._at(tuple(self._addresses[name] for name in self._tensors))
        try:
            self._stage.compute(stream, tensors[: self._inputs], tensors[self._inputs :])
        except (RuntimeError, BackendError) as error:
            self.problem = first_line(error)
            return False
        return True

    def _at(self, addresses: Addresses) -> list[torch.Tensor]:
        """Return tensors at these addresses, made once: what is captured asks CUDA for nothing."""
        if addresses not in self._views:
            self._views[addresses] = [
                self._stage.view(address, self._shapes[name], tensor.dtype)
                for address, (name, tensor) in zip(addresses, self._tensors.items(), strict=True)
            ]
            if len(self._views) > _MOST_VIEWS:
                self._views.popitem(last=False)
        self._views.move_to_end(addresses)
        return self._views[addresses]


class _Owner:
    """What lets go of stages, loops and device, in this order."""

    def __init__(self, device: Device, access: TorchAccess) -> None:
        self.device, self.access = device, access
        self.stages: list[TorchStage] = []
        self.loops: list[DeviceLoop] = []

    def close(self) -> None:
        """Wait for the GPU, and let go."""
        with contextlib.suppress(BackendError), self.device.lock:  # a GPU that has failed does not answer
            self.device.synchronize()
        for loop in self.loops:
            loop.close()
        self.loops.clear()
        for stage in self.stages:
            stage.close()
        self.stages.clear()
        self.device.close()


def torch_network(
    modules: Sequence[StageModule],
    interfaces: Sequence[Interface],
    device: Device,
    kernels: KernelLibrary,
    *,
    access: TorchAccess,
    operators: Operators,
) -> EngineNetwork:
    """Make the network of these stages, in the memory of that device; it is closed with the network."""
    owner = _Owner(device, access)
    owner.stages += [
        TorchStage(module, interface, device, access, operators)
        for module, interface in zip(modules, interfaces, strict=True)
    ]
    return EngineNetwork(owner.stages, device, owner.close, kernels=kernels, loops=owner.loops)


def open_torch_network(modules: Sequence[StageModule], interfaces: Sequence[Interface]) -> EngineNetwork:
    """Make the network on this machine's GPU, where the modules lie already.

    Raises BackendError if there is no CUDA here, or if the compiled kernels are not there.
    """
    cuda = open_cuda()
    kernels = open_cuda_library(cuda.capability)
    if kernels is None:
        raise BackendError(
            "PyTorch's stages take the compiled kernels; build them as plugins/README.md says and set "
            f"{LIBRARY_VARIABLE}"
        )
    access = OnGpu()
    operators = KernelOperators(kernels)
    return torch_network(modules, interfaces, Device(cuda), kernels, access=access, operators=operators)


def interface_of(inputs: Sequence[Any], outputs: Sequence[Any]) -> Interface:
    """Return the interface of tensors that a manifest names (`asag_deploy.bundle.manifest.TensorSpec`)."""
    return Interface(
        *(tuple(Tensor(name=t.name, dtype=np.dtype(t.dtype)) for t in side) for side in (inputs, outputs))
    )


def _without_weights(module: StageModule) -> StageModule:
    """Copy a stage to compute shapes alone; the copy holds no memory."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = torch.nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
    for buffer in module.buffers():
        memo[id(buffer)] = buffer.to("meta")
    return copy.deepcopy(module, memo)


def _type_of(tensor: Tensor) -> torch.dtype:
    return torch.from_numpy(np.empty(0, dtype=tensor.dtype)).dtype
