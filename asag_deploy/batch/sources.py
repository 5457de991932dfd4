"""What a run is told to detect in: lists of paths (Parquet, CSV, text), and folders of pictures."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal, NamedTuple

from asag_deploy.batch.places import (
    Place,
    as_address,
    beside,
    folder_of,
    is_of_the_web,
    is_remote,
    kind_of,
    whole_name,
)
from asag_deploy.errors import ConfigError, DataError, SourceError, one_line, plural, reason_of
from asag_deploy.images.sources import IMAGE_SUFFIXES

DEFAULT_COLUMN = "path"
_PARQUET = (".parquet", ".pq")
_TOGETHER = 50_000
"""Pictures that are given at a time."""


class Picture(NamedTuple):
    """One picture of a run."""

    path: str
    """As it is called in the results: as the list has it, or the whole path in a folder."""
    place: str | None
    """The absolute path or the address that it is read from; None for `path` itself."""

    @property
    def location(self) -> str:
        """Where it is read from, by which two pictures are the same."""
        return self.path if self.place is None else self.place


Kind = Literal["folder", "parquet", "csv", "text"]
_LISTS: dict[Kind, tuple[str, ...]] = {
    "parquet": _PARQUET,
    "csv": (".csv", ".tsv"),
    "text": (".txt", ".lst"),
}


@dataclass(frozen=True, kw_only=True)
class Source:
    """A list of pictures, or a folder of them, that is there."""

    name: str
    """Its absolute path, or its address."""
    kind: Kind
    column: str | None = None
    """The column of a list that has several."""

    @property
    def may_grow(self) -> bool:
        """Whether pictures that come later are taken when the run goes on; lists must stay the same."""
        return self.kind == "folder"

    def pictures(self) -> Iterator[list[Picture]]:
        """Yield the pictures in their order, some thousands at a time.

        Raises SourceError or DataError for what cannot be read, ConfigError if there is no such column.
        """
        if self.kind == "folder":
            yield from _together(_walk(self.name))
            return
        here = folder_of(self.name) if self.kind != "parquet" or _is_parquet(self.name) else self.name
        base = here or "/"
        number = of_the_web = 0
        for values in self._values():
            found = []
            for value in values:
                number += 1
                found.append(_listed(value, base, f"entry {number} of '{self.name}'"))
                of_the_web += is_of_the_web(value)
            yield found
        if number and of_the_web == number:
            raise SourceError(
                f"the list '{self.name}' holds addresses of the web alone, of which asag-batch reads "
                "nothing: download the pictures first"
            )

    def _values(self) -> Iterator[list[Any]]:
        if self.kind == "text":
            yield from _together(_lines(self.name))
            return
        assert self.column is not None, "set by find_sources"
        read = _csv if self.kind == "csv" else _parquet
        try:
            yield from read(self.name, self.column)
        except (OSError, ValueError, UnicodeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise DataError(f"cannot read the list '{self.name}': {reason_of(error)}") from None


def find_sources(arguments: Sequence[str], column: str | None = None) -> tuple[Source, ...]:
    """Tell what arguments are, each once.

    column: the column of paths in lists that have columns; None for `path`.

    Raises SourceError for what is not there or is of no such kind, ConfigError for a column that no list has
    use for.
    """
    found = tuple(dict.fromkeys(_source(argument) for argument in arguments))
    if column is not None and not any(source.kind in ("parquet", "csv") for source in found):
        raise ConfigError("--column is for lists in Parquet or CSV, and none is given")
    return tuple(
        dataclasses.replace(source, column=column or DEFAULT_COLUMN)
        if source.kind in ("parquet", "csv")
        else source
        for source in found
    )


def _source(argument: str) -> Source:
    if not argument:
        raise SourceError("a source is an empty name: name a list of paths or a folder of pictures")
    name = whole_name(argument)
    kind = kind_of(name)
    if kind == "nothing":
        raise SourceError(f"'{argument}' does not exist: name a list of paths or a folder of pictures")
    if kind == "folder":
        return Source(name=name, kind="parquet" if _is_list_in_a_folder(name) else "folder")
    suffix = PurePosixPath(name).suffix.lower()
    for kind_of_list, suffixes in _LISTS.items():
        if suffix in suffixes:
            return Source(name=name, kind=kind_of_list)
    lists = "a list of paths (.parquet, .csv, .tsv, .txt)"
    if suffix in IMAGE_SUFFIXES:
        raise SourceError(f"'{argument}' is a picture: name its folder, or {lists}")
    raise SourceError(
        f"'{argument}' is no list of paths that is known: name a folder of pictures, or {lists}"
    )


def _is_parquet(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in _PARQUET


def _is_csv(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in _LISTS["csv"]


def _is_picture(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


def _is_list_in_a_folder(name: str) -> bool:
    """Tell a folder of Parquet files from one of pictures; raise ConfigError for one that is both."""
    inside = [file.name for file in Place(name).files()]
    parquet = next(filter(_is_parquet, inside), None)
    picture = next(filter(_is_picture, inside), None)
    if parquet is not None and picture is not None:
        raise ConfigError(
            f"'{name}' holds Parquet files ('{PurePosixPath(parquet).name}') and pictures "
            f"('{PurePosixPath(picture).name}'): name the list itself, or move one of the two"
        )
    return parquet is not None


def _walk(folder: str) -> Iterator[Picture]:
    """Yield the pictures in a folder and those in it, sorted, but for hidden ones."""
    if is_remote(folder):
        for file in Place(folder).files(recursive=True):
            if _is_picture(file.name):
                yield Picture(path=file.name, place=None)
        return
    for path in _walk_here(folder, frozenset()):
        try:
            path.encode()
        except UnicodeEncodeError:
            yield Picture(path=one_line(path), place=as_address(path))
        else:
            yield Picture(path=path, place=None)


def _walk_here(folder: str, above: frozenset[str]) -> Iterator[str]:
    """Yield the paths of pictures; a link to a folder is followed, but not to one that it lies in."""
    real = os.path.realpath(folder)
    if real in above:
        return
    try:
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise SourceError(f"cannot read the folder '{folder}': {reason_of(error)}") from None
    for entry in found:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk_here(entry.path, above | {real})
        elif _is_picture(entry.name) and entry.is_file():
            yield entry.path


def _listed(value: Any, base: str, where: str) -> Picture:
    """Return the picture that an entry of a list means; a relative path is from the list's own folder."""
    if not isinstance(value, str) or not value.strip():
        said = "empty" if value is None or value == "" else f"{value!r:.40}"
        raise DataError(f"{where} is {said}, and no path: take it out of the list")
    if "\0" in value:
        raise DataError(f"{where} holds a null byte, and is no path: take it out of the list")
    place = beside(base, value)
    return Picture(path=value, place=None if place == value else place)


def _together(items: Iterator[Any]) -> Iterator[list[Any]]:
    found: list[Any] = []
    for item in items:
        found.append(item)
        if len(found) == _TOGETHER:
            yield found
            found = []
    if found:
        yield found


def _lines(name: str) -> Iterator[str]:
    """Yield the lines of a text that are not empty."""
    content = Place(folder_of(name) or "/").read(PurePosixPath(name).name) or b""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"the list '{name}' is no text in UTF-8 (at byte {error.start})") from None
    yield from filter(str.strip, re.split("\r?\n", text))  # `splitlines` knows ends that paths may hold


def _csv(name: str, column: str) -> Iterator[list[Any]]:
    import pyarrow as pa
    from pyarrow import csv

    place, file_name = Place(folder_of(name) or "/"), PurePosixPath(name).name
    if place.size(file_name) == 0:
        return
    delimiter = "\t" if name.lower().endswith(".tsv") else ","
    parse = csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    with place.open(file_name) as file, csv.open_csv(file, parse_options=parse) as table:
        _check_column(column, table.schema.names, name)
    # That of the paths alone: pyarrow takes the types of the others from the beginning, which may not last.
    only = csv.ConvertOptions(include_columns=[column], column_types={column: pa.string()})
    with (
        place.open(file_name) as file,
        csv.open_csv(file, parse_options=parse, convert_options=only) as table,
    ):
        for batch in table:
            yield batch.column(0).to_pylist()


def _parquet(name: str, column: str) -> Iterator[list[Any]]:
    from pyarrow.parquet import ParquetFile

    if _is_parquet(name):
        files = [name]
    else:
        files = [file.name for file in Place(name).files() if _is_parquet(file.name)]
    for one in files:
        with Place(folder_of(one) or "/").open(PurePosixPath(one).name) as file, ParquetFile(file) as table:
            _check_column(column, table.schema_arrow.names, one)
            for batch in table.iter_batches(_TOGETHER, columns=[column]):
                yield batch.column(0).to_pylist()


def _check_column(column: str, names: Sequence[str], name: str) -> None:
    if names.count(column) != 1:
        has = ", ".join(map(repr, names[:10])) + (", ..." if len(names) > 10 else "")
        lacks = f" has no column '{column}', but {has}"
        if len(names) == 1 and _is_csv(name) and ";" in names[0]:
            raise ConfigError(
                f"the list '{name}'{lacks}: columns are parted by commas in .csv, by tabs in .tsv, "
                "and not by semicolons"
            )
        if column in names:
            raise ConfigError(
                f"the list '{name}' has {plural(names.count(column), 'column')} '{column}': rename all but "
                "one, or give another with --column"
            )
        raise ConfigError(f"the list '{name}'{lacks}: --column names that of the paths")
