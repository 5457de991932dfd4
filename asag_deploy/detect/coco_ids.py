"""Image and category ids of COCO results: those of an annotation file, or a word on how they were made."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from asag_deploy.bundle.manifest import Category
from asag_deploy.errors import ConfigError
from asag_deploy.images.file_names import alike, meant_names, said_name
from asag_deploy.images.sources import Source
from asag_deploy.plain_numbers import unsigned

ImageId = int | str
"""As an annotation file writes it; pycocotools compares it with that."""


@dataclass(frozen=True, kw_only=True)
class CocoIds:
    """The ids that results are written with."""

    images: dict[Source, ImageId]
    """Sources that have an id of their own."""
    counted: bool
    """Whether all others are numbered from 1 in the order they are read, instead of having no id."""
    categories: dict[int, ImageId] | None = None
    """The file's id of each of the bundle's category ids; None: the bundle's are written."""
    incomplete: bool = False
    """Whether there are sources that get no results."""
    said: tuple[str, ...] = ()
    """What the user should know, one sentence each."""

    def image(self, source: Source, number: int) -> ImageId | None:
        """Return the id of an image at position `number` (from 0) of the stream; None if it has none."""
        return self.images.get(source, number + 1 if self.counted else None)


def made_ids(sources: Sequence[Source]) -> CocoIds:
    """Take the numbers that all file names are (000000000139.jpg is 139), if no two are the same; else count.

    `said` tells which of the two was done.
    """
    stems = [Path(source.name).stem for source in sources]
    are_images = all(source.kind == "image" for source in sources)
    numbers = {
        source: number
        for source, stem in zip(sources, stems, strict=True)
        if are_images and (number := unsigned(stem)) is not None
    }
    remedy = "--coco-annotations FILE takes them from an annotation file"
    if len(numbers) == len(set(numbers.values())) == len(sources):
        said = f"image ids are the numbers that the file names are; {remedy}"
        return CocoIds(images=dict(numbers), counted=False, said=(said,))
    said = f"image ids count the images from 1 in the order they are read; {remedy}"
    return CocoIds(images={}, counted=True, said=(said,))


def annotated_ids(file: Path, sources: Sequence[Source], categories: Sequence[Category]) -> CocoIds:
    """Take ids from an annotation file: of images by `file_name`, of categories by name.

    An image is found by its path, as far as `file_name` goes, else by its base name where only one image of
    the file has that.  Images that are not listed get no id, nor do categories that the file does not know;
    `said` counts them.  Raises ConfigError for what is no annotation file, for two images that are alike, and
    if no image or no category is found.
    """
    content = _read(file)
    known = _Names(file, content["images"])
    ids: dict[Source, ImageId] = {}
    missing = []
    for source in sources:
        found = known.find(source) if source.kind == "image" else None  # an id is one picture's
        if found is None:
            missing.append(source)
        else:
            ids[source] = found
    if not ids:
        raise ConfigError(f"'{file}' lists none of the {len(sources)} sources, {_beginning(missing)}")
    _refuse_twice(file, ids)
    said = []
    if missing:
        said.append(
            f"{len(missing)} of {len(sources)} sources are not listed in '{file}', {_beginning(missing)}: "
            "they get no COCO results"
        )
    mapping, unknown = _categories(file, content, categories)
    if unknown:
        said.append(
            f"{len(unknown)} of the bundle's {len(categories)} classes are not in '{file}', such as "
            f"'{unknown[0]}': they get no COCO results"
        )
    return CocoIds(images=ids, counted=False, categories=mapping, incomplete=bool(missing), said=tuple(said))


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(f"the annotation file '{file}' cannot be read: {reason}") from None
    except (ValueError, RecursionError):
        raise ConfigError(f"'{file}' is no annotation file: it does not hold JSON") from None
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise ConfigError(f"'{file}' is no COCO annotation file: it has no list 'images'")
    return content


class _Names:
    """The images of an annotation file by the parts of their names."""

    def __init__(self, file: Path, images: Sequence[Any]) -> None:
        self._file = file
        self._images = [self._image(index, image) for index, image in enumerate(images)]
        self._exact = _Index((_parts(name), number) for name, number in self._images)

    def find(self, source: Source) -> ImageId | None:
        """Return the id of the image that a source is, or None; ConfigError if it could be several."""
        parts = _parts(str(Path(source.name).absolute()))
        found = self._exact.find(parts) or self._alike.find(_alike_parts("/".join(parts)))
        if len(found) > 1:
            first, second, *_ = sorted(found, key=str)
            raise ConfigError(
                f"'{source.name}' could be any of {len(found)} images of '{self._file}' (ids {first}, "
                f"{second}): name its file with the folders that 'file_name' has"
            )
        return next(iter(found), None)

    def _image(self, index: int, image: Any) -> tuple[str, ImageId]:
        name = said_name(image) if isinstance(image, dict) else ""
        if not name:
            raise ConfigError(f"'{self._file}': images[{index}] has no 'file_name'")
        number = _id_of(image)
        if number is None:
            raise ConfigError(f"'{self._file}': images[{index}], '{name}', has no 'id' that is a number")
        return name, number

    @cached_property
    def _alike(self) -> _Index:
        """The images by all that may be meant by their names, for those that are not called so exactly."""
        spelled = (
            ({_alike_parts(meant) for meant in meant_names(name)}, number) for name, number in self._images
        )
        return _Index((parts, number) for meant, number in spelled for parts in meant)


class _Index:
    """Ids by path, and by base name."""

    def __init__(self, images: Iterable[tuple[tuple[str, ...], ImageId]]) -> None:
        self._by_path: dict[tuple[str, ...], set[ImageId]] = defaultdict(set)
        self._by_name: dict[str, set[ImageId]] = defaultdict(set)
        for parts, number in images:
            if parts:
                self._by_path[parts].add(number)
                self._by_name[parts[-1]].add(number)

    def find(self, parts: tuple[str, ...]) -> set[ImageId]:
        """Return the ids of a path as far as it goes, else of its base name."""
        tails = (parts[start:] for start in range(len(parts)))
        found = next((self._by_path[tail] for tail in tails if tail in self._by_path), None)
        return found or self._by_name.get(parts[-1], set())


def _id_of(entry: Any) -> ImageId | None:
    """Return the id of an entry, a whole number also where it is written as 12.0; None if it has none."""
    number = entry.get("id") if isinstance(entry, dict) else None
    if isinstance(number, float) and number.is_integer():
        return int(number)
    return number if isinstance(number, int | str) and not isinstance(number, bool) else None


def _parts(name: str) -> tuple[str, ...]:
    """Return the parts of a path, whichever way its slashes lean."""
    path = name if name.startswith("/") else name.replace("\\", "/")
    return tuple(part for part in PurePosixPath(path).parts if part not in ("/", "."))


def _alike_parts(name: str) -> tuple[str, ...]:
    return _parts(alike(name))


def _refuse_twice(file: Path, ids: dict[Source, ImageId]) -> None:
    taken: dict[ImageId, Source] = {}
    for source, number in ids.items():
        if number in taken:
            raise ConfigError(
                f"'{taken[number].name}' and '{source.name}' would both be image {number} of '{file}': "
                "detect in one of them only"
            )
        taken[number] = source


def _categories(
    file: Path, content: Mapping[str, Any], categories: Sequence[Category]
) -> tuple[dict[int, ImageId] | None, list[str]]:
    """Return the file's id of each of the bundle's, and the names that it does not know.

    Of several of one name those count that have objects: Roboflow lists the project's name as a class too.
    """
    listed = content.get("categories")
    if not isinstance(listed, list) or not listed:
        return None, []
    by_name: dict[str, set[ImageId]] = defaultdict(set)
    for index, entry in enumerate(listed):
        name = entry.get("name") if isinstance(entry, dict) else None
        number = _id_of(entry)
        if not isinstance(name, str) or number is None:
            raise ConfigError(f"'{file}': categories[{index}] has no 'name' and 'id'")
        by_name[_plain(name)].add(number)
    used = _used_categories(content.get("annotations"))
    mapping = {}
    for one in categories:
        if found := by_name.get(_plain(one.name)):
            mapping[one.id] = _only_category(file, one, (found & used) or found)
    unknown = [one.name for one in categories if one.id not in mapping]
    if not mapping:
        raise ConfigError(
            f"'{file}' knows none of the bundle's {len(categories)} classes by name, such as '{unknown[0]}': "
            "it belongs to another data set"
        )
    return mapping, unknown


def _used_categories(annotations: Any) -> set[ImageId]:
    entries = annotations if isinstance(annotations, list) else []
    said = (entry.get("category_id") for entry in entries if isinstance(entry, dict))
    return {number for number in said if isinstance(number, int | str)}


def _only_category(file: Path, category: Category, found: set[ImageId]) -> ImageId:
    """Return the id of those of its name that is its own, else the only one."""
    if category.id in found:
        return category.id
    first, *others = found
    if others:
        raise ConfigError(
            f"'{file}': two categories are called '{category.name}', so classes cannot be told apart"
        )
    return first


def _plain(name: str) -> str:
    return " ".join(name.split()).casefold()


def _beginning(sources: Sequence[Source]) -> str:
    return f"beginning with '{sources[0].name}'"
