"""What detects in the pictures of a part: its results, and how it gives up a picture that kills it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from asag_deploy.batch.places import Place
from asag_deploy.batch.run import Identity, Run, open_run
from asag_deploy.batch.sources import find_sources
from asag_deploy.batch.worker import Plan, Worker, load_detector
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.detector_options import DetectorOptions
from asag_deploy.pipeline import ImageDetector
from support.batch_runs import make_pictures, parts, rows
from support.tiny_bundle import make_bundle

pytest.importorskip("pyarrow", reason="pyarrow is not installed")
pytest.importorskip("pandas", reason="pandas is not installed")


class Died(BaseException):
    """Stands for the end of the process."""


@contextmanager
def begun(tmp_path: Path, pictures: int) -> Iterator[tuple[Run, Plan]]:
    make_pictures(tmp_path / "a", pictures)
    bundle = make_bundle(tmp_path / "bundle")
    place = Place(str(tmp_path / "out"))
    of = Identity(bundle=bundle.fingerprint, options={}, sources=find_sources([str(tmp_path / "a")]))
    with open_run(place, of) as run:
        yield run, _plan(run, bundle)


def _plan(run: Run, bundle: Bundle, attempt: str = "first") -> Plan:
    return Plan(
        place=run.place,
        key=run.key,
        attempt=attempt,
        bundle=bundle.path,
        fingerprint=bundle.fingerprint,
        detector=DetectorOptions(threads=1),
        threshold=0.3,
        batch=1,
    )


def dying(at_width: int) -> Callable[[Plan], ImageDetector]:
    """Load a detector that ends the process at pictures of one width."""

    def load(plan: Plan) -> ImageDetector:
        detector: Any = load_detector(plan)

        class Dying:
            manifest = detector.manifest
            requests = 1

            def __call__(self, images: list[Any], **options: Any) -> Any:
                if any(image.shape[1] == at_width for image in images):
                    raise Died
                return detector(images, **options)

        return Dying()

    return load


def test_a_picture_that_kills_is_given_up_and_all_others_are_done(tmp_path: Path) -> None:
    with begun(tmp_path, 6) as (run, plan):
        (part,) = run.parts()[1]
        died = 0
        for _ in range(10):
            try:
                report = Worker(plan, dying(at_width=67)).do(part)
                break
            except Died:
                died += 1
                assert parts(tmp_path / "out") == []
        assert (died, report.problem, report.pictures, report.failed, report.deaths) == (3, None, 6, 1, 3)
        found = rows(tmp_path / "out")
        assert [row["error"] is None for row in found] == [True, True, True, False, True, True]
        assert "the process that detected in it died 2 times" in found[3]["error"]
        assert run.parts()[1] == []
        assert list((tmp_path / "out" / "attempts" / "first").iterdir()) == []


def test_a_network_that_cannot_be_loaded_ends_the_run(tmp_path: Path) -> None:
    def load(plan: Plan) -> ImageDetector:
        raise Died

    with begun(tmp_path, 1) as (run, plan):
        (part,) = run.parts()[1]
        for _ in range(6):
            with pytest.raises(Died):
                Worker(plan, load).do(part)
        report = Worker(plan, load).do(part)
        assert report.problem is not None
        assert "died 6 times before its first picture" in report.problem
        assert Worker(_plan(run, Bundle.open(plan.bundle), "second")).do(part).problem is None


def test_a_part_that_is_there_is_left_alone(tmp_path: Path) -> None:
    with begun(tmp_path, 2) as (run, plan):
        (part,) = run.parts()[1]
        worker = Worker(plan)
        first = worker.do(part)
        stamp = parts(tmp_path / "out")[0].stat().st_mtime_ns
        again = worker.do(part)
        assert (again.pictures, again.exits) == (first.pictures, first.exits) == (2, {"P5": 1, "P3": 1})
        assert parts(tmp_path / "out")[0].stat().st_mtime_ns == stamp


def test_a_part_that_is_done_anew_keeps_its_results_until_the_new_ones_are_there(tmp_path: Path) -> None:
    with begun(tmp_path, 2) as (run, plan):
        broken = tmp_path / "a" / "0001.png"
        whole = broken.read_bytes()
        broken.write_bytes(b"nothing")
        (part,) = run.parts()[1]
        assert Worker(plan).do(part).failed == 1
        before = rows(tmp_path / "out")
        broken.write_bytes(whole)
        again = dataclasses.replace(part, anew=True)
        with pytest.raises(Died):
            Worker(plan, dying(at_width=65)).do(again)
        assert rows(tmp_path / "out") == before
        report = Worker(plan).do(again)
        assert (report.pictures, report.failed, report.deaths) == (2, 0, 1)
        assert [row["error"] for row in rows(tmp_path / "out")] == [None, None]


def test_damaged_and_missing_pictures_are_rows_with_the_sentence(tmp_path: Path) -> None:
    with begun(tmp_path, 3) as (run, plan):
        (tmp_path / "a" / "0001.png").write_bytes(b"nothing")
        (tmp_path / "a" / "0002.png").unlink()
        (part,) = run.parts()[1]
        report = Worker(plan).do(part)
    assert (report.pictures, report.failed) == (3, 2)
    errors = [row["error"] for row in rows(tmp_path / "out")]
    assert errors[0] is None
    assert errors[1] == report.failures[0]
    assert "0001.png' is damaged" in errors[1]
    assert errors[2] == f"image '{tmp_path}/a/0002.png' does not exist"
    assert {row["bundle"] for row in rows(tmp_path / "out")} == {plan.fingerprint}


def test_what_a_machine_of_the_cluster_lacks_is_said(tmp_path: Path) -> None:
    with begun(tmp_path, 1) as (run, plan):
        (part,) = run.parts()[1]
        (tmp_path / "bundle" / "manifest.json").rename(tmp_path / "manifest.json")
        problem = Worker(plan).do(part).problem
        assert problem is not None
        assert "is not a bundle" in problem
        (tmp_path / "manifest.json").rename(tmp_path / "bundle" / "manifest.json")
        (tmp_path / "out" / "run.json").write_text('{"key": "another"}')
        problem = Worker(plan).do(part).problem
        assert problem is not None
        assert "must be on storage that all machines of the cluster share" in problem


def test_the_snippets_of_the_page_read_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with begun(tmp_path, 6) as (run, plan):
        (tmp_path / "a" / "0005.png").write_bytes(b"nothing")
        (part,) = run.parts()[1]
        Worker(plan).do(part)
    (tmp_path / "out").rename(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[3] / "docs" / "scale.md").read_text(encoding="utf-8")
    snippets = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(snippets) == 2
    for snippet in snippets:
        exec(snippet, {})
    said = capsys.readouterr().out
    assert said.startswith("1 failed\n")
    assert "path  patches\n0 " in said


def test_the_threshold_is_asked_for(tmp_path: Path) -> None:
    with begun(tmp_path, 1) as (run, plan):
        cv2.imwrite(str(tmp_path / "a" / "0000.png"), np.full((64, 64, 3), 200, np.uint8))
        (part,) = run.parts()[1]
        Worker(plan).do(part)
    (row,) = rows(tmp_path / "out")
    assert row["scores"]
    assert min(row["scores"]) >= 0.3
