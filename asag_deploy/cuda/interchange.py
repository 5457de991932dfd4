"""Arrays on the GPU that libraries lend one another: PyCUDA, CuPy, Numba, PyTorch, and this project.

Those of other libraries come through DLPack or `__cuda_array_interface__`, and are used where they lie.
DLPack's capsules are made and read with ctypes (DLPack 0.8, `dltensor`).
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple, Protocol

import numpy as np

from asag_deploy.errors import ConfigError, ImageError
from asag_deploy.kernels.buffers import buffer_of, is_contiguous

CUDA = 2
"""kDLCUDA"""
GPU_KINDS = (CUDA, 13)
"""kDLCUDA and kDLCUDAManaged"""
_CODES = {"i": 0, "u": 1, "f": 2, "b": 6}
_NAME, _USED = b"dltensor", b"used_dltensor"


class Foreign(NamedTuple):
    """An array of another library."""

    pointer: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    owner: object
    """What must live as long as the memory is used."""
    stream: int | None
    """The stream it is computed on, which must be waited for; None if it is there already."""


def is_device_array(array: Any) -> bool:
    """Tell whether `array` lies in the memory of a GPU, as far as it says so itself."""
    if isinstance(array, np.ndarray):
        return False
    if hasattr(array, "__dlpack_device__"):
        return bool(int(array.__dlpack_device__()[0]) in GPU_KINDS)
    return hasattr(array, "__cuda_array_interface__")


def take(array: Any, stream: int) -> Foreign:
    """Take an array of another library, to be used on `stream`.

    Raises ImageError if it is not contiguous or does not lie on the GPU.
    """
    if hasattr(array, "__dlpack__"):
        imported = Imported(array.__dlpack__(stream=stream))
        return Foreign(imported.pointer, imported.shape, imported.dtype, (imported, array), None)
    try:
        buffer = buffer_of(array)
    except ConfigError as error:
        raise ImageError(str(error)) from None
    if not buffer.on_device:
        raise ImageError("expected an array in the memory of the GPU, got one on the host")
    producer = array.__cuda_array_interface__.get("stream")
    return Foreign(buffer.pointer, buffer.shape, buffer.dtype, array, producer)


class _DType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _DLDevice(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int32), ("number", ctypes.c_int32))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _DLDevice),
        ("ndim", ctypes.c_int32),
        ("dtype", _DType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    pass


_Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(_Managed))
_Managed._fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", _Deleter))

_alive: dict[int, tuple[Any, ...]] = {}
"""What is exported, by the address of its structure, until its consumer deletes it."""


def _forget(managed: Any) -> None:
    _alive.pop(ctypes.addressof(managed.contents), None)


_delete = _Deleter(_forget)


_python = ctypes.pythonapi
_python.PyCapsule_New.restype = ctypes.py_object
_python.PyCapsule_New.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_python.PyCapsule_IsValid.restype = ctypes.c_int
_python.PyCapsule_IsValid.argtypes = [ctypes.py_object, ctypes.c_char_p]
_python.PyCapsule_GetPointer.restype = ctypes.c_void_p
_python.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
_python.PyCapsule_SetName.argtypes = [ctypes.py_object, ctypes.c_char_p]
# A capsule that is being destroyed has no reference left to count, so it is passed as an address.
_RAW = ctypes.PyDLL(None)
_RAW.PyCapsule_IsValid.restype = ctypes.c_int
_RAW.PyCapsule_IsValid.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
_RAW.PyCapsule_GetPointer.restype = ctypes.c_void_p
_RAW.PyCapsule_GetPointer.argtypes = [ctypes.c_void_p, ctypes.c_char_p]


def _forget_unused(capsule: int) -> None:
    """Let go of what a capsule holds that nobody has consumed."""
    if _RAW.PyCapsule_IsValid(capsule, _NAME):
        _alive.pop(_RAW.PyCapsule_GetPointer(capsule, _NAME), None)


_destroy = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(_forget_unused)


class Exportable(Protocol):
    """A contiguous array on the GPU."""

    pointer: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


def export(array: Exportable) -> object:
    """Make a capsule that keeps `array` alive until its consumer has deleted what is in it."""
    shape = (ctypes.c_int64 * len(array.shape))(*array.shape)
    dtype = _DType(_CODES[array.dtype.kind], array.dtype.itemsize * 8, 1)
    tensor = _Tensor(array.pointer, _DLDevice(CUDA, 0), len(array.shape), dtype, shape, None, 0)
    managed = _Managed(tensor, None, _delete)
    address = ctypes.addressof(managed)
    _alive[address] = (array, shape, managed)
    return _python.PyCapsule_New(address, _NAME, ctypes.cast(_destroy, ctypes.c_void_p))


class Imported:
    """What a capsule holds; it is given back when nobody refers to this any more."""

    def __init__(self, capsule: object) -> None:
        """Consume a capsule.  Raises ImageError if it is none, was consumed, or holds no contiguous array."""
        self._managed: Any = None
        if not _python.PyCapsule_IsValid(capsule, _NAME):
            raise ImageError("expected a DLPack capsule that nobody has consumed; get a new one")
        address = _python.PyCapsule_GetPointer(capsule, _NAME)
        _python.PyCapsule_SetName(capsule, _USED)
        self._managed = ctypes.cast(address, ctypes.POINTER(_Managed))
        tensor = self._managed.contents.tensor
        if tensor.device.kind not in GPU_KINDS:
            raise ImageError("expected a DLPack array in the memory of the GPU, got one elsewhere")
        self.shape = tuple(tensor.shape[i] for i in range(tensor.ndim))
        self.dtype = _numpy_type(tensor.dtype)
        self.pointer = (tensor.data or 0) + tensor.byte_offset
        strides = tuple(tensor.strides[i] for i in range(tensor.ndim)) if tensor.strides else None
        if not is_contiguous(strides, self.shape):
            raise ImageError(f"the GPU array of shape {self.shape} is not contiguous; pass a contiguous copy")

    def __del__(self) -> None:
        if self._managed is not None and self._managed.contents.deleter:
            self._managed.contents.deleter(self._managed)


def _numpy_type(dtype: _DType) -> np.dtype[Any]:
    kinds = {code: kind for kind, code in _CODES.items()}
    if dtype.code not in kinds or dtype.lanes != 1:
        raise ImageError("the DLPack array has elements that NumPy has no type for; convert it to float32")
    return np.dtype(f"{kinds[dtype.code]}{dtype.bits // 8}")
