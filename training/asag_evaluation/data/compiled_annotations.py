"""Annotation files, read once a machine: what was read is kept as flat arrays, which every process maps.

They lie in the folder `annotations` of the user's cache (`asag_deploy.backends.compiled_cache`), under the
content of the file that they were read from: one that has changed is read anew, whatever its date says.
Where nothing can be kept, they lie in memory, and processes that this one starts see them there.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from asag_deploy._version import __version__
from asag_deploy.backends.compiled_cache import CompiledCache, cache_folder
from asag_deploy.backends.resident_memory import return_freed_memory
from asag_evaluation.data.annotation_file import content_of, open_annotation_file
from asag_evaluation.data.annotations import AnnotationReader
from asag_evaluation.data.assembly import Found
from asag_evaluation.data.image_files import ImageFiles, is_file
from asag_evaluation.data.quick_reader import read_quickly
from asag_evaluation.data.records import FlatAnnotations
from asag_evaluation.data.shared_bytes import SharedBytes

_FORMAT = 1
"""Another one when `packed` writes, or the readers read, anything otherwise within a release."""
_RECIPE = f"annotations {_FORMAT} of {__version__}, {sys.byteorder}"
LEAST_BYTES = 2**20
"""Of a file worth keeping: smaller ones are read in a moment."""
_LONGEST_WAIT_S = 300.0
"""For another process that reads the same file."""
_PAUSE_S = 0.05


def open_annotations(path: Path, images: ImageFiles, *, as_stored: bool = False) -> FlatAnnotations:
    """Read a COCO annotation file, or take what was kept of it.

    Labels are in the order of the ids of the classes.  `images` finds files whose names are written in
    another way, and gives sizes that are missing: those of the upright image, or `as_stored`.  Raises
    DataError for a file that is missing, malformed or of another kind, and for records that cannot be read.
    """
    with open_annotation_file(path) as file:
        if os.fstat(file.fileno()).st_size < LEAST_BYTES:
            return _in_memory(_read(file, path, images, as_stored)[0])
        cache = CompiledCache(cache_folder() / "annotations", _RECIPE)
        key = _key(path, hashlib.file_digest(file, "sha256").digest())
        kept = _kept(cache, key, images)
        if kept is not None:
            return kept
        with _alone(file):
            kept = _kept(cache, key, images)  # another process may have been faster
            if kept is not None:
                return kept
            file.seek(0)
            content, digest, may_be_kept = _read(file, path, images, as_stored)
            if may_be_kept:
                key = _key(path, digest)
                cache.write(key, content)
                kept = _mapped(cache, key)
    opened = _in_memory(content) if kept is None else kept
    return_freed_memory()
    return opened


def _key(path: Path, digest: bytes) -> str:
    """Return what stands for a file: its content, and its name, which sentences on it hold."""
    return hashlib.sha256(digest + os.fsencode(path)).hexdigest()


def _kept(cache: CompiledCache, key: str, images: ImageFiles) -> FlatAnnotations | None:
    """Return what was kept, unless images are missing: others may then be meant, or the reader says which."""
    kept = _mapped(cache, key)
    if kept is None or any(True for _ in missing_images(kept, images)):
        return None
    return kept


def missing_images(flat: FlatAnnotations, images: ImageFiles) -> Iterator[str]:
    """Yield the names of the images that are not in the folder."""
    for index in range(len(flat)):
        name = flat.file_name(index)
        if not images.has(name) and not is_file(images.folder / name):
            yield name


def _mapped(cache: CompiledCache, key: str) -> FlatAnnotations | None:
    try:
        with cache.open(key) as (stream, size):
            return FlatAnnotations(SharedBytes(os.dup(stream.fileno()), size))
    except (OSError, ValueError):  # there is none, or it is damaged
        return None


def _in_memory(content: bytes) -> FlatAnnotations:
    return FlatAnnotations(SharedBytes.in_memory(content))


def _read(file: IO[bytes], path: Path, images: ImageFiles, as_stored: bool) -> tuple[bytes, bytes, bool]:
    """Return `packed` annotations, the SHA-256 of the file they were read from, and whether they hold for any
    folder that has all of the images."""
    digest = hashlib.sha256()
    found = read_quickly(file, path, images, digest, as_stored=as_stored)
    if found is None:
        file.seek(0)
        data = file.read()
        digest = hashlib.sha256(data)
        found = AnnotationReader(path, content_of(data, path), images, as_stored).found()
    return found.packed(), digest.digest(), _holds_anywhere(found)


def _holds_anywhere(found: Found) -> bool:
    return not found.counts["names_found_otherwise"] and not found.counts["sizes_from_files"]


@contextmanager
def _alone(file: IO[bytes]) -> Iterator[None]:
    """Wait for other processes that read the same file, where the file system lets it be told."""
    until = time.monotonic() + _LONGEST_WAIT_S
    with contextlib.suppress(OSError):
        while time.monotonic() < until:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(_PAUSE_S)
    yield  # closing the file gives it free
