"""Where a data set in Pascal VOC's layout has its files, and which XML file is of which image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from asag_deploy.errors import DataError
from asag_deploy.images.file_names import alike, meant_names
from asag_deploy.images.sources import IMAGE_SUFFIXES
from asag_evaluation.data.image_files import is_file
from asag_evaluation.data.written import Remarks

TRAIN_PART = "train"
"""The list that is taken if none is named."""

_ANNOTATIONS = "Annotations"
_IMAGES = ("JPEGImages", "images")
_SETS, _MAIN = "ImageSets", "Main"
_USUAL = (TRAIN_PART, "val", "trainval", "test")


class VocLayout:
    """The files of a data set; raises DataError for a folder that is none.

    Folders and files are known by their names in large and small letters.  An XML file is of the image that
    has its name with another ending, or of the one whose whole name it has (`a.jpg.xml`).
    """

    def __init__(self, data: Path) -> None:
        self.data = data
        if not data.is_dir():
            raise DataError(f"there is no data set '{data}': check the path, and give its folder")
        found = next((place for place in (*_folders(data, _ANNOTATIONS), data) if _xml_files(place)), None)
        if found is None:
            raise DataError(f"'{data}' has no XML files, in '{_ANNOTATIONS}' or by themselves{_below(data)}")
        self.annotations = found
        self.xml_files = _xml_files(found)
        """All of them, sorted."""
        self.images = _image_folder(data, found)
        self._pictures = _images(self.images)
        self._xmls = _pairs(self._pictures, self.xml_files)
        self._sharing = Counter(xml for xmls in self._xmls.values() for xml in xmls)
        self._alike: dict[str, list[Path]] = {}
        for picture in self._pictures:
            for key in {alike(picture.stem), alike(picture.name)}:
                self._alike.setdefault(key, []).append(picture)

    def xml(self, image: Path) -> Path | None:
        """Return the XML file of an image, if there is one; DataError unless they are each other's alone."""
        found = self._xmls.get(image, [])
        if len(found) > 1:
            raise DataError(
                f"'{found[0]}' and '{found[1].name}' may both be of '{image}': remove one of them"
            )
        if found and self._sharing[found[0]] > 1:
            other = next(path for path, xmls in self._xmls.items() if path != image and found[0] in xmls)
            raise DataError(
                f"'{image}' and '{other.name}' would share the file '{found[0].name}': remove one"
            )
        return found[0] if found else None

    def part(self, part: str | None) -> str | None:
        """Return the list that is taken: the one that is named, `train`, or None where there are no lists."""
        if self._lists() is not None:
            return part or TRAIN_PART
        if part is not None:
            raise DataError(
                f"'{self.data}' has no lists in '{_SETS}/{_MAIN}': leave --part {part} out to take all"
            )
        return None

    def pictures(self, part: str | None, remarks: Remarks) -> list[Path]:
        """Return the images of a list, in its order, or all of them for None."""
        owned = {xml for xmls in self._xmls.values() for xml in xmls}
        for xml in self.xml_files:
            if xml not in owned:
                remarks.note("orphan", f"'{xml}'")
        for inner in sorted(self.images.iterdir()):
            if part is None and not inner.name.startswith(".") and inner.is_dir() and _images(inner):
                remarks.note("inner", f"'{inner}'")
        lists = self._lists()
        if part is None or lists is None:
            return self._pictures
        return list(self._listed(lists, part, remarks))

    def _lists(self) -> Path | None:
        """Return the folder of lists: `ImageSets/Main`, or `ImageSets` where tools write them there."""
        sets = _folders(self.data, _SETS)
        places = [*(main for folder in sets for main in _folders(folder, _MAIN)), *sets]
        return next((place for place in places if any(place.glob("*.txt"))), None)

    def _listed(self, lists: Path, part: str, remarks: Remarks) -> Iterator[Path]:
        file = lists / f"{part}.txt"
        if not is_file(file):
            stems = {path.stem for path in lists.glob("*.txt")}
            found = [*(name for name in _USUAL if name in stems), *sorted(stems - {*_USUAL})]
            raise DataError(f"there is no list '{file}'; its lists are {', '.join(found[:10])}")
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"'{file}' cannot be read as text: {error}") from None
        seen: set[Path] = set()
        for count, line in enumerate(lines, start=1):
            name = line.strip()
            if not name:
                continue
            where = f"line {count} of '{file}'"
            image = self._meant(name, where)
            if image in seen:
                remarks.note("listed twice", where)
                continue
            seen.add(image)
            yield image
        if not seen:
            raise DataError(f"'{file}' lists no images")

    def _meant(self, name: str, where: str) -> Path:
        """Return the image that a list names, with or without how its file's name ends, or with folders."""
        for meant in meant_names(name):
            for candidate in (meant, meant.rpartition(".")[0]):
                found = self._alike.get(alike(candidate), [])
                found = [path for path in found if candidate in (path.stem, path.name)] or found
                if len(found) > 1:
                    raise DataError(
                        f"{where} names the image {name!r:.100}, which may be '{found[0]}' and "
                        f"'{found[1].name}', which would share '{found[0].stem}.xml': remove one of them"
                    )
                if found:
                    return found[0]
        of_class = "; a list with -1, 0 or 1 behind the names is of one class: take the list of all"
        more = of_class if name.split()[-1] in ("-1", "0", "1") and len(name.split()) > 1 else ""
        raise DataError(f"{where} names the image {name!r:.100}, which is not in '{self.images}'{more}")


def _image_folder(data: Path, annotations: Path) -> Path:
    """Return the first folder that has images; raises DataError if none has."""
    places = [*(folder for name in _IMAGES for folder in _folders(data, name)), annotations]
    found = next((place for place in (*places, data) if _images(place)), None)
    if found is not None:
        return found
    here = data.absolute()
    more = f"; give '{here.parent}', the folder above" if alike(here.name) == alike(_ANNOTATIONS) else ""
    raise DataError(f"there are no images in '{places[0]}', for the XML files of '{data}'{more}")


def _folders(data: Path, name: str) -> list[Path]:
    """Return the folders of a name, in whatever letters; the one that is spelled exactly so first."""
    found = (path for path in data.iterdir() if alike(path.name) == alike(name) and path.is_dir())
    return sorted(found, key=lambda path: (path.name != name, path.name))


def _files(folder: Path, suffixes: Iterable[str]) -> list[Path]:
    found = (path for path in folder.iterdir() if path.suffix.lower() in suffixes)
    return sorted(path for path in found if not path.name.startswith(".") and is_file(path))


def _xml_files(folder: Path) -> list[Path]:
    return _files(folder, (".xml",))


def _images(folder: Path) -> list[Path]:
    return _files(folder, IMAGE_SUFFIXES)


def _pairs(images: Sequence[Path], xmls: Sequence[Path]) -> Mapping[Path, list[Path]]:
    """Return the XML files that may be of each image: those of exactly its name, else those of one alike."""
    pairs: dict[Path, list[Path]] = {}
    taken: set[Path] = set()
    for spelled in (str, alike):
        free: dict[str, list[Path]] = {}
        for image in images:
            if image not in pairs:
                for key in {spelled(image.stem), spelled(image.name)}:
                    free.setdefault(key, []).append(image)
        for xml in xmls:
            for image in () if xml in taken else free.get(spelled(xml.stem), ()):
                pairs.setdefault(image, []).append(xml)
                taken.add(xml)
    return pairs


def _below(data: Path) -> str:
    """Return which folders below are meant, where that is plain."""
    inner = [path for path in sorted(data.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    inner += [path for folder in inner for path in sorted(folder.iterdir()) if path.is_dir()]
    found = [folder for folder in inner if _is_data_set(folder)]
    if not found:
        return ": check the path"
    if len(found) == 1:
        return f"; give '{found[0]}', which has some"
    return (
        f"; {', '.join(repr(str(path)) for path in found[:5])} have some: convert each, with a --split of "
        "its own, such as val2017, and the same --classes"
    )


def _is_data_set(folder: Path) -> bool:
    with_xml = [place for place in (*_folders(folder, _ANNOTATIONS), folder) if _xml_files(place)]
    places = [*(place for name in _IMAGES for place in _folders(folder, name)), folder, *with_xml]
    return bool(with_xml) and any(map(_images, places))
