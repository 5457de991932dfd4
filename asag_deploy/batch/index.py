"""The index of a run: every picture once, in files that never change, cut into parts of a fixed size.

When a folder has got new pictures, a run that goes on adds a *generation* to the index.  It counts once its
list of files is there, which is written last.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from asag_deploy.batch.places import Place
from asag_deploy.batch.sources import Picture, Source
from asag_deploy.errors import DataError, OutputError, SourceError, reason_of

if TYPE_CHECKING:
    import pyarrow as pa

FOLDER = "index"
_PARTS_A_FILE = 200
_LEAST, _MOST, _PARTS_AIMED_AT = 20, 1000, 1000


@dataclass(frozen=True, kw_only=True)
class Part:
    """Pictures that are detected in together, and whose results are one file."""

    number: int
    file: str
    """The file of the index that lists its pictures."""
    group: int
    """Which row group of that file."""
    pictures: int
    anew: bool = False
    """Whether it is done although its results are there, which stay until the new ones take their place."""

    @property
    def results(self) -> str:
        """The name of the file of its results, in the folder of the run."""
        return f"results/part-{self.number:07d}.parquet"


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What the index had grown by at one time."""

    files: tuple[tuple[str, int], ...]
    """Names of files in the run's folder, and how many pictures each lists."""
    digests: dict[str, str]
    """By list, a checksum of all the paths in it."""
    repeated: int
    """Pictures that were listed again, and left out."""


def part_size(pictures: int) -> int:
    """Return how many pictures a part of a run has: so many that there are about a thousand parts."""
    return min(max(-(-pictures // _PARTS_AIMED_AT), _LEAST), _MOST)


def parts_of(generations: Sequence[Generation], size: int) -> Iterator[Part]:
    """Yield the parts of an index, numbered through."""
    number = 0
    for generation in generations:
        for file, pictures in generation.files:
            for group, first in enumerate(range(0, pictures, size)):
                yield Part(number=number, file=file, group=group, pictures=min(size, pictures - first))
                number += 1


def read_generations(place: Place) -> list[Generation]:
    """Read how the index of a run has grown; none where it was never made.  Raises OutputError if damaged."""
    found: list[Generation] = []
    while (content := place.read(_generation(len(found)))) is not None:
        try:
            data = json.loads(content)
            files = tuple((str(name), int(count)) for name, count in data["files"])
            found.append(Generation(files=files, digests=data["digests"], repeated=data["repeated"]))
        except (ValueError, TypeError, KeyError):
            name = f"{place.name}/{_generation(len(found))}"
            raise OutputError(f"'{name}' is damaged: begin the run anew in another folder") from None
    return found


def count_pictures(generations: Sequence[Generation]) -> int:
    """Count the pictures of an index."""
    return sum(count for generation in generations for _, count in generation.files)


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What a first pass over all sources has found."""

    pictures: int
    """With those that are listed again."""
    digests: dict[str, str]
    """By list, a checksum of all the paths in it."""
    doubtful: NDArray[np.uint64]
    """Hashes that more than one picture has, sorted."""


def survey(sources: Sequence[Source], seen: Callable[[int], object] = lambda _: None) -> Survey:
    """Count the pictures of all sources, and find which may be listed several times.

    That takes 16 bytes a picture, and so lists may be longer than the memory.  `seen` is told of pictures.
    Raises what `Source.pictures` does.
    """
    hashes: list[NDArray[np.uint64]] = []
    digests = {}
    for source in sources:
        digest = hashlib.sha256()
        for pictures in source.pictures():
            hashes.append(_hashes(pictures))
            if not source.may_grow:
                digest.update("".join(f"{picture.path}\0" for picture in pictures).encode())
            seen(len(pictures))
        if not source.may_grow:
            digests[source.name] = digest.hexdigest()
    every = np.concatenate(hashes) if hashes else np.zeros(0, np.uint64)
    hashes.clear()
    every.sort()
    doubtful = np.unique(every[1:][every[1:] == every[:-1]])
    return Survey(pictures=len(every), digests=digests, doubtful=doubtful)


def add_generation(
    place: Place, number: int, sources: Sequence[Source], found: Survey, size: int, known: frozenset[str]
) -> Generation:
    """Write what the index grows by: the pictures of sources that are not among the `known` locations.

    number: from 0, of the generation; size: pictures a part.  Raises what `Source.pictures` does, and
    OutputError if it cannot be written.
    """
    once = _Once(found.doubtful, known)
    files: list[tuple[str, int]] = []
    waiting: list[Picture] = []

    def write(pictures: list[Picture]) -> None:
        name = f"{FOLDER}/pictures-{number:03d}-{len(files):05d}.parquet"
        place.write(name, _as_parquet(pictures, size))
        files.append((name, len(pictures)))

    for source in sources:
        for pictures in source.pictures():
            waiting += once.keep(pictures)
            while len(waiting) >= size * _PARTS_A_FILE:
                write(waiting[: size * _PARTS_A_FILE])
                del waiting[: size * _PARTS_A_FILE]
    if waiting:
        write(waiting)
    made = Generation(files=tuple(files), digests=found.digests, repeated=once.repeated)
    if files:
        content = {"files": files, "digests": made.digests, "repeated": made.repeated}
        place.write(_generation(number), json.dumps(content, indent=1).encode())
    return made


class _Once:
    """Lets every picture pass once."""

    def __init__(self, doubtful: NDArray[np.uint64], known: frozenset[str]) -> None:
        self.repeated = 0
        self._doubtful = doubtful
        self._known = known
        self._passed: set[str] = set()

    def keep(self, pictures: list[Picture]) -> list[Picture]:
        """Return those that have not passed yet."""
        fresh = [picture for picture in pictures if picture.location not in self._known]
        if not len(self._doubtful) or not fresh:
            return fresh
        kept = []
        for picture, doubt in zip(fresh, np.isin(_hashes(fresh), self._doubtful).tolist(), strict=True):
            if doubt:
                if picture.location in self._passed:
                    self.repeated += 1
                    continue
                self._passed.add(picture.location)
            kept.append(picture)
        return kept


class IndexReader:
    """Gives the pictures of a part; it keeps the file open that it was last asked for."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._name = ""
        self._file: Any = None

    def pictures(self, part: Part) -> list[Picture]:
        """Return the pictures of a part.  Raises SourceError if they cannot be read."""
        from pyarrow.parquet import ParquetFile

        try:
            if self._name != part.file:
                self._file, self._name = ParquetFile(self._place.open(part.file)), part.file
            rows = self._file.read_row_group(part.group).to_pylist()
        except (OSError, ValueError) as error:
            self._name = ""
            raise SourceError(f"cannot read '{self._place.name}/{part.file}': {reason_of(error)}") from None
        if len(rows) != part.pictures:
            raise SourceError(
                f"'{self._place.name}/{part.file}' is not as it was written: begin the run anew in another "
                "folder"
            )
        return [Picture(**row) for row in rows]

    def locations(self, generations: Sequence[Generation]) -> Iterator[str]:
        """Yield where the pictures of an index are read from."""
        from pyarrow.parquet import ParquetFile

        for generation in generations:
            for name, _ in generation.files:
                with self._place.open(name) as file:
                    for row in ParquetFile(file).read().to_pylist():
                        yield Picture(**row).location


def _generation(number: int) -> str:
    return f"{FOLDER}/generation-{number:03d}.json"


def _hashes(pictures: Sequence[Picture]) -> NDArray[np.uint64]:
    from pandas.util import hash_array

    locations = np.array([picture.location for picture in pictures], dtype=object)
    hashed: NDArray[np.uint64] = hash_array(locations, categorize=False)
    return hashed


def _as_parquet(pictures: list[Picture], size: int) -> bytes:
    import pyarrow as pa
    from pyarrow.parquet import write_table

    schema = pa.schema([("path", pa.string()), ("place", pa.string())])
    try:
        table: pa.Table = pa.Table.from_pylist([picture._asdict() for picture in pictures], schema)
    except UnicodeEncodeError as error:
        raise DataError(f"a path of the list holds what is no letter: {error}") from None
    file = io.BytesIO()
    write_table(table, file, row_group_size=size)
    return file.getvalue()
