"""Machine code of other GPUs in a shared library, zeroed: the library keeps its size, and packs well.

A library that nvcc made holds containers in its section `.nv_fatbin`, each with the same kernels compiled
for several GPUs.  Nothing moves, so that every address in the library stays right; a driver reads the entry
of its own GPU, and that when a kernel of the container is first launched.
"""

from __future__ import annotations

import mmap
import re
import shutil
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from asag_deploy.errors import ConfigError

_ELF_64_LITTLE = b"\x7fELF\x02\x01"
_SECTION = b".nv_fatbin"
_CONTAINER = b"\x50\xed\x55\xba"
_ALIGNMENT = 8
_COMPRESSED = b"\x28\xb5\x2f\xfd"
"""How Zstandard's frames begin."""
_KERNEL = re.compile(rb"\.text\.([A-Za-z0-9_]+)")
_PLACEHOLDER = b"EmptyKernel"


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """What came of it, in bytes of machine code."""

    kept: int
    zeroed: int


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """The code for one GPU in a container."""

    begin: int
    size: int
    gpu: int
    """Compute capability, such as 90."""


def prune(library: Path, gpu: int, unwanted: str = "") -> Pruned:
    """Zero all code in `library` but that for `gpu` (a compute capability such as 90); the file is changed.

    unwanted: a regular expression; containers all of whose kernels have such names are zeroed too, where
    `zstd` is installed to look into them.  Containers with code for `gpu` alone are: what all GPUs can do is
    compiled for all of them.

    Raises ConfigError if the library is none, or holds no code for `gpu`.
    """
    names = re.compile(unwanted.encode()) if unwanted and shutil.which("zstd") else None
    kept = zeroed = 0
    with library.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        begin, size = _section(memory, library)
        containers = list(_containers(memory, begin, begin + size))
        if not any(entry.gpu == gpu for entries in containers for entry in entries):
            raise ConfigError(f"'{library}' holds no code for SM{gpu}; take a release that supports this GPU")
        for entries in containers:
            alone = {entry.gpu for entry in entries} == {gpu}
            for entry in entries:
                wanted = entry.gpu == gpu and not alone
                if wanted and not (names and _all_named(memory, entry, names)):
                    kept += entry.size
                else:
                    memory[entry.begin : entry.begin + entry.size] = bytes(entry.size)
                    zeroed += entry.size
        memory.flush()
    return Pruned(kept=kept, zeroed=zeroed)


def has_gpu_code(library: Path) -> bool:
    """Return whether a file is a shared library with code for GPUs."""
    with library.open("rb") as file:
        if file.read(len(_ELF_64_LITTLE)) != _ELF_64_LITTLE:
            return False
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
            return _find_section(memory) is not None


def _section(memory: mmap.mmap, library: Path) -> tuple[int, int]:
    found = _find_section(memory) if memory[: len(_ELF_64_LITTLE)] == _ELF_64_LITTLE else None
    if found is None:
        raise ConfigError(f"'{library}' is no shared library with code for GPUs; name one that nvcc made")
    return found


def _find_section(memory: mmap.mmap) -> tuple[int, int] | None:
    """Return offset and size of the section with the code (ELF's header and section table, 64 bits)."""
    (table,) = struct.unpack_from("<Q", memory, 40)
    width, count, names = struct.unpack_from("<HHH", memory, 58)
    headers = [struct.unpack_from("<IIQQQQ", memory, table + i * width) for i in range(count)]
    strings = headers[names][4]
    for name, _, _, _, offset, size in headers:
        start = strings + name
        if memory[start : start + len(_SECTION) + 1] == _SECTION + b"\0":
            return offset, size
    return None


def _containers(memory: mmap.mmap, begin: int, end: int) -> Iterator[list[_Entry]]:
    """Yield the entries of each container; both have headers that say how long they and what follows are."""
    while begin < end:
        if memory[begin : begin + len(_CONTAINER)] != _CONTAINER:
            begin += _ALIGNMENT
            continue
        header, total = struct.unpack_from("<HQ", memory, begin + 6)
        entries, position = [], begin + header
        begin = position + total
        while position < begin:
            (own,) = struct.unpack_from("<I", memory, position + 4)
            (size,) = struct.unpack_from("<Q", memory, position + 8)
            (gpu,) = struct.unpack_from("<I", memory, position + 28)
            entries.append(_Entry(begin=position + own, size=size, gpu=gpu))
            position += own + size
        yield entries


def _all_named(memory: mmap.mmap, entry: _Entry, names: re.Pattern[bytes]) -> bool:
    """Return whether all kernels of an entry have names that match; not if there is none to be read."""
    code = memory[entry.begin : entry.begin + entry.size]
    if code.startswith(_COMPRESSED):  # padded behind, of which zstd complains once it has written all
        code = subprocess.run(["zstd", "-dqc"], input=code, capture_output=True).stdout
    kernels = {name for name in _KERNEL.findall(code) if _PLACEHOLDER not in name}
    return bool(kernels) and all(names.search(name) for name in kernels)
