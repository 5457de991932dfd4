"""The calls of the CUDA runtime that this project makes; a failure is a BackendError with CUDA's own words.

Handles and addresses are plain integers here, as TensorRT and the kernels take them.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any, Literal

from asag_deploy.cuda.captures import captures
from asag_deploy.errors import BackendError, GpuMemoryError, Problem, first_line

INSTALL = "pip install 'asag-deploy[gpu]'"

_MODULE = "cuda.bindings.runtime"
_THE_DEVICE = 0
_COPIES = {
    "to_device": "cudaMemcpyHostToDevice",
    "to_host": "cudaMemcpyDeviceToHost",
    "on_device": "cudaMemcpyDeviceToDevice",
}
_PINNED = 0
"""cudaHostAllocDefault"""

Direction = Literal["to_device", "to_host", "on_device"]


class Cuda:
    """CUDA on the first device that `CUDA_VISIBLE_DEVICES` leaves; made by `open_cuda`."""

    def __init__(self, module: Any) -> None:
        self.module = module
        """`cuda.bindings.runtime`."""
        attribute = module.cudaDeviceAttr
        major = self._ask(attribute.cudaDevAttrComputeCapabilityMajor)
        minor = self._ask(attribute.cudaDevAttrComputeCapabilityMinor)
        self.capability = f"sm{major}{minor}"
        """Such as `sm86`."""
        name = self.must(module.cudaGetDeviceProperties(_THE_DEVICE), "describe the device").name
        self.name: str = (name.decode(errors="replace") if isinstance(name, bytes) else str(name)).strip("\0")
        """The model of the GPU."""

    def versions(self) -> tuple[int, int]:
        """Return the CUDA version that the driver supports and that of the runtime, e.g. 13010 for 13.1."""
        driver = self.must(self.module.cudaDriverGetVersion(), "ask for the driver's version")
        return int(driver), int(self.must(self.module.cudaRuntimeGetVersion(), "ask for its version"))

    def allocate(self, size: int) -> int:
        """Allocate `size` bytes of device memory, aligned to 256 bytes."""
        pointer = self.must(self.module.cudaMalloc(size), f"allocate {size / 2**20:.1f} MiB on the GPU")
        return int(pointer)

    def free(self, pointer: int) -> None:
        """Give device memory back, after a capture if one is going on."""
        captures.when_over(lambda: self.must(self.module.cudaFree(pointer), "free memory"))

    def allocate_pinned(self, size: int) -> int:
        """Allocate `size` bytes of host memory that the GPU copies from and to while the CPU goes on."""
        return int(self.must(self.module.cudaHostAlloc(size, _PINNED), "allocate pinned memory"))

    def free_pinned(self, pointer: int) -> None:
        """Give pinned memory back, after a capture if one is going on."""
        captures.when_over(lambda: self.must(self.module.cudaFreeHost(pointer), "free pinned memory"))

    def copy(self, target: int, source: int, size: int, direction: Direction, stream: int) -> None:
        """Copy `size` bytes in the order of the stream; the host does not wait."""
        kind = getattr(self.module.cudaMemcpyKind, _COPIES[direction])
        self.must(self.module.cudaMemcpyAsync(target, source, size, kind, stream), "copy memory")

    def clear(self, pointer: int, size: int, stream: int) -> None:
        """Set `size` bytes of device memory to zero in the order of the stream."""
        self.must(self.module.cudaMemsetAsync(pointer, 0, size, stream), "clear memory")

    def create_stream(self) -> int:
        """Create a stream that does not wait for the default one."""
        flag = self.module.cudaStreamNonBlocking
        return int(self.must(self.module.cudaStreamCreateWithFlags(flag), "create a stream"))

    def synchronize(self, stream: int) -> None:
        """Wait until the stream has done all it was given."""
        self.must(self.module.cudaStreamSynchronize(stream), "finish what it was given")

    def synchronize_device(self) -> None:
        """Wait for every stream of every library in this process, and first for captures, which it spoils."""
        with captures.none_going_on():
            self.must(self.module.cudaDeviceSynchronize(), "finish what it was given")

    def destroy_stream(self, stream: int) -> None:
        """Let go of a stream."""
        self.must(self.module.cudaStreamDestroy(stream), "destroy a stream")

    def create_event(self, *, timing: bool = False) -> int:
        """Create an event; only one for `timing` can be asked for times."""
        flag = self.module.cudaEventDefault if timing else self.module.cudaEventDisableTiming
        return int(self.must(self.module.cudaEventCreateWithFlags(flag), "create an event"))

    def record(self, event: int, stream: int) -> None:
        """Let the event happen when the stream gets here."""
        self.must(self.module.cudaEventRecord(event, stream), "record an event")

    def wait_event(self, event: int) -> None:
        """Wait on the host until the event has happened."""
        self.must(self.module.cudaEventSynchronize(event), "finish what it was given")

    def stream_waits(self, stream: int, event: int) -> None:
        """Let the stream wait for the event; the host goes on."""
        self.must(self.module.cudaStreamWaitEvent(stream, event, 0), "wait for an event")

    def has_happened(self, event: int) -> bool:
        """Tell whether the event has happened."""
        (status, *_) = self.module.cudaEventQuery(event)
        if status == self.module.cudaError_t.cudaErrorNotReady:
            return False
        self.must((status,), "ask for an event")
        return True

    def elapsed_ms(self, start: int, end: int) -> float:
        """Return the milliseconds between two events for timing that have both happened."""
        return float(self.must(self.module.cudaEventElapsedTime(start, end), "compare events"))

    def destroy_event(self, event: int) -> None:
        """Let go of an event."""
        self.must(self.module.cudaEventDestroy(event), "destroy an event")

    def begin_capture(self, stream: int) -> None:
        """Begin to note down what this thread gives to the stream, instead of doing it."""
        # Other threads may go on allocating meanwhile, which the global mode forbids.
        mode = self.module.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self.must(self.module.cudaStreamBeginCapture(stream, mode), "begin to capture a graph")

    def capture_status(self, stream: int) -> Literal["none", "active", "invalidated"]:
        """Tell whether the stream is capturing, and whether something has made the capture worthless."""
        statuses = self.module.cudaStreamCaptureStatus
        found = self.must(self.module.cudaStreamIsCapturing(stream), "say whether a stream captures")
        if found == statuses.cudaStreamCaptureStatusNone:
            return "none"
        return "active" if found == statuses.cudaStreamCaptureStatusActive else "invalidated"

    def end_capture(self, stream: int) -> int:
        """Return what was noted down, as a graph; to be let go of with `destroy_graph`."""
        return int(self.must(self.module.cudaStreamEndCapture(stream), "capture a graph"))

    def abandon_capture(self, stream: int) -> None:
        """End a capture that went wrong, so that the stream can be used again."""
        if self.capture_status(stream) == "none":
            return
        status, *values = self.module.cudaStreamEndCapture(stream)
        # An invalidated capture gives no graph, for which bindings have None or a handle of zero.
        if status == self.module.cudaError_t.cudaSuccess and values and values[0] and int(values[0]):
            self.destroy_graph(int(values[0]))

    def create_graph(self) -> int:
        """Create an empty graph; to be let go of with `destroy_graph`."""
        return int(self.must(self.module.cudaGraphCreate(0), "create a graph"))

    def destroy_graph(self, graph: int) -> None:
        """Let go of a graph that was created or captured; what was instantiated of it stays."""
        self.must(self.module.cudaGraphDestroy(graph), "destroy a graph")

    def instantiate(self, graph: int) -> int:
        """Make a graph one that can be launched; to be let go of with `destroy_launchable`."""
        return int(self.must(self.module.cudaGraphInstantiate(graph, 0), "instantiate a graph"))

    def launch(self, launchable: int, stream: int) -> None:
        """Do what an instantiated graph says."""
        self.must(self.module.cudaGraphLaunch(launchable, stream), "launch a graph")

    def destroy_launchable(self, launchable: int) -> None:
        """Let go of an instantiated graph."""
        self.must(self.module.cudaGraphExecDestroy(launchable), "destroy a graph")

    def _ask(self, attribute: Any) -> int:
        return int(
            self.must(self.module.cudaDeviceGetAttribute(attribute, _THE_DEVICE), "describe the device")
        )

    def must(self, answer: tuple[Any, ...], what: str) -> Any:
        """Return the value of a call's answer.

        Raises BackendError, `CUDA could not {what}`, if the call failed; GpuMemoryError if there was no room.
        """
        status, *values = answer
        errors = self.module.cudaError_t
        if status == errors.cudaErrorMemoryAllocation:
            raise GpuMemoryError(
                f"CUDA could not {what}: {_words(self.module, status)}; end other programs on the GPU, or "
                "use smaller batches or images"
            )
        if status != errors.cudaSuccess:
            raise BackendError(f"CUDA could not {what}: {_words(self.module, status)}")
        return values[0] if values else None


def open_cuda() -> Cuda:
    """Open CUDA on this machine.  Raises BackendError with what `why_no_cuda` returns if it cannot be."""
    problem = why_no_cuda()
    if problem is not None:
        raise BackendError(str(problem))
    return Cuda(importlib.import_module(_MODULE))


def why_no_cuda() -> Problem | None:
    """Return what keeps this machine from running GPU backends; None if nothing does."""
    absent = Problem("cuda-python is not installed", f"install it with `{INSTALL}`")
    try:
        if importlib.util.find_spec(_MODULE) is None:
            return absent
        module = importlib.import_module(_MODULE)
    except ModuleNotFoundError:
        return absent
    except (ImportError, OSError, RuntimeError) as error:
        return Problem(
            f"cuda-python is installed but cannot be loaded ({first_line(error)})",
            f"install it again with `{INSTALL}`",
        )
    try:
        return _why_no_device(module)
    except RuntimeError as error:  # the driver's library is there, but lacks what is asked for
        return Problem(f"the NVIDIA driver cannot be used ({first_line(error)})", "install a newer driver")


def _why_no_device(module: Any) -> Problem | None:
    errors = module.cudaError_t
    status, count = module.cudaGetDeviceCount()
    if status == errors.cudaErrorInsufficientDriver:
        _, driver = module.cudaDriverGetVersion()
        if not driver:
            return Problem(
                "there is no NVIDIA driver on this machine", "install one, or use a backend for the CPU"
            )
        _, needed = module.cudaRuntimeGetVersion()
        return Problem(
            f"the NVIDIA driver supports CUDA {_version(driver)}, but the cuda-python here is for "
            f"{_version(needed)}",
            f"install a newer driver, or `pip install 'cuda-bindings=={driver // 1000}.*'`",
        )
    if status == errors.cudaErrorNoDevice or (status == errors.cudaSuccess and count == 0):
        return Problem(
            "the NVIDIA driver finds no GPU on this machine",
            "check with `nvidia-smi`, and that CUDA_VISIBLE_DEVICES does not hide it",
        )
    if status != errors.cudaSuccess:
        return Problem(f"CUDA cannot start ({_words(module, status)})", "check the driver with `nvidia-smi`")
    return None


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _words(module: Any, status: Any) -> str:
    answer, text = module.cudaGetErrorString(status)
    if answer != module.cudaError_t.cudaSuccess or text is None:
        return str(status)
    return text.decode(errors="replace") if isinstance(text, bytes) else str(text)
