"""The GPUs of this machine, as the library of the NVIDIA driver lists them; nothing else is needed for it."""

from __future__ import annotations

import ctypes
import platform
from dataclasses import dataclass

from asag_deploy.errors import BackendError

_LIBRARY = "nvcuda.dll" if platform.system() == "Windows" else "libcuda.so.1"
# CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
_MAJOR, _MINOR = 75, 76
_NAME_BYTES = 256


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU of this machine."""

    name: str
    capability: str
    """Such as `sm86`."""
    memory_bytes: int = 0
    """Memory of the whole GPU, in use or not."""
    cuda_version: str = ""
    """The newest CUDA that its driver supports, such as `13.0`."""


def find_gpus() -> tuple[Gpu, ...]:
    """Return the GPUs that this process may use, at least one.

    Raises BackendError with the reason if there is no driver, or if it finds no GPU.
    """
    try:
        driver = ctypes.CDLL(_LIBRARY)
    except OSError:
        raise BackendError(f"no NVIDIA driver: {_LIBRARY} is not there") from None
    count, version = ctypes.c_int(0), ctypes.c_int(0)
    _ask(driver, "cuInit", 0)
    _ask(driver, "cuDeviceGetCount", ctypes.byref(count))
    _ask(driver, "cuDriverGetVersion", ctypes.byref(version))
    if count.value == 0:
        raise BackendError("the NVIDIA driver finds no GPU that it can use")
    return tuple(_gpu(driver, i, version.value) for i in range(count.value))


def _gpu(driver: ctypes.CDLL, index: int, version: int) -> Gpu:
    device, major, minor = ctypes.c_int(0), ctypes.c_int(0), ctypes.c_int(0)
    name, memory = ctypes.create_string_buffer(_NAME_BYTES), ctypes.c_size_t(0)
    _ask(driver, "cuDeviceGet", ctypes.byref(device), index)
    _ask(driver, "cuDeviceGetName", name, _NAME_BYTES, device)
    _ask(driver, "cuDeviceGetAttribute", ctypes.byref(major), _MAJOR, device)
    _ask(driver, "cuDeviceGetAttribute", ctypes.byref(minor), _MINOR, device)
    _ask(driver, "cuDeviceTotalMem_v2", ctypes.byref(memory), device)
    return Gpu(
        name=name.value.decode(errors="replace"),
        capability=f"sm{major.value}{minor.value}",
        memory_bytes=memory.value,
        cuda_version=f"{version // 1000}.{version % 1000 // 10}",
    )


def _ask(driver: ctypes.CDLL, function: str, *arguments: object) -> None:
    """Call the driver.  Raises BackendError if it fails, or has no such function."""
    try:
        status = getattr(driver, function)(*arguments)
    except AttributeError:
        raise BackendError(f"{_LIBRARY} is no NVIDIA driver: it has no {function}") from None
    if status != 0:
        raise BackendError(f"the NVIDIA driver finds no GPU that it can use ({function} returned {status})")
