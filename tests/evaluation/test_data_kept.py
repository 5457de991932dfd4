"""Large annotation files: read once a machine, never stale, shared by processes that are handed them."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asag_deploy.errors import DataError
from asag_evaluation.data import compiled_annotations
from asag_evaluation.data.coco import CocoDataset
from support.annotation_workers import report, used
from support.coco_files import box, write_coco, write_json

BOXES = [box(1, [5, 6, 10, 20]), box(2, [1, 2, 30, 4], 7), box(2, [3, 3, 9, 9], iscrowd=1)]
Readings = list[str]


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Readings:
    """A cache of the test's own that keeps small files too; the names of the files that were read."""
    monkeypatch.setenv("ASAG_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(compiled_annotations, "LEAST_BYTES", 1)
    found: Readings = []
    read = compiled_annotations._read

    def noted(file: Any, path: Path, *others: Any) -> Any:
        found.append(path.name)
        return read(file, path, *others)

    monkeypatch.setattr(compiled_annotations, "_read", noted)
    return found


def contents(dataset: CocoDataset) -> tuple[Any, ...]:
    truth = json.dumps(dataset.ground_truth())
    boxes = [(record.boxes.tolist(), record.labels.tolist()) for record in dataset.records]
    return truth, boxes, dataset.counts, dataset.doubts, dataset.categories


def kept(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").rglob("*.blob"))


def test_a_file_is_read_once(tmp_path: Path, readings: Readings) -> None:
    write_coco(tmp_path / "data", BOXES, kinds=["large", "tiny"])
    first = CocoDataset.open(tmp_path / "data")
    again = CocoDataset.open(tmp_path / "data")
    assert contents(again) == contents(first)
    assert [record.kind for record in again.records] == ["large", "tiny"]
    assert (len(readings), len(kept(tmp_path))) == (1, 1)
    assert CocoDataset.open(tmp_path / "data", categories=first.categories[::-1])[0].labels.tolist() == [1]
    assert len(readings) == 1


def test_a_changed_file_is_read_anew_whatever_its_date_and_size(tmp_path: Path, readings: Readings) -> None:
    file = write_coco(tmp_path / "data", BOXES)
    CocoDataset.open(tmp_path / "data")
    state = file.stat()
    file.write_text(file.read_text().replace("[5, 6, 10, 20]", "[5, 6, 10, 21]"))
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert file.stat().st_size == state.st_size
    assert CocoDataset.open(tmp_path / "data")[0].boxes.tolist() == [[5, 6, 15, 27]]
    assert len(readings) == 2


def test_a_file_that_becomes_damaged_is_refused(tmp_path: Path, readings: Readings) -> None:
    file = write_coco(tmp_path / "data", BOXES)
    CocoDataset.open(tmp_path / "data")
    file.write_text(file.read_text()[:-1])
    with pytest.raises(DataError, match="is not valid JSON"):
        CocoDataset.open(tmp_path / "data")


def test_what_is_said_of_a_file_names_it(tmp_path: Path, readings: Readings) -> None:
    file = write_coco(tmp_path / "data", [box(99, [5, 6, 10, 20])])
    other = tmp_path / "other.json"
    shutil.copy(file, other)
    for path in (file, other, file):
        (doubt,) = CocoDataset.from_files(path, tmp_path / "data" / "train2017").doubts
        assert f"'{path}'" in doubt
    assert len(readings) == 2


def test_images_that_are_missing_are_missed(tmp_path: Path, readings: Readings) -> None:
    write_coco(tmp_path / "data", BOXES)
    CocoDataset.open(tmp_path / "data")
    (tmp_path / "data" / "train2017" / "2.png").rename(tmp_path / "data" / "train2017" / "3.png")
    with pytest.raises(DataError, match=r"1 of the 2 images .* are missing .* the first is '2\.png'"):
        CocoDataset.open(tmp_path / "data")


def test_names_and_sizes_that_depend_on_the_folder_are_not_kept(tmp_path: Path, readings: Readings) -> None:
    file = write_coco(tmp_path / "data", BOXES)
    pictures = tmp_path / "data" / "train2017"
    CocoDataset.open(tmp_path / "data")
    (pictures / "1.png").rename(pictures / "1.PNG")  # another file is meant, from now on
    assert CocoDataset.open(tmp_path / "data").records[0].file_name == "1.PNG"
    assert CocoDataset.open(tmp_path / "data").counts.names_found_otherwise == 1
    assert len(kept(tmp_path)) == 1
    (pictures / "1.PNG").rename(pictures / "1.png")
    content = json.loads(file.read_text())
    del content["images"][0]["height"]
    write_json(file, content)
    assert CocoDataset.open(tmp_path / "data").counts.sizes_from_files == 1
    assert len(kept(tmp_path)) == 1


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: data[:100] + b"x" + data[101:], lambda data: b""]
)
def test_what_was_kept_and_is_damaged_is_made_again(
    damage: Callable[[bytes], bytes], tmp_path: Path, readings: Readings
) -> None:
    write_coco(tmp_path / "data", BOXES)
    first = contents(CocoDataset.open(tmp_path / "data"))
    (file,) = kept(tmp_path)
    file.write_bytes(damage(file.read_bytes()))
    for _ in range(2):
        assert contents(CocoDataset.open(tmp_path / "data")) == first
    assert len(readings) == 2


def test_where_nothing_can_be_kept_it_is_read_each_time(
    tmp_path: Path, readings: Readings, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_coco(tmp_path / "data", BOXES)
    expected = contents(CocoDataset.open(tmp_path / "data"))
    (tmp_path / "file").touch()
    monkeypatch.setenv("ASAG_CACHE_DIR", str(tmp_path / "file"))
    for _ in range(2):
        assert contents(CocoDataset.open(tmp_path / "data")) == expected
    assert len(readings) == 3


def test_nothing_is_written_beside_the_data(tmp_path: Path, readings: Readings) -> None:
    write_coco(tmp_path / "data", BOXES)
    before = sorted((tmp_path / "data").rglob("*"))
    for folder in (tmp_path / "data", tmp_path / "data" / "annotations"):
        folder.chmod(0o555)
    CocoDataset.open(tmp_path / "data")
    assert sorted((tmp_path / "data").rglob("*")) == before


def test_small_files_are_not_kept(
    tmp_path: Path, readings: Readings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled_annotations, "LEAST_BYTES", 2**20)
    write_coco(tmp_path / "data", BOXES)
    CocoDataset.open(tmp_path / "data")
    assert kept(tmp_path) == []


def test_processes_that_begin_together_read_it_once(tmp_path: Path) -> None:
    write_coco(tmp_path / "data", BOXES * 2000)
    environment = {
        **os.environ,
        "ASAG_CACHE_DIR": str(tmp_path / "cache"),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [
        sys.executable,
        "-c",
        "from support.annotation_workers import main; main()",
        str(tmp_path / "data"),
    ]
    several = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    said = [json.loads(process.communicate()[0]) for process in several]
    assert [process.returncode for process in several] == [0] * 4
    assert len({each["checksum"] for each in said}) == 1
    assert sum(each["readings"] for each in said) == 1
    assert [path.suffix for path in (tmp_path / "cache" / "annotations").iterdir()] == [".blob"]


@pytest.mark.parametrize("is_kept", [True, False])
def test_a_worker_sees_the_memory_that_is_there(
    is_kept: bool, tmp_path: Path, readings: Readings, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_kept:
        monkeypatch.setattr(compiled_annotations, "LEAST_BYTES", 2**40)
    write_coco(tmp_path / "data", BOXES * 5000)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    dataset = CocoDataset.open(tmp_path / "data").for_training()
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)  # it stays while it is used
    context = multiprocessing.get_context("forkserver")
    here, there = context.Pipe()
    process = context.Process(target=report, args=(dataset, there))
    process.start()
    said = here.recv()
    process.join()
    assert said["checksum"] == used(dataset)
    assert said["mapped"] == ("annotations" if is_kept else "memfd:asag")
    assert said["own_kib"] == 0
    assert said["shared_kib"] > 500
    assert said["received_bytes"] < 5000


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda dataset: pickle.loads(pickle.dumps(dataset))])
def test_a_copy_holds_its_own(
    copied: Callable[[CocoDataset], CocoDataset], tmp_path: Path, readings: Readings
) -> None:
    write_coco(tmp_path, BOXES)
    dataset = CocoDataset.open(tmp_path).subset([1, 0])
    assert contents(copied(dataset)) == contents(dataset)
    assert np.array_equal(copied(dataset)[0].image, dataset[0].image)


def test_records_are_a_sequence(tmp_path: Path) -> None:
    write_coco(tmp_path, BOXES, shapes=((40, 60), (50, 50), (60, 30)))
    records = CocoDataset.open(tmp_path).records
    assert [record.image_id for record in records[::-1]] == [3, 2, 1]
    assert (records[-1].image_id, len(records[1:]), records[2].annotations) == (3, 2, ())
    assert records[1].annotations[1] == ((3, 3, 9, 9), 81, 0, True)
    assert records[1].boxes.tolist() == [[1, 2, 31, 6]]
    with pytest.raises(IndexError, match="no image 3 among 3"):
        records[3]
    with pytest.raises(ValueError, match="read-only"):
        records[0].boxes[0] = 0
