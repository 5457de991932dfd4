"""A cache entry that grows while it is used: written once it has grown, not at every turn."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from asag_deploy.backends.compiled_cache import CompiledCache, GrowingEntry


class Growing:
    """Content that a test lets grow, and a clock that it sets."""

    def __init__(self, folder: Path, *, kept: bytes = b"") -> None:
        self.cache = CompiledCache(folder, "any")
        if kept:
            self.cache.write("key", kept)
        self.content: bytes | None = b"k" * 10
        self.looks = 0
        self.time = 0.0
        self.entry = GrowingEntry(
            self.cache, "key", self.serialize, kept_bytes=len(kept), pause_s=30, clock=lambda: self.time
        )

    def serialize(self) -> bytes | None:
        self.looks += 1
        return self.content

    @property
    def kept(self) -> bytes | None:
        return self.cache.read("key")


@pytest.fixture
def growing(tmp_path: Path) -> Growing:
    return Growing(tmp_path)


def test_it_is_written_once_warm_and_again_when_it_has_grown(growing: Growing) -> None:
    growing.entry.keep()
    assert (growing.looks, growing.kept) == (0, None)  # nothing was used yet
    growing.entry.used()
    growing.entry.keep()
    assert growing.kept == b"k" * 10
    growing.content = b"k" * 20
    growing.entry.used()
    growing.entry.keep()
    assert growing.kept == b"k" * 10  # too soon
    growing.time = 30
    growing.entry.keep()
    assert growing.kept == b"k" * 20


def test_what_stays_the_same_is_looked_at_once_more_and_no_further(growing: Growing) -> None:
    growing.entry.used()
    for growing.time in (0, 10, 30, 60, 90, 1000):
        growing.entry.keep()
    assert growing.looks == 2


def test_what_the_disk_has_already_is_not_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    growing = Growing(tmp_path, kept=b"k" * 10)
    monkeypatch.setattr(CompiledCache, "write", lambda *_: pytest.fail("it has not grown"))
    growing.entry.used()
    growing.entry.keep(now=True)
    assert growing.looks == 1


def test_at_the_end_it_is_written_at_once(growing: Growing) -> None:
    growing.entry.used()
    growing.entry.keep()
    growing.content = b"k" * 20
    growing.entry.keep(now=True)
    assert growing.kept == b"k" * 20


def test_a_library_that_gives_nothing(growing: Growing) -> None:
    growing.content = None
    growing.entry.used()
    growing.entry.keep()
    assert growing.kept is None


def test_what_begins_while_it_is_looked_at_is_not_forgotten(growing: Growing) -> None:
    serialize = growing.serialize

    def while_another_begins() -> bytes | None:
        content = serialize()
        growing.entry.used()
        growing.content = b"k" * 20
        return content

    growing.entry = GrowingEntry(
        growing.cache, "key", while_another_begins, kept_bytes=10, clock=lambda: growing.time
    )
    growing.entry.used()
    growing.entry.keep()
    growing.time = 30
    growing.entry.keep()
    assert growing.kept == b"k" * 20


def test_another_thread_does_not_wait(growing: Growing) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slow() -> bytes:
        begun.set()
        assert go_on.wait(10)
        return b"k"

    entry = GrowingEntry(growing.cache, "key", slow, pause_s=0)
    entry.used()
    first = threading.Thread(target=entry.keep)
    first.start()
    assert begun.wait(10)
    entry.used()
    entry.keep()  # comes back, although the first is not done
    go_on.set()
    first.join()
    assert growing.kept == b"k"
