"""What is compiled, on disk, so that only the first start on a machine compiles: graphs, annotation files.

They lie in `$ASAG_CACHE_DIR`, else in `$XDG_CACHE_HOME/asag-deploy`, else in `~/.cache/asag-deploy`.  Not in
the bundle, which may be read-only, and is the same on every machine.  Everything may be deleted at any time;
a file that is damaged is as good as none, and where nothing can be written, nothing is cached.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from asag_deploy.atomic import atomic_write
from asag_deploy.backends.resident_memory import MappedFile
from asag_deploy.errors import OutputError

_NOWHERE = Path(os.devnull, "asag-deploy")
_MOST_BYTES = 4 * 2**30
_SUFFIX = ".blob"
_PIECE = 2**20
_DIGEST_BYTES = hashlib.sha256().digest_size


@dataclass(frozen=True)
class CompiledCache:
    """Compiled graphs that were made by one recipe (library, version, processor and options)."""

    folder: Path
    recipe: str
    most_bytes: int = _MOST_BYTES
    """Beyond this, what was used longest ago is deleted."""

    @classmethod
    def of_user(cls, recipe: str) -> CompiledCache:
        """Return the cache of the user who runs this."""
        return cls(cache_folder() / "openvino", recipe)

    def read(self, graph_sha256: str) -> bytes | None:
        """Return what was compiled from the graph of that SHA-256, or None if it must be compiled (again)."""
        mapped = self.map(graph_sha256)
        return None if mapped is None else mapped.content.tobytes()

    def map(self, graph_sha256: str) -> MappedFile | None:
        """Return what `read` does as a file that is read where it lies, so that it takes no memory twice."""
        try:
            with self.open(graph_sha256) as (stream, size):
                return MappedFile(stream, size)
        except (OSError, ValueError):  # it is not there, or was cut since
            return None

    @contextmanager
    def open(self, graph_sha256: str) -> Iterator[tuple[IO[bytes], int]]:
        """Give the open file that begins with what `read` returns, and how many bytes that is.

        It stays what it is when another takes its name.  Raises OSError or ValueError if there is none, or it
        is damaged.
        """
        file = self._file(graph_sha256)
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size - _DIGEST_BYTES
            if size < 1 or _digest(stream, size) != stream.read():
                raise ValueError(f"'{file}' is damaged")
            with contextlib.suppress(OSError):
                file.touch()  # it is used, and so not the first to go
            yield stream, size

    def write(self, graph_sha256: str, compiled: bytes) -> None:
        """Keep what was compiled from the graph of that SHA-256, if the disk takes it."""
        with (
            contextlib.suppress(OutputError),
            atomic_write(self._file(graph_sha256)) as temporary,
            temporary.open("wb") as stream,
        ):
            stream.write(compiled)  # first, so that what it aligns is aligned in memory too
            stream.write(hashlib.sha256(compiled).digest())
        self._forget_the_oldest()

    def _file(self, graph_sha256: str) -> Path:
        key = hashlib.sha256(f"{graph_sha256} {self.recipe}".encode()).hexdigest()
        return self.folder / f"{key}{_SUFFIX}"

    def _forget_the_oldest(self) -> None:
        with contextlib.suppress(OSError):  # another process may be at it too
            states = [(file, file.stat()) for file in self.folder.glob(f"*{_SUFFIX}")]
            states.sort(key=lambda entry: entry[1].st_mtime, reverse=True)
            total = 0
            for file, state in states:
                total += state.st_size
                if total > self.most_bytes:
                    file.unlink(missing_ok=True)


def _digest(stream: IO[bytes], size: int) -> bytes:
    """Read on by so many bytes, and return their SHA-256."""
    digest = hashlib.sha256()
    while size and (piece := stream.read(min(size, _PIECE))):
        digest.update(piece)
        size -= len(piece)
    return digest.digest()


class GrowingEntry:
    """An entry of a cache whose content grows while it is used, such as kernels that come with new shapes.

    It is written as soon as it has grown, so that whoever is killed has not compiled in vain, but not more
    often than every `pause_s` seconds.  Safe to use from several threads.
    """

    def __init__(
        self,
        cache: CompiledCache,
        key: str,
        serialize: Callable[[], bytes | None],
        *,
        kept_bytes: int = 0,
        pause_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cache = cache
        self._key = key
        self._serialize = serialize
        self._kept_bytes = kept_bytes
        """Size of what the cache holds already."""
        self._pause_s = pause_s
        self._clock = clock
        self._looked_at: float | None = None
        self._may_have_grown = False
        self._lock = threading.Lock()

    def used(self) -> None:
        """Note that something is about to be done that may add to the content."""
        self._may_have_grown = True

    def keep(self, *, now: bool = False) -> None:
        """Write the content if it has grown, and if it was not looked at just now (or `now`).

        Nothing happens while another thread is at it.
        """
        if not self._is_due(now) or not self._lock.acquire(blocking=now):
            return
        try:
            self._looked_at = self._clock()
            self._may_have_grown = False  # before the look, so that what begins meanwhile is not forgotten
            content = self._serialize()
            if content is not None and len(content) > self._kept_bytes:
                self._cache.write(self._key, content)
                self._kept_bytes = len(content)
                self._may_have_grown = True  # more may come of the same use; the next look will tell
        finally:
            self._lock.release()

    def _is_due(self, now: bool) -> bool:
        if not self._may_have_grown:
            return False
        return now or self._looked_at is None or self._clock() - self._looked_at >= self._pause_s


def cache_folder() -> Path:
    """Return the folder where this project keeps what it can make again.

    For a user without a home it is one that cannot be, so that nothing is kept.
    """
    own = os.environ.get("ASAG_CACHE_DIR")
    if own:
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME", "")
    try:
        of_user = Path(shared) if Path(shared).is_absolute() else Path.home() / ".cache"
        return of_user / "asag-deploy"
    except RuntimeError:
        return _NOWHERE
