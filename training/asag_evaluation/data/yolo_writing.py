"""A data set in COCO layout, written in YOLO's: `data.yaml`, links to the images, and labels beside them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from asag_deploy.atomic import atomic_directory, atomic_write_text
from asag_deploy.errors import DataError, OutputError, plural
from asag_evaluation.data.coco import CocoDataset
from asag_evaluation.data.image_files import stored_size
from asag_evaluation.data.written import Converted, link_images
from asag_evaluation.data.yolo import PARTS, load_yaml

_YAML = "data.yaml"
_OURS = "# Written by asag-data to-yolo"
_MARKER = ".asag-data"

_TURNS: dict[int, tuple[tuple[int, int], tuple[int, int]]] = {
    1: ((0, 1), (1, 1)),
    2: ((0, 1), (-1, 1)),
    3: ((0, 1), (-1, -1)),
    4: ((0, 1), (1, -1)),
    5: ((1, 0), (1, 1)),
    6: ((1, 0), (-1, 1)),
    7: ((1, 0), (-1, -1)),
    8: ((1, 0), (1, -1)),
}
"""By EXIF orientation: of which stored axis the upright x and y are, and whether they run along it (1) or
against it."""


def write_yolo(
    dataset: CocoDataset,
    output_dir: Path,
    *,
    split: str,
    part: str,
    progress: Callable[[int], object] = lambda done: None,
) -> Converted:
    """Write a data set in YOLO layout, and return its `data.yaml`.

    `output_dir/images/{split}` leads to these images alone, `output_dir/labels/{split}` holds the labels,
    and `data.yaml` names them as `part` (`train`, `val` or `test`), beside other parts that were written into
    the same folder before.  The number of a class is its place by id.  Crowds are left out, since YOLO knows
    none; boxes are clipped to their image, and turned with photographs that were annotated as they are
    stored, since YOLO's tools read all upright.

    Raises DataError if two images would share a label file or photographs contradict each other, OutputError
    if something else is there, BackendError without PyYAML where `data.yaml` is there already.
    """
    content = _yaml_content(output_dir / _YAML, dataset, split, part)
    _check_names(dataset)
    turned = _annotated_as_stored(dataset)
    labels = output_dir / "labels" / split
    with atomic_directory(labels, overwrite=True, marker=_MARKER, parts=("*.txt",)) as folder:
        (folder / _MARKER).touch()
        for number, record in enumerate(dataset.records, start=1):
            path = dataset.image_dir / record.file_name
            boxes = record.boxes.astype(np.float64) / np.tile([record.width, record.height], 2)
            if path in turned:
                boxes = upright_boxes(boxes, turned[path])
            file = folder / _label_name(record.file_name)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(_rows(boxes, record.labels)), encoding="utf-8")
            progress(number)
    names = (record.file_name for record in dataset.records)
    link_images(output_dir / "images" / split, dataset.image_dir, names)
    atomic_write_text(output_dir / _YAML, content)
    return Converted(file=output_dir / _YAML, remarks=tuple(_remarks(dataset, len(turned))))


def upright_boxes(boxes: NDArray[np.float64], orientation: int) -> NDArray[np.float64]:
    """Turn boxes (n, 4) x1, y1, x2, y2, from 0 to 1 of a stored picture, to the upright one."""
    axes, signs = _TURNS[orientation]
    corners = boxes.reshape(-1, 2, 2)[:, :, list(axes)]
    corners = np.where(np.array(signs) < 0, 1 - corners, corners)
    return np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)


def part_of(split: str) -> str:
    """Return the part that a split is by its name: `val2017` is `val`; `train` if its name does not tell."""
    return next((part for part in PARTS if split.lower().startswith(part)), PARTS[0])


def _rows(boxes: NDArray[np.float64], labels: NDArray[np.int64]) -> Iterator[str]:
    for (x1, y1, x2, y2), label in zip(boxes.tolist(), labels.tolist(), strict=True):
        yield f"{label} {(x1 + x2) / 2:.8f} {(y1 + y2) / 2:.8f} {x2 - x1:.8f} {y2 - y1:.8f}\n"


def _label_name(file_name: str) -> PurePosixPath:
    name = PurePosixPath(file_name)
    if name.is_absolute() or ".." in name.parts:
        raise DataError(f"image '{file_name}' does not lie in the folder of the images: move it there")
    return name.with_suffix(".txt")


def _check_names(dataset: CocoDataset) -> None:
    """Raise DataError if two images would share a label file, or one would look for it elsewhere."""
    names = [record.file_name for record in dataset.records]
    count = Counter(_label_name(name) for name in names)
    shared = next((name for name in names if count[_label_name(name)] > 1), None)
    if shared is not None:
        raise DataError(
            f"image '{shared}' and another differ in nothing but how their names end, and would share a "
            "label file: rename one of them"
        )
    inner = next((name for name in names if "images" in PurePosixPath(name).parts[:-1]), None)
    if inner is not None:
        raise DataError(
            f"image '{inner}' lies in a folder 'images' within the folder of the images, where YOLO's tools "
            "would look for its labels elsewhere: rename that folder"
        )


def _annotated_as_stored(dataset: CocoDataset) -> dict[Path, int]:
    """Return the EXIF orientation of those images that were annotated as they are stored."""
    survey = dataset.orientations()
    if survey.is_contradictory:
        raise DataError(f"in '{dataset.image_dir}', {survey.describe()}")
    open_too = survey.rule == "stored" or (survey.rule == "auto" and bool(survey.stored))
    found = {}
    for path in (*survey.stored, *(survey.open if open_too else ())):
        size = stored_size(path)
        if size is not None:
            found[path] = size.orientation
    return found


def _yaml_content(file: Path, dataset: CocoDataset, split: str, part: str) -> str:
    """Return `data.yaml`, with the parts that are in it already."""
    names = {label: category.name for label, category in enumerate(dataset.categories)}
    parts = {part: f"images/{split}"}
    if file.exists():
        content = load_yaml(file)
        ours = isinstance(content, dict) and file.read_text(encoding="utf-8").startswith(_OURS)
        if not ours or content.get("names") != names:
            what = "has other classes" if ours else "was not written by this"
            raise OutputError(f"there is a '{file}' already that {what}: choose another --output-dir")
        parts = {name: content[name] for name in PARTS if isinstance(content.get(name), str)} | parts
    # JSON's texts are YAML's, whatever a name holds.  Without `path`, parts lie beside this file.
    lines = [_OURS, *(f"{name}: {json.dumps(place)}" for name, place in parts.items()), "names:"]
    lines += [f"  {number}: {json.dumps(name)}" for number, name in names.items()]
    return "\n".join([*lines, ""])


def _remarks(dataset: CocoDataset, turned: int) -> Iterator[str]:
    if dataset.counts.crowd:
        yield f"{plural(dataset.counts.crowd, 'crowd annotation')} left out: YOLO's labels know no crowds"
    if dataset.counts.clipped:
        yield f"{plural(dataset.counts.clipped, 'object')} reaching beyond the picture, clipped to it"
    if turned:
        photographs = plural(turned, "photograph")
        yield f"boxes of {photographs} turned: annotated as stored, and YOLO's tools read upright"
