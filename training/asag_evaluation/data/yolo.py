"""A data set in YOLO layout: `data.yaml`, folders of images, and beside each a folder of labels; as COCO.

A label file has a row for each object: its class, and the centre, width and height of its box, relative to
the picture; or its class and the corners of its outline.  Pictures are taken upright, as YOLO's tools read
them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asag_deploy.atomic import atomic_write_text
from asag_deploy.errors import BackendError, DataError, ImageError, plural
from asag_deploy.extras import missing
from asag_deploy.images.reading import read_image
from asag_deploy.images.sources import IMAGE_SUFFIXES
from asag_evaluation.data.image_files import is_file, stored_size
from asag_evaluation.data.written import Converted, Remarks, check_ours, link_images

PARTS = ("train", "val", "test")
"""The keys of `data.yaml` that name images."""
DESCRIPTION = "converted from YOLO's layout"

_NAMES = ("data.yaml", "dataset.yaml", "data.yml", "dataset.yml")
_Shown = Callable[[Path], Path]
_LONGEST_NUMBER = 10
_FARTHEST = 2.0
"""A relative coordinate beyond this is none, but one in pixels."""


@dataclass(frozen=True, kw_only=True)
class YoloDataset:
    """What a `data.yaml` says."""

    file: Path
    classes: tuple[str, ...]
    """Names by the number that stands in the rows."""
    parts: Mapping[str, tuple[str, ...]]
    """By part, the folders of images and files that list some, as they are written."""
    root: Path
    """Where they are looked for first."""
    keypoints: int = 0
    """Values of keypoints that follow a box in its row."""


_ODDITIES = {
    "unlabelled": ("image", "{n} without a label file, taken as background (the first is {first})"),
    "empty": ("label file", "{n} without a row, taken as background (the first is {first})"),
    "orphan": ("label file", "{n} without an image, passed over (the first is {first})"),
    "shared": (
        "image",
        "{n} with the label file of another, whose objects it got as well (the first is {first})",
    ),
    "no path": (
        "folder",
        "`path` in data.yaml is {first}, which is not there: images are looked for beside data.yaml",
    ),
    "outline": ("outline", "{n} instead of boxes, whose boxes were taken (the first is {first})"),
    "clipped": ("row", "{n} with a box reaching beyond the picture, clipped to it (the first is {first})"),
    "outside": ("row", "{n} with a box wholly outside the picture, left out (the first is {first})"),
    "flat": ("row", "{n} with a box without width or height, left out (the first is {first})"),
    "repeated": ("row", "{n} standing in a file twice, taken once (the first is {first})"),
    "listed twice": ("image", "{n} listed more than once, taken once (the first is {first})"),
    "turned": (
        "photograph",
        "{n} with an orientation, taken upright as YOLO's tools do (the first is {first})",
    ),
}


def convert_yolo(
    data: Path,
    output_dir: Path,
    *,
    part: str,
    split: str,
    progress: Callable[[int], object] = lambda done: None,
) -> Converted:
    """Write `output_dir/annotations/instances_{split}.json` of a part of a data set in YOLO layout.

    data: its folder, or its `data.yaml`; part: `train`, `val` or `test`.  `output_dir/split` leads to
    the images of the part (see `link_images`).  Image ids are numbered from 1 in the order of the files'
    names, or of the list; the id of a class is its number and 1.  Raises DataError for what is missing or
    malformed, OutputError if nothing can be written, BackendError without PyYAML.
    """
    file = output_dir / "annotations" / f"instances_{split}.json"
    check_ours(file, DESCRIPTION)
    dataset = read_yaml(data)
    remarks = Remarks(_ODDITIES)
    shown = _as_written(dataset.file)
    if not dataset.root.is_dir():
        remarks.note("no path", f"'{dataset.root}'")
    paths = list(_images(dataset, part, remarks))
    labels = [label_file(path) for path in paths]
    if not any(is_file(label) for label in labels):
        raise DataError(
            f"none of the {plural(len(paths), 'image')} of '{part}' in '{dataset.file}' has a label file "
            f"(looked for '{shown(labels[0])}'): put them into a folder 'labels' beside 'images'"
        )
    _note_shared(paths, labels, remarks, shown)
    _note_orphans(labels, remarks, shown)
    folder = Path(paths[0]).parent if len(paths) == 1 else _common_folder(paths)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (path, label) in enumerate(zip(paths, labels, strict=True), start=1):
        height, width = _size(path, dataset.file, remarks, shown)
        name = path.relative_to(folder).as_posix()
        images.append({"id": number, "file_name": name, "height": height, "width": width})
        for class_number, (x1, y1, x2, y2) in _objects(label, path, dataset, remarks, shown):
            x, y, w, h = x1 * width, y1 * height, (x2 - x1) * width, (y2 - y1) * height
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": class_number + 1,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                }
            )
        progress(number)
    content = {
        "info": {"description": f"'{part}' of '{dataset.file.name}', {DESCRIPTION}"},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in enumerate(dataset.classes, start=1)],
    }
    link_images(output_dir / split, shown(folder), (image["file_name"] for image in images))
    atomic_write_text(file, json.dumps(content))
    return Converted(file=file, remarks=tuple(remarks.sentences()))


def read_yaml(data: Path) -> YoloDataset:
    """Read the `data.yaml` of a data set, given that or its folder.

    Raises DataError if there is none, or it is malformed, BackendError without PyYAML.
    """
    file = _yaml_file(data)
    content = load_yaml(file)
    if not isinstance(content, dict):
        raise DataError(f"'{file}' is not the description of a YOLO data set: it holds no keys")
    classes = _classes(content, file)
    root = content.get("path") or "."
    if not isinstance(root, str):
        raise DataError(f"`path` in '{file}' is {root!r:.60}, expected the folder of the data set")
    parts: dict[str, tuple[str, ...]] = {}
    for part in PARTS:
        given = content.get(part)
        listed = [given] if isinstance(given, str) else given
        if not listed:
            continue
        if not isinstance(listed, list) or not all(isinstance(entry, str) and entry for entry in listed):
            raise DataError(
                f"`{part}` in '{file}' is {given!r:.60}, expected a folder of images, a file that lists "
                "them, or a list of such"
            )
        parts[part] = tuple(listed)
    keypoints = content.get("kpt_shape") or (0, 0)
    if not isinstance(keypoints, (list, tuple)) or not all(type(n) is int and n >= 0 for n in keypoints):
        raise DataError(f"`kpt_shape` in '{file}' is {keypoints!r:.60}, expected how many and their values")
    return YoloDataset(
        file=file,
        classes=classes,
        parts=parts,
        root=file.parent / root,
        keypoints=math.prod(keypoints),
    )


def load_yaml(file: Path) -> Any:
    """Read a YAML file; raises DataError if it cannot be read or is none, BackendError without PyYAML."""
    try:
        import yaml
    except ImportError as error:
        raise BackendError(missing(error, "asag-data", purpose=f"reading '{file}'")) from None
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"'{file}' cannot be read: {error}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        said = " ".join(str(error).split())
        raise DataError(f"'{file}' is no YAML: {said:.200}") from None


def label_file(image: Path) -> Path:
    """Return the label file of an image: the last folder `images` above it becomes `labels`, or beside it."""
    parts = list(image.parts)
    for i in range(len(parts) - 2, -1, -1):
        if parts[i] == "images":
            parts[i] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def _as_written(file: Path) -> _Shown:
    """Return what writes a path for people as `file` is: from the working directory, or from the root."""
    here = Path.cwd()

    def shown(path: Path) -> Path:
        from_here = not file.is_absolute() and path.is_relative_to(here)
        return path.relative_to(here) if from_here else path

    return shown


def _yaml_file(data: Path) -> Path:
    if is_file(data):
        return data
    if not data.is_dir():
        raise DataError(f"there is no data set '{data}': check the path")
    found = next((data / name for name in _NAMES if is_file(data / name)), None)
    if found is not None:
        return found
    others = sorted([*data.glob("*.yaml"), *data.glob("*.yml")])
    if len(others) == 1:
        return others[0]
    has = f"it holds {', '.join(path.name for path in others[:5])}: give one of them" if others else (
        "expected data.yaml, with the names of the classes and the folders of the images"
    )  # fmt: skip
    raise DataError(f"'{data}' has no data.yaml; {has}")


def _classes(content: Mapping[str, Any], file: Path) -> tuple[str, ...]:
    names = content.get("names")
    if isinstance(names, dict):
        names = {_number(key): name for key, name in names.items()}
        if sorted(names, key=str) != sorted(range(len(names)), key=str):
            raise DataError(
                f"the keys of `names` in '{file}' are not 0, 1, 2 and so on: number the classes so"
            )
        names = [names[i] for i in range(len(names))]
    if names is None:
        raise DataError(f"'{file}' has no `names`: list there what the classes are called")
    if not isinstance(names, list) or not names or any(isinstance(name, (dict, list)) for name in names):
        raise DataError(f"`names` in '{file}' is {names!r:.60}, expected the names of the classes")
    odd = next((i for i, name in enumerate(names) if name is None or isinstance(name, bool)), None)
    if odd is not None:
        raise DataError(
            f"YAML reads the name of class {odd} in '{file}' as {names[odd]!r:.60}, which is no text: put it "
            "between quotes"
        )
    classes = tuple(" ".join(str(name).split()) for name in names)
    if not all(classes):
        raise DataError(f"class {classes.index('')} in '{file}' has no name: give it one")
    twice = next((name for i, name in enumerate(classes) if name in classes[:i]), None)
    if twice is not None:
        raise DataError(f"two classes in '{file}' are called '{twice}': give each a name of its own")
    count = _number(content.get("nc", len(classes)))
    if count != len(classes):
        raise DataError(
            f"'{file}' gives {count!r:.60} as the number of classes (nc), but names {len(classes)}"
        )
    return classes


def _number(given: Any) -> Any:
    """Return a number that was put between quotes; anything else as it is."""
    is_digits = isinstance(given, str) and given.isascii() and given.isdecimal()
    return int(given) if is_digits and len(given) < _LONGEST_NUMBER else given


def _images(dataset: YoloDataset, part: str, remarks: Remarks) -> Iterator[Path]:
    """Yield the images of a part, each once, as absolute paths; raise DataError if there are none."""
    if part not in dataset.parts:
        has = f"it has {', '.join(dataset.parts)}" if dataset.parts else "it has none"
        raise DataError(f"there is no part '{part}' in '{dataset.file}'; {has}")
    seen: set[Path] = set()
    for entry in dataset.parts[part]:
        place = _place(dataset, entry)
        if place is None:
            raise DataError(
                f"'{dataset.root / entry}', which is `{part}` in '{dataset.file}', is not there: check "
                f"`path` and `{part}` in that file{_backslashes(f'{dataset.root}{entry}')}"
            )
        found = _listed(place, dataset) if is_file(place) else _in_folder(place)
        for path in found:
            absolute = Path(path).absolute()
            if absolute in seen:
                remarks.note("listed twice", f"'{path}'")
                continue
            seen.add(absolute)
            yield absolute
    if not seen:
        raise DataError(f"there are no images of '{part}' in '{dataset.file}': looked for them in "
                        f"'{dataset.root / dataset.parts[part][0]}'")  # fmt: skip


def _place(dataset: YoloDataset, entry: str) -> Path | None:
    """Find a folder or a file that is named in `data.yaml`; some tools write one `../` too many."""
    bare = entry
    while bare.startswith("../"):
        bare = bare.removeprefix("../")
    roots = (dataset.root, dataset.file.parent)
    candidates = [root / name for name in (entry, bare) for root in roots]
    return next((path for path in candidates if path.is_dir() or is_file(path)), None)


def _backslashes(text: str) -> str:
    """Return what to say of a path that was written on Windows."""
    return "; write / instead of \\ between folders" if "\\" in text else ""


def _in_folder(folder: Path) -> list[Path]:
    found = (path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    return sorted(path for path in found if not path.name.startswith(".") and is_file(path))


def _listed(file: Path, dataset: YoloDataset) -> Iterator[Path]:
    """Yield the images that a file lists; raise DataError if one of them is not there."""
    for number, line in enumerate(_lines(file), start=1):
        if not line:
            continue
        candidates = (file.parent / line, dataset.root / line)
        found = next((path for path in candidates if is_file(path)), None)
        if found is None:
            raise DataError(
                f"line {number} of '{file}' names the image '{line}', which is not there{_backslashes(line)}"
            )
        yield found


def _lines(file: Path) -> list[str]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"'{file}' cannot be read as text: {error}") from None
    return [line.strip() for line in text.splitlines()]


def _note_shared(paths: Sequence[Path], labels: Sequence[Path], remarks: Remarks, shown: _Shown) -> None:
    """Note images that differ only in how their names end, such as x.jpg and x.png."""
    seen: set[Path] = set()
    for path, label in zip(paths, labels, strict=True):
        if label in seen and is_file(label):
            remarks.note("shared", f"'{shown(path)}'")
        seen.add(label)


def _note_orphans(labels: Sequence[Path], remarks: Remarks, shown: _Shown) -> None:
    known = set(labels)
    for folder in sorted({label.parent for label in labels}):
        for path in sorted(folder.glob("*.txt")):
            if path not in known and path.name != "classes.txt":
                remarks.note("orphan", f"'{shown(path)}'")


def _common_folder(paths: Sequence[Path]) -> Path:
    """Return the deepest folder that holds all of them."""
    common = list(paths[0].parent.parts)
    for path in paths[1:]:
        while tuple(common) != path.parts[: len(common)]:
            common.pop()
    return Path(*common)


def _size(image: Path, file: Path, remarks: Remarks, shown: _Shown) -> tuple[int, int]:
    """Return height and width of an image once it is upright."""
    size = stored_size(image)
    if size is not None:
        if size.orientation != 1:
            remarks.note("turned", f"'{shown(image)}'")
        return size.upright
    try:
        height, width = read_image(shown(image)).shape[:2]
    except ImageError as error:
        raise DataError(f"{error} (an image of '{file}')") from error
    return height, width


def _objects(
    label: Path, image: Path, dataset: YoloDataset, remarks: Remarks, shown: _Shown
) -> Iterator[tuple[int, tuple[float, float, float, float]]]:
    """Yield class number and box (x1, y1, x2, y2, from 0 to 1, clipped to the picture) of each object."""
    if not is_file(label):
        remarks.note("unlabelled", f"'{shown(image)}'")
        return
    label = shown(label)
    rows = [(number, line) for number, line in enumerate(_lines(label), start=1) if line]
    if not rows:
        remarks.note("empty", f"'{label}'")
    seen: set[tuple[float, ...]] = set()
    for number, line in rows:
        where = f"line {number} of '{label}'"
        values = _numbers(line, where)
        if values in seen:
            remarks.note("repeated", where)
            continue
        seen.add(values)
        x1, y1, x2, y2 = _box(values, dataset, where, remarks)
        if not (x2 > x1 and y2 > y1):
            remarks.note("flat", where)
        elif x2 <= 0 or y2 <= 0 or x1 >= 1 or y1 >= 1:
            remarks.note("outside", where)
        else:
            inside = (max(x1, 0.0), max(y1, 0.0), min(x2, 1.0), min(y2, 1.0))
            if _is_beyond((x1, y1, x2, y2)):
                remarks.note("clipped", where)
            yield _class(values[0], dataset, where), inside


def _is_beyond(box: Sequence[float]) -> bool:
    """Tell whether a box reaches beyond its picture by more than its tool rounded, of six digits."""
    return any(value < -2e-6 or value > 1 + 2e-6 for value in box)


def _numbers(line: str, where: str) -> tuple[float, ...]:
    try:
        values = tuple(float(word) for word in line.split())
    except ValueError:
        values = (math.nan,)
    if not all(math.isfinite(value) for value in values):
        raise DataError(f"{where} is {line!r:.60}, expected a class and numbers with spaces between them")
    return values


def _box(
    values: tuple[float, ...], dataset: YoloDataset, where: str, remarks: Remarks
) -> tuple[float, float, float, float]:
    """Return the box x1, y1, x2, y2 of a row, relative to the picture."""
    count = len(values) - 1
    _class(values[0], dataset, where)
    if count not in (4, 4 + dataset.keypoints) and (count < 6 or count % 2 or dataset.keypoints):
        more = "; with one more, a confidence, they are a detector's results" if count == 5 else ""
        raise DataError(
            f"{where} has {plural(count, 'number')} after the class, expected 4 (centre, width and height), "
            f"or the corners of an outline, two each{more}"
        )
    wanted = values[1:] if count != 4 + dataset.keypoints else values[1:5]
    far = next((value for value in wanted if abs(value) > _FARTHEST), None)
    if far is not None:
        raise DataError(
            f"{where} has the number {far:g}, expected from -{_FARTHEST:g} to {_FARTHEST:g}: YOLO's boxes "
            "are relative to their picture, which is 0 to 1"
        )
    if len(wanted) == 4:
        x, y, w, h = wanted
        return x - w / 2, y - h / 2, x + w / 2, y + h / 2
    remarks.note("outline", where)
    return min(wanted[::2]), min(wanted[1::2]), max(wanted[::2]), max(wanted[1::2])


def _class(value: float, dataset: YoloDataset, where: str) -> int:
    if not value.is_integer() or not 0 <= value < len(dataset.classes):
        raise DataError(
            f"{where} is of class {value:g}, but '{dataset.file}' names the classes 0 to "
            f"{len(dataset.classes) - 1}"
        )
    return int(value)
