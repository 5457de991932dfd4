"""The front: every contender measured on the same pictures, with its own stop, and what is told of it."""

from __future__ import annotations

import csv
import dataclasses
import gc
import io
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from asag_bench.cli import main
from asag_bench.front.measure import FrontPlan, _contender, _run_of, measure_front, turns
from asag_bench.front.result import ADAPTIVE, ALWAYS, Contender, Front, Pictures
from asag_bench.front.table import csv_text, markdown
from asag_bench.light_peers.peer import RECIPE, Said
from asag_bench.light_peers.raw import Raw, suppressed
from asag_bench.measuring.machine import describe_machine
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.bundle.manifest import Level
from asag_deploy.detector import Detector
from asag_deploy.detector_options import DetectorOptions
from asag_deploy.errors import ConfigError, OutputError
from asag_deploy.images.reading import RgbImage
from asag_deploy.processing.postprocess import Found
from asag_evaluation.data.coco import CocoDataset
from asag_evaluation.evaluate import evaluate
from asag_training.run.log import STEPS
from asag_training.run.state import Position, write_state
from support.coco_files import box, write_coco
from support.small_light_peers import small_said, training
from support.tiny_bundle import make_bundle, picture

PICTURES = [picture(0), picture(3), picture(5, 2)]
"""That end on P5, P4 and P3."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle") / "asag-seed-0").path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, bundle: Path) -> Path:
    """Pictures whose objects are some of those that the bundle finds."""
    root = tmp_path_factory.mktemp("data")
    with Detector.load(bundle) as detector:
        found, categories = detector(PICTURES, channel_order="rgb"), detector.manifest.categories
    objects = []
    for image_id, detections in enumerate(found, start=1):
        for x1, y1, x2, y2 in detections.xyxy[:3].astype(float).tolist():
            objects.append(box(image_id, [x1, y1, x2 - x1, y2 - y1], categories[0].id))
    for split in ("train2017", "val2017"):
        write_coco(
            root,
            objects,
            split=split,
            pictures=PICTURES,
            categories=[dataclasses.asdict(category) for category in categories],
        )
    return root


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    folder = tmp_path_factory.mktemp("peers") / "yolox-seed-0"
    said: Said = small_said("yolox-lite", data, epochs=1)
    training(said, data, folder)(quiet=True)
    return folder


@pytest.mark.slow
def test_all_are_measured_on_the_same_pictures(
    bundle: Path, data: Path, peer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command: its result, page, table and plots; its AP is that of the evaluation."""
    arguments = ["--data", str(data), "--bundle", str(bundle), "--peer", str(peer), "--rounds", "2"]
    assert main(["front", *arguments, "--output-dir", str(tmp_path / "out"), "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    result = json.loads((tmp_path / "out" / "front.json").read_text())
    by_stop = {each["stop"]: each for each in result["contenders"]}
    assert set(by_stop) == {"P5", "P4", ADAPTIVE, ALWAYS, None}
    assert by_stop["P5"]["exits"] == ["P5"] * 3
    assert by_stop["P4"]["exits"] == ["P5", "P4", "P4"]
    assert by_stop[ADAPTIVE]["exits"] == ["P5", "P4", "P3"]
    assert by_stop[ALWAYS]["exits"] == ["P3"] * 3
    assert by_stop[None]["exits"] is None
    assert all(len(each["ms"]) == 3 and min(each["ms"]) > 0 for each in result["contenders"])
    opened = Bundle.open(bundle)
    dataset = CocoDataset.open(data, "val2017", categories=opened.manifest.categories)
    with DetectorOptions(max_level="P4").load(opened) as detector:
        expected = evaluate(detector, dataset).coco
    assert expected.ap is not None
    assert 0 < expected.ap < 1
    assert by_stop["P4"]["ap"] == pytest.approx(expected.ap)
    spent = by_stop[None]["training"]
    assert (spent["updates"], spent["images"], spent["seed"]) == (1, 4, 0)
    assert spent["cpu_minutes"] > 0
    assert by_stop["P5"]["training"] is None
    page = (tmp_path / "out" / "front.md").read_text()
    assert page.count("| onnxruntime |") == 6
    for plot in ("front.png", "times.png"):
        assert (tmp_path / "out" / plot).read_bytes().startswith(b"\x89PNG")
    assert main(["front", *arguments, "--output-dir", str(tmp_path), "--rounds", "0"]) == 2


@pytest.fixture
def front() -> Front:
    """Four pictures: two stop at once, one goes to P4, one to P3."""
    exits: tuple[Level, ...] = ("P5", "P5", "P4", "P3")
    pictures = Pictures(data="d", ids=(1, 2, 3, 4), objects=(1, 2, 9, 150), kinds=(None,) * 4)
    always: tuple[Level, ...] = ("P3",) * 4

    def contender(
        seed: int, stop: str | None, ms: tuple[float, ...], where: tuple[Level, ...] | None
    ) -> Contender:
        return Contender(
            name=f"{seed} {stop}",
            network="asag" if stop else "dense",
            weights=f"seed-{seed}",
            backend="onnxruntime",
            stop=stop,
            ap=0.5 + 0.1 * seed,
            ap50=0.7,
            ap75=None,
            ms=ms,
            exits=where,
            training=None,
        )

    contenders = []
    for seed in (0, 1):
        contenders += [
            contender(seed, "P5", (10, 10, 10, 20), ("P5",) * 4),
            contender(seed, ADAPTIVE, (10, 10, 15, 24 + seed), exits),
            contender(seed, ALWAYS, (20, 16, 20, 24), always),
        ]
    return Front(
        command="asag-bench front",
        machine=describe_machine(),
        threads=1,
        rounds=1,
        pictures=pictures,
        contenders=(*contenders, contender(2, None, (12, 12, 12, 13), None)),
    )


def test_what_deciding_gains(front: Front) -> None:
    one, other = front.adaptivity()
    assert (one.weights, other.weights) == ("seed-0", "seed-1")
    assert one.stopped == 0.75
    assert one.probing_costs == pytest.approx(24 / 20 - 1)
    assert other.probing_costs == pytest.approx(25 / 20 - 1)
    assert one.saved == pytest.approx(np.median([1 - 10 / 20, 1 - 10 / 16, 1 - 15 / 20]))


def test_the_page_averages_over_seeds(front: Front) -> None:
    rows = [line.split(" | ") for line in markdown(front).splitlines() if line.startswith("| asag | ")]
    adaptive = next(row for row in rows if row[2] == ADAPTIVE)
    assert adaptive[3:] == ["2", "55.0 (50.0 to 60.0)", "70.0 (70.0 to 70.0)", "-", "12.50", "14.88", "75% |"]
    table = list(csv.DictReader(io.StringIO(csv_text(front))))
    assert len(table) == 4 * 7
    last = table[-1]
    assert (last["network"], last["stop"], last["objects"], last["ms"], last["exit"]) == (
        "dense",
        "",
        "150",
        "13",
        "",
    )


def _plan(**changes: object) -> FrontPlan:
    usual = {
        "command": "asag-bench front",
        "data": Path("data"),
        "bundles": (Path("a"),),
        "runs": (),
        "peers": (),
        "backends": ("onnxruntime",),
        "threads": 1,
        "rounds": 1,
        "quiet": True,
    }
    return FrontPlan(**{**usual, **changes})  # type: ignore[arg-type]


BAD: list[tuple[Callable[[], object], str]] = [
    (lambda: _plan(runs=(Path("r"), Path("s"))), "--run is given 2 times for 1 bundles"),
    (lambda: _plan(peers=(Path("other/a"),)), "two folders are called 'a'"),
]


@pytest.mark.parametrize(("make", "message"), BAD)
def test_plans_that_make_no_sense_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_classes_have_to_be_the_same(bundle: Path, data: Path, tmp_path: Path) -> None:
    write_coco(tmp_path, [box(1, [2, 2, 20, 20])], split="train2017")
    write_coco(tmp_path, [box(1, [2, 2, 20, 20])], split="val2017")
    other = tmp_path / "other-classes"
    training(small_said("yolox-lite", tmp_path, epochs=1), tmp_path, other).save()
    plan = _plan(bundles=(bundle,), peers=(other,), data=data)
    with pytest.raises(ConfigError, match="trained on other classes"):
        measure_front(plan)


def _run(folder: Path, **network: object) -> Path:
    """A run of asag-train, of so changed a network that the tiny bundle could be of it."""
    folder.mkdir()
    usual = {"variant": "asag-a-test", "num_classes": 3, "patch_size": 15}
    content = {"optimisation": {"batch_size": 4}, "schedule": {"epochs": 5}, "seed": 7}
    (folder / RECIPE).write_text(json.dumps({"network": {**usual, **network}, **content}))
    (folder / STEPS).write_text("step,ms_cpu\n1,60000\n2,30000\n")
    return folder


def test_a_run_is_that_of_the_bundle(bundle: Path, data: Path, tmp_path: Path) -> None:
    """Not a peer's, nor another network's, whose cost would be told as the bundle's."""
    opened = Bundle.open(bundle)
    manifest = opened.manifest
    fits = {
        "variant": manifest.variant,
        "num_classes": len(manifest.categories),
        "patch_size": manifest.probing.patch_size,
    }
    found = _run_of(_run(tmp_path / "own", **fits), opened)
    assert (found.updates, found.images, found.cpu_minutes, found.seed) == (2, 8, 1.5, 7)
    for name, other in (("variant", "asag-s"), ("num_classes", 91), ("patch_size", 99)):
        run = _run(tmp_path / name, **{**fits, name: other})
        with pytest.raises(ConfigError, match=f"another network than the bundle .* \\(its {name} is {other}"):
            _run_of(run, opened)
    of_peer = tmp_path / "peer"
    training(small_said("yolox-lite", data), data, of_peer)
    (of_peer / STEPS).write_text("step,ms_cpu\n1,60000\n")
    with pytest.raises(ConfigError, match="is a run of `asag-bench train-peer`: give it with --peer"):
        measure_front(_plan(bundles=(bundle,), runs=(of_peer,), data=data))
    (of_peer / RECIPE).write_text('{"network": 3, "optimisation": {"batch_size": 4}, "seed": 1}')
    with pytest.raises(OutputError, match="holds no log of a training run"):
        _run_of(of_peer, opened)


def test_how_far_a_run_had_come_is_on_the_page(bundle: Path, tmp_path: Path, front: Front) -> None:
    opened = Bundle.open(bundle)
    manifest = opened.manifest
    run = _run(
        tmp_path / "run",
        variant=manifest.variant,
        num_classes=len(manifest.categories),
        patch_size=manifest.probing.patch_size,
    )
    write_state(run, {}, Position(epoch=3, step=2), {})
    with pytest.warns(RuntimeWarning, match="it has done 3 of 5 epochs"):
        spent = _run_of(run, opened)
    of_run = [dataclasses.replace(each, training=spent) for each in front.contenders]
    page = markdown(dataclasses.replace(front, contenders=tuple(of_run)))
    assert "| seed-0 | asag | 7 | 2 (3 of 5 epochs) | 8 | 1.5 |" in page


def test_the_page_says_how_often_and_on_how_many_detections(front: Front) -> None:
    assert "one picture at a time, 1 round; a picture's" in markdown(front)
    assert "AP counts 300 detections a picture" in markdown(front)


def test_photographs_are_turned_as_the_command_says(
    bundle: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[object] = []

    def note(*_: object, **given: object) -> None:
        opened.append(given["orientation"])
        raise ConfigError("enough")

    monkeypatch.setattr(CocoDataset, "open", note)
    command = ["front", "--data", str(data), "--bundle", str(bundle), "--output-dir", str(tmp_path / "out")]
    for more in ((), ("--orientation", "upright")):
        assert main([*command, *more]) == 2
    assert opened == ["auto", "upright"]


def test_the_dense_peer_keeps_the_best_of_each_object() -> None:
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 10], [20, 20, 30, 30], [50, 50, 60, 60]])
    scores = np.array([0.5, 0.8, 0.7, 0.3, 0.005], dtype=np.float32)
    labels = np.array([0, 0, 1, 0, 0])
    kept = suppressed(Raw(scores, labels, (boxes / 64).astype(np.float32)))
    assert kept.scores.tolist() == pytest.approx([0.8, 0.7, 0.3])
    assert kept.labels.tolist() == [0, 1, 0]
    assert (kept.boxes[0] * 64).tolist() == [0, 0, 10, 9]
    nothing = suppressed(Raw(scores[4:], labels[4:], boxes[4:].astype(np.float32)))
    assert len(nothing.scores) == 0


def test_nothing_old_is_collected_in_timed_rounds(
    bundle: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full collection takes a third of a second, and would be one picture's."""
    frozen: list[bool] = []

    def detect(image: RgbImage) -> tuple[Found, Level | None]:
        frozen.append(gc.get_freeze_count() > 0)
        none = np.zeros((0, 4), dtype=np.float32)
        return Found(none, none[:, 0], none[:, 0].astype(np.int64)), None

    running = _contender(Path("a"), "asag", "onnxruntime", None, None, detect)
    monkeypatch.setattr("asag_bench.front.measure._open", lambda *_: [running])
    before = gc.get_freeze_count() > 0
    found = measure_front(_plan(bundles=(bundle,), data=data, rounds=2))
    assert frozen == [before] * 3 + [True] * 6
    assert len(found.contenders[0].ms) == 3
    assert gc.get_freeze_count() == 0


@pytest.mark.parametrize(
    ("contenders", "pictures"), [(6, 20), (4, 300), (1, 3), (2, 5), (7, 87), (6, 10), (16, 20)]
)
def test_contenders_take_turns_each_with_another_picture(contenders: int, pictures: int) -> None:
    for number in range(3):
        calls = list(turns(contenders, pictures, number))
        assert len(calls) == len(set(calls)) == contenders * pictures
        assert all(one[1] != other[1] for one, other in pairwise(calls))
        assert contenders == 1 or all(one[0] != other[0] for one, other in pairwise(calls))
    places = {(calls[n][0], n % contenders) for n in range(len(calls))}
    assert contenders < 3 or pictures < 60 or len(places) == contenders**2  # none has a place of its own


def test_nobody_is_always_called_after_the_same_one() -> None:
    calls = [k for k, _ in turns(6, 60, 1)]
    before = {k: {one for one, other in pairwise(calls) if other == k} - {k} for k in range(6)}
    assert all(len(others) >= 4 for others in before.values())
