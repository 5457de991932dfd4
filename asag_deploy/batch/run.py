"""A run in its folder: what it was begun with, what is done, and what is left to do."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asag_deploy._version import __version__
from asag_deploy.batch.index import (
    Generation,
    IndexReader,
    Part,
    add_generation,
    count_pictures,
    part_size,
    parts_of,
    read_generations,
    survey,
)
from asag_deploy.batch.places import Place
from asag_deploy.batch.rows import count_errors, is_whole
from asag_deploy.batch.sources import Source
from asag_deploy.batch.worker import ATTEMPTS, IDENTITY
from asag_deploy.errors import OutputError, SourceError, plural, reason_of
from asag_deploy.leftovers import remove_leftovers

RESULTS = "results"
_LOCK = ".lock"
_FORMAT = 1
_NUMBER = re.compile(r"part-(\d{7,})\.parquet")
_AT_ONCE = 16
"""Files whose footers are read at the same time."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What a run is of; one with another goes into another folder."""

    bundle: str
    """The bundle's fingerprint."""
    options: dict[str, Any]
    """By name on the command line, what changes results."""
    sources: tuple[Source, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        sources = [{"name": s.name, "kind": s.kind, "column": s.column} for s in self.sources]
        return {"bundle": self.bundle, "options": self.options, "sources": sources}


class Run:
    """A run that is begun or goes on; made by `open_run`."""

    def __init__(self, place: Place, key: str, size: int, generations: Sequence[Generation]) -> None:
        self.place = place
        self.key = key
        self.part_size = size
        self.generations = tuple(generations)
        self.pictures = count_pictures(generations)
        self.repeated = sum(generation.repeated for generation in generations)

    def parts(self) -> tuple[list[Part], list[Part]]:
        """Return the parts that are done, and those that are not.

        Raises OutputError for results that belong to no part.
        """
        there = self._numbers()
        done: list[Part] = []
        pending: list[Part] = []
        for part in parts_of(self.generations, self.part_size):
            (done if part.number in there else pending).append(part)
        foreign = sorted(there - {part.number for part in done})
        if foreign:
            raise OutputError(
                f"'{self.place.name}/{RESULTS}' has results of a part {foreign[0]}, which this run does not "
                "have: move them away, or choose another folder"
            )
        return done, pending

    def count_failed(self, parts: Sequence[Part]) -> list[int]:
        """Return how many pictures failed in each of these parts, which are done."""

        def count(part: Part) -> int:
            try:
                with self.place.open(part.results) as file:
                    return count_errors(file)
            except (OSError, ValueError) as error:
                name = f"{self.place.name}/{part.results}"
                raise OutputError(f"'{name}' is damaged ({reason_of(error)}): remove it, and go on") from None

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return list(pool.map(count, parts))

    def tidy(self) -> None:
        """Remove what is there for a run under way only, and what killed processes have left."""
        self.place.remove(ATTEMPTS)
        if self.place.is_local:
            for folder in ("", RESULTS):
                remove_leftovers(Path(self.place.name, folder))

    def _numbers(self) -> set[int]:
        found = set()
        for file in self.place.files(RESULTS):
            name = file.name.rpartition("/")[2]
            match = _NUMBER.fullmatch(name)
            if match is None:
                raise OutputError(f"'{file.name}' is no file of a run: move it away")
            if is_whole(file.size):
                found.add(int(match[1]))
        return found


@contextmanager
def open_run(
    place: Place, identity: Identity, seen: Callable[[int], object] = lambda _: None
) -> Iterator[Run]:
    """Begin a run, or go on with one; no other program does at the same time, where the storage has locks.

    seen: is told of pictures while they are listed.  Raises OutputError for a folder that holds anything else
    or a run of something else, and what listing the sources raises.
    """
    if place.holds_anything() and place.read(IDENTITY) is None:  # in this order: a run's first file is that
        raise OutputError(
            f"'{place.name}' holds files, but no run of asag-batch: choose a new or an empty folder"
        )
    with _alone(place):
        content = place.read(IDENTITY)
        if content is None:
            yield _begin(place, identity, seen)
            return
        said = _read(content, place)
        _check_same(said, identity, place)
        generations = _go_on(place, identity, said["pictures_a_part"], seen)
        yield Run(place, said["key"], said["pictures_a_part"], generations)


def _begin(place: Place, identity: Identity, seen: Callable[[int], object]) -> Run:
    """List the sources, and write what the run is of and its index."""
    found = survey(identity.sources, seen)
    if not found.pictures:
        raise SourceError(_nothing(identity.sources))
    key, size = secrets.token_hex(8), part_size(found.pictures)
    said = {
        "format": _FORMAT,
        "producer": f"asag-deploy {__version__}",
        "key": key,
        **identity.to_dict(),
        "pictures_a_part": size,
    }
    place.write(IDENTITY, json.dumps(said, indent=1).encode())
    generations = [add_generation(place, 0, identity.sources, found, size, frozenset())]
    return Run(place, key, size, generations)


def _go_on(place: Place, identity: Identity, size: int, seen: Callable[[int], object]) -> list[Generation]:
    """Return the index of a run that goes on, with what its folders have got since."""
    generations = read_generations(place)
    if not generations:  # ended while it was listed
        found = survey(identity.sources, seen)
        return [add_generation(place, 0, identity.sources, found, size, frozenset())]
    lists = [source for source in identity.sources if not source.may_grow]
    digests = survey(lists).digests
    for source in lists:
        if digests[source.name] != generations[0].digests.get(source.name):
            raise OutputError(
                f"the list '{source.name}' has other paths in it than when the run in '{place.name}' began: "
                "give it another --output, or put the new pictures into a list of their own"
            )
    folders = [source for source in identity.sources if source.may_grow]
    if folders:
        known = frozenset(IndexReader(place).locations(generations))
        added = add_generation(place, len(generations), folders, survey(folders, seen), size, known)
        if added.files:
            generations.append(added)
    return generations


def _read(content: bytes, place: Place) -> dict[str, Any]:
    try:
        said = json.loads(content)
        new = said["format"] > _FORMAT
        whole = {"key", "bundle", "options", "sources", "pictures_a_part"} <= said.keys()
    except (ValueError, TypeError, KeyError, AttributeError):
        new = whole = False
    if new:
        raise OutputError(
            f"the run in '{place.name}' is of a newer release ({said.get('producer')}): go on with that"
        )
    if not whole:
        raise OutputError(f"'{place.name}/{IDENTITY}' is no run of asag-batch: choose another folder")
    return dict(said)


def _check_same(said: dict[str, Any], identity: Identity, place: Place) -> None:
    """Raise OutputError, with the first difference, for a run of something else."""
    now = identity.to_dict()
    of = f"the run in '{place.name}' was begun with"
    otherwise = "go on with that, or choose another --output"
    if said["bundle"] != now["bundle"]:
        raise OutputError(
            f"{of} another bundle (checksum {said['bundle'][:12]}, now {now['bundle'][:12]}): {otherwise}"
        )
    for name in (*now["options"], *said["options"]):
        before, after = said["options"].get(name), now["options"].get(name)
        if before != after:
            was, is_now = (_shown(value) for value in (before, after))
            raise OutputError(f"{of} {was} for --{name}, and now it is {is_now}: {otherwise}")
    if said["sources"] != now["sources"]:
        before = [source for source in said["sources"] if source not in now["sources"]]
        after = [source for source in now["sources"] if source not in said["sources"]]
        if before:
            column = f" (column '{before[0]['column']}')" if before[0]["column"] else ""
            raise OutputError(f"{of} '{before[0]['name']}'{column}, which is not given now: {otherwise}")
        if after:
            raise OutputError(f"{of} other sources than '{after[0]['name']}', given now: {otherwise}")
        raise OutputError(f"{of} the same sources in another order: {otherwise}")


def _shown(value: Any) -> str:
    return "its default" if value is None else str(value)


def _nothing(sources: Sequence[Source]) -> str:
    if len(sources) > 1:
        return f"none of the {plural(len(sources), 'source')} has any pictures"
    what = "has no pictures in it" if sources[0].kind == "folder" else "lists no pictures"
    return f"'{sources[0].name}' {what}"


@contextmanager
def _alone(place: Place) -> Iterator[None]:
    """Hold the lock of a run.  Raises OutputError where another program has it."""
    if not place.is_local:
        yield
        return
    folder = Path(place.name)
    path, is_new = folder / _LOCK, not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # A file of its own: one that is replaced, as all others are, would be another to whoever comes later.
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise OutputError(f"could not write '{path}': {reason_of(error)}") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(
                f"another asag-batch is at work in '{place.name}': wait for it, or end it"
            ) from None
        except OSError:
            pass  # storage without locks: twice the work is done, and results are the same
        if not path.exists() or not os.path.samestat(path.stat(), os.fstat(lock)):
            raise OutputError(f"another asag-batch has just ended in '{place.name}': start again")
        try:
            yield
        finally:
            if not (folder / IDENTITY).exists():  # nothing has begun, and nothing is left of it
                with contextlib.suppress(OSError):
                    path.unlink()
                    if is_new:
                        folder.rmdir()
    finally:
        with contextlib.suppress(OSError):
            os.close(lock)
