"""The compiled kernels, loaded: `asag_kernels` for CUDA devices, `asag_kernels_host` for the CPU.

See `plugins/README.md` for how to build them.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from asag_deploy.errors import BackendError
from asag_deploy.kernels import structures
from asag_deploy.kernels.buffers import Buffer, expect

Device = Literal["cuda", "host"]

LIBRARY_VARIABLE = "ASAG_KERNELS_LIBRARY"
"""Environment variable with the path of the CUDA library."""

_OPERATORS: dict[str, type[ctypes.Structure]] = {
    "multiscale_roi_align": structures.MultiscaleRoIAlign,
    "pyramid_sample": structures.PyramidSample,
    "deformable_sample": structures.DeformableSample,
    "patch_nms": structures.PatchNMS,
    "pad_anchors": structures.PadAnchors,
    "preprocess": structures.Preprocess,
    "postprocess": structures.Postprocess,
    "decide": structures.Decide,
}
_HEADER, _ELF = 64, b"\x7fELF\x02\x01"
"""The bytes of a shared library's header, and how it begins: numbers of 64 bits, the lowest byte first."""
_SEGMENT = struct.Struct("<IIQQQQQQ")
"""An entry of its table of segments: type, flags, place in the file, two addresses, bytes in the file, ..."""
_LOADED = 1
_OTHER_ARCHITECTURE = (98, 209)
"""cudaErrorInvalidDeviceFunction and cudaErrorNoKernelImageForDevice"""


class KernelLibrary:
    """One of the two libraries.  Safe to call from several threads at once."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        device: Device,
        *,
        threads: int = 32,
        seed: int = 0,
        remedy: str | None = None,
    ) -> None:
        """Load the library at `path`.

        For the host library: `threads` of a block (1 to 512), and the `seed` of the order in which they take
        their turns (0: ascending).  remedy: what to do about one that cannot be used (None: build it again).
        Raises BackendError if it cannot be loaded or has another interface.
        """
        self.device = device
        is_name = os.sep not in os.fspath(path)  # which the system looks for
        self.path = Path(path) if is_name else Path(path).absolute()
        self._block = structures.HostBlock(threads, seed)
        self._remedy = remedy
        if _is_cut_short(self.path):  # which would end the process, if it was loaded
            raise BackendError(
                f"the kernels in {self.path} cannot be loaded (the file is not whole); "
                f"{remedy or 'build them as plugins/README.md says'}"
            )
        try:
            self._library = ctypes.CDLL(str(self.path))
        except OSError as error:
            if not is_name and not self.path.is_file():
                raise BackendError(
                    f"the kernels' library {self.path} is no file; give its path, or "
                    f"{remedy or 'build it as plugins/README.md says'}"
                ) from None
            raise BackendError(
                f"the kernels in {self.path} cannot be loaded ({error}); "
                f"{remedy or 'build them as plugins/README.md says'}"
            ) from error
        self._check_interface()
        self._library.asag_message.restype = ctypes.c_char_p
        self._library.asag_message.argtypes = [ctypes.c_int]

    def expect(self, name: str, array: Any, shape: Sequence[int], *dtypes: type[np.generic]) -> Buffer:
        """Return `array` as a Buffer on the library's device, of that shape (-1: any size) and type.

        Raises ConfigError with what was expected.
        """
        return expect(name, array, shape, *dtypes, on_device=self.device == "cuda")

    def run(self, operator: str, arguments: ctypes.Structure, stream: int = 0) -> None:
        """Run an operator with its structure of arguments; on CUDA, launch it on the stream and return.

        Raises BackendError with the library's sentence if it refuses, or if the launch fails.
        """
        function = getattr(self._library, f"asag_{self.device}_{operator}")
        last = ctypes.byref(self._block) if self.device == "host" else ctypes.c_void_p(stream)
        status = function(ctypes.byref(arguments), last)
        if status != 0:
            raise BackendError(f"the kernel {operator} failed: {self.message(status)}")

    def add_decide(self, graph: int, dependencies: Sequence[int], arguments: structures.Decide) -> int:
        """Put `decide` into a CUDA graph, as a kernel node after the nodes it depends on; the node.

        The graph (a cudaGraph_t or CUgraph) and its nodes are handles as integers, whoever made them.  Raises
        BackendError with the library's sentence if it refuses, or if the node cannot be added.
        """
        if self.device != "cuda":
            raise BackendError(
                f"the kernel decide was given a CUDA graph, but {self.path} runs on the CPU; "
                "load libasag_kernels.so as a cuda library"
            )
        before = (ctypes.c_void_p * len(dependencies))(*dependencies)
        node = ctypes.c_void_p()
        status = self._library.asag_cuda_add_decide(
            ctypes.byref(arguments), graph, before, len(dependencies), ctypes.byref(node)
        )
        if status != 0:
            raise BackendError(
                f"the kernel decide could not be put into a CUDA graph: {self.message(status)}"
            )
        return int(node.value or 0)

    def check_device(self, capability: str) -> None:
        """Raise BackendError if the current device, of that compute capability (`sm86`), cannot run them.

        For the CUDA library; nothing is launched.
        """
        status = self._library.asag_cuda_ready()
        if status in _OTHER_ARCHITECTURE:
            raise BackendError(
                f"the kernels in {self.path} were not compiled for this GPU, {capability}; build them again "
                f"with -DCMAKE_CUDA_ARCHITECTURES={capability.removeprefix('sm')}, as plugins/README.md says"
            )
        if status != 0:
            raise BackendError(
                f"the kernels in {self.path} cannot run on this GPU, {capability}: {self.message(status)}; "
                f"install a newer driver, or build them with an older CUDA, or unset {LIBRARY_VARIABLE}"
            )

    def message(self, status: int) -> str:
        """Say in one sentence what a status means."""
        text: bytes = self._library.asag_message(status)
        return text.decode(errors="replace")

    def _check_interface(self) -> None:
        self._require("asag_message", "asag_interface_version")
        version = self._library.asag_interface_version()
        if version != structures.INTERFACE_VERSION:  # which may have other entry points
            raise BackendError(
                f"the kernels in {self.path} have interface {version}, expected "
                f"{structures.INTERFACE_VERSION}; "
                f"{self._remedy or 'build them again from the sources of this release'}"
            )
        self._require(*self._entry_points())
        for operator, structure in _OPERATORS.items():
            function = getattr(self._library, f"asag_{self.device}_{operator}")
            last = ctypes.POINTER(structures.HostBlock) if self.device == "host" else ctypes.c_void_p
            function.argtypes = [ctypes.POINTER(structure), last]
            function.restype = ctypes.c_int
        if self.device == "cuda":
            nodes = ctypes.POINTER(ctypes.c_void_p)
            add = self._library.asag_cuda_add_decide
            decide = ctypes.POINTER(structures.Decide)
            add.argtypes = [decide, ctypes.c_void_p, nodes, ctypes.c_size_t, nodes]
            add.restype = ctypes.c_int

    def _require(self, *names: str) -> None:
        missing = [name for name in names if not hasattr(self._library, name)]
        if missing:
            raise BackendError(
                f"{self.path} is not the {self.device} library of the kernels: it has no {missing[0]}; "
                f"{self._remedy or 'build it as plugins/README.md says'}"
            )

    def _entry_points(self) -> list[str]:
        operators = [f"asag_{self.device}_{operator}" for operator in _OPERATORS]
        return [*operators, "asag_cuda_add_decide", "asag_cuda_ready"] if self.device == "cuda" else operators


def _is_cut_short(path: Path) -> bool:
    """Tell whether a shared library ends before what it would be loaded of, as after an interrupted copy."""
    try:
        with path.open("rb") as stream:
            header = stream.read(_HEADER)
            if len(header) < _HEADER or not header.startswith(_ELF):
                return False  # it is no library of this kind, which the system says itself
            (start,) = struct.unpack_from("<Q", header, 32)
            entry, count = struct.unpack_from("<HH", header, 54)
            if entry != _SEGMENT.size:
                return False
            size = stream.seek(0, os.SEEK_END)
            stream.seek(min(start, size))
            table = stream.read(entry * count)
    except OSError:  # it is not there, or is found by its name
        return False
    if len(table) < entry * count:
        return True
    segments = _SEGMENT.iter_unpack(table)
    return any(kind == _LOADED and at + filled > size for kind, _, at, _, _, filled, *_ in segments)


def open_cuda_library(capability: str) -> KernelLibrary | None:
    """Open the CUDA library that `ASAG_KERNELS_LIBRARY` names, for the current device; None if it is not set.

    Raises BackendError if it cannot be loaded, or cannot run on a GPU of that compute capability (`sm86`).
    """
    path = cuda_library_path()
    if path is None:
        return None
    library = KernelLibrary(path, "cuda")
    library.check_device(capability)
    return library


def cuda_library_path() -> Path | None:
    """Return the path of the CUDA library that `ASAG_KERNELS_LIBRARY` names, or None if it is not set.

    Raises BackendError if there is no such file.
    """
    value = os.environ.get(LIBRARY_VARIABLE)
    if not value:
        return None
    path = Path(value)
    if not path.is_file():
        raise BackendError(f"{LIBRARY_VARIABLE} is {value}, which is no file; set it to libasag_kernels.so")
    return path.absolute()  # the system looks for a mere name elsewhere
