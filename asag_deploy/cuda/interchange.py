"""Arrays of other libraries on the GPU: PyCUDA, CuPy, Numba, PyTorch.

They come through DLPack or `__cuda_array_interface__`, and are used where they lie.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from asag_deploy.cuda import dlpack
from asag_deploy.errors import ConfigError, ImageError


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
    """Whether `array` lies in the memory of a GPU, as far as it says so itself."""
    if isinstance(array, np.ndarray):
        return False
    if hasattr(array, "__dlpack_device__"):
        return bool(int(array.__dlpack_device__()[0]) in dlpack.GPU_KINDS)
    return hasattr(array, "__cuda_array_interface__")


def take(array: Any, stream: int) -> Foreign:
    """An array of another library, to be used on `stream`.

    Raises ImageError if it is not contiguous or does not lie on the GPU.
    """
    if hasattr(array, "__dlpack__"):
        imported = dlpack.Imported(array.__dlpack__(stream=stream))
        return Foreign(imported.pointer, imported.shape, imported.dtype, (imported, array), None)
    from asag_deploy.kernels import buffer_of

    try:
        buffer = buffer_of(array)
    except ConfigError as error:
        raise ImageError(str(error)) from None
    if not buffer.on_device:
        raise ImageError("expected an array in the memory of the GPU, got one on the host")
    producer = array.__cuda_array_interface__.get("stream")
    return Foreign(buffer.pointer, buffer.shape, buffer.dtype, array, producer)
