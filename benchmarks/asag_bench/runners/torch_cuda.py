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
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch

from asag_bench.runners.torch_cuda_operators import KernelOperators
from asag_deploy.backends.tensorrt.backend import EngineNetwork
from asag_deploy.backends.tensorrt.stage import MOST_CONTEXTS, Shapes, StageContext, Tensor
from asag_deploy.cuda import Device, DeviceArray, open_cuda
from asag_deploy.errors import BackendError
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


class TorchStage:
    """A stage as PyTorch computes it, in a network of engines.  Use it under the device's lock or call it."""

    def __init__(
        self,
        module: StageModule,
        interface: Interface,
        device: Device,
        access: TorchAccess,
        operators: Operators,
    ) -> None:
        self.name = module.name
        self.inputs, self.outputs = interface
        self._module, self._device, self._access, self._operators = module, device, access, operators
        self._shapes_alone = _without_weights(module)
        self._contexts: OrderedDict[Shapes, StageContext] = OrderedDict()
        self._thread = threading.local()

    def __call__(self, inputs: Mapping[str, DeviceArray]) -> dict[str, DeviceArray]:
        """Run the stage on those of `inputs` that it takes; the outputs stay on the GPU.

        Raises BackendError for an input that is missing or of another type, or if PyTorch fails.
        """
        arrays = [self._input(tensor, inputs) for tensor in self.inputs]
        with self._device.lock:
            shapes = tuple(array.shape for array in arrays)
            context = self._context(shapes)
            results = {
                tensor.name: self._device.empty(shape, tensor.dtype)
                for tensor, shape in zip(self.outputs, context.output_shapes, strict=True)
            }
            addresses = tuple(array.pointer for array in (*arrays, *results.values()))
            if self._is_new_here(shapes):
                context.enqueue(addresses)
            else:
                context.run(addresses)
        return results

    def open_context(self, inputs: Mapping[str, DeviceArray]) -> StageContext:
        """Open a context of the caller's own for inputs of these shapes; used under the device's lock.

        Raises what calling the stage does.
        """
        return self._new_context(tuple(self._input(tensor, inputs).shape for tensor in self.inputs))

    def layers(self) -> None:
        """Return None: PyTorch was not built of anything that could be listed."""

    def close(self) -> None:
        """Let go of every context; the stream must have done its work."""
        for context in self._contexts.values():
            context.close()
        self._contexts.clear()

    def _input(self, tensor: Tensor, inputs: Mapping[str, DeviceArray]) -> DeviceArray:
        if tensor.name not in inputs:
            raise BackendError(f"the stage '{self.name}' takes an input '{tensor.name}', which was not given")
        array = inputs[tensor.name]
        if array.dtype != tensor.dtype:
            raise BackendError(
                f"the stage '{self.name}' takes '{tensor.name}' as {tensor.dtype}, got {array.dtype}; "
                "convert it first"
            )
        return array

    def _context(self, shapes: Shapes) -> StageContext:
        context = self._contexts.get(shapes)
        if context is None:
            if len(self._contexts) >= MOST_CONTEXTS:
                self._device.synchronize()  # it may still be running
                self._contexts.popitem(last=False)[1].close()
            context = self._contexts[shapes] = self._new_context(shapes)
        self._contexts.move_to_end(shapes)
        return context

    def _is_new_here(self, shapes: Shapes) -> bool:
        """Return whether this thread has not run the stage on such shapes before.

        Libraries make handles and plans for each thread, which they cannot while a stream captures.
        """
        if not hasattr(self._thread, "shapes"):
            self._thread.shapes = set()
        new = shapes not in self._thread.shapes
        self._thread.shapes.add(shapes)
        return new

    def _new_context(self, shapes: Shapes) -> StageContext:
        interface = Interface(self.inputs, self.outputs)
        context = TorchContext(self._module, self._shapes_alone, interface, self._access, self._operators)

        def failed(what: str) -> BackendError:
            return BackendError(f"PyTorch failed in the stage '{self.name}': it {what} ({context.problem})")

        return StageContext(context, self.inputs, self.outputs, shapes, self._device, failed)


class TorchContext:
    """PyTorch behind the interface of TensorRT's execution contexts, whose names and answers these are."""

    def __init__(
        self,
        module: StageModule,
        shapes_alone: StageModule,
        interface: Interface,
        access: TorchAccess,
        operators: Operators,
    ) -> None:
        self._module, self._shapes_alone = module, shapes_alone
        self._tensors = {tensor.name: tensor for tensor in (*interface.inputs, *interface.outputs)}
        self._inputs = len(interface.inputs)
        self._access, self._operators = access, operators
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._views: OrderedDict[tuple[int, ...], list[torch.Tensor]] = OrderedDict()
        self.problem = "nothing was wrong"
        """What PyTorch said last when it failed."""

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        """Take an input's shape; any will do."""
        self._shapes[name] = shape
        return True

    def infer_shapes(self) -> list[str]:
        """Find the shapes of the outputs, without computing anything.  Raises BackendError."""
        names = list(self._tensors)
        given = [
            torch.empty(self._shapes[name], dtype=_type_of(self._tensors[name]), device="meta")
            for name in names[: self._inputs]
        ]
        try:
            with torch.inference_mode():
                found = self._shapes_alone(*given)
        except RuntimeError as error:
            raise BackendError(
                f"the stage '{self._module.name}' takes no inputs of these shapes: {error}"
            ) from error
        self._shapes.update(zip(names[self._inputs :], (tuple(value.shape) for value in found), strict=True))
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

        def work() -> None:
            with torch.inference_mode(), use_operators(self._operators):
                outputs = self._module(*tensors[: self._inputs])
                for target, value in zip(tensors[self._inputs :], outputs, strict=True):
                    target.copy_(value)

        try:
            self._access.run(stream, work)
        except (RuntimeError, BackendError) as error:
            self.problem = next(iter(str(error).splitlines()), type(error).__name__)
            return False
        return True

    def _at(self, addresses: tuple[int, ...]) -> list[torch.Tensor]:
        """Return tensors at these addresses, made once: what is captured asks CUDA for nothing."""
        if addresses not in self._views:
            self._views[addresses] = [
                self._access.view(address, self._shapes[name], tensor.dtype)
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
