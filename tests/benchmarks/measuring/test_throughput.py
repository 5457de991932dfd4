"""`asag-bench throughput` from its command line to its files, on a tiny bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from asag_bench.cli import main
from asag_bench.measuring.throughput import batches_of_one_size
from asag_bench.reports.throughput import markdown, rows
from asag_bench.result import ThroughputResult, to_json
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.bundle.manifest import Preprocessing
from asag_deploy.typed_json import read_fields
from support.tiny_bundle import make_bundle, picture

QUICK = ("--duration", "0.01", "--window", "0.001", "--threads", "2", "--quiet")
METHODS = [
    *("one by one", "batches of 2", "batches of 3", "2 requests", "one by one, from files"),
    *("pipeline, from files", "pipeline, 2 requests, from files"),
]


def typed(data: dict[str, Any]) -> ThroughputResult:
    found: ThroughputResult = read_fields(ThroughputResult, data)
    return found


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("throughput") / "bundle")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two sizes and every exit level, and one that cannot be read."""
    folder = tmp_path_factory.mktemp("photos")
    for i, colour in enumerate([(0, 0), (4, 0), (5, 2), (9, 6), (3, 0)]):
        Image.fromarray(picture(*colour, size=(64, 64 + 32 * (i % 2)))).save(folder / f"{i}.png")
    (folder / "broken.png").write_bytes(b"nonsense")
    return folder


@pytest.fixture(scope="module")
def folder(bundle: Bundle, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("result") / "out"
    arguments = ["throughput", str(bundle.path), "--images", str(photos), "--batch", "2,3", "--requests", "2"]
    assert main([*arguments, "--output-dir", str(folder), *QUICK]) == 0
    return folder


@pytest.fixture(scope="module")
def result(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "throughput.json").read_text(encoding="utf-8"))
    return found


def test_every_method_is_measured(result: dict[str, Any]) -> None:
    assert list(result["ways"]) == METHODS
    pictures = result["input"]["pictures"] * result["input"]["repeated"]
    for method in result["ways"].values():
        assert len(method["rounds_s"]) == len(result["ways"]["one by one"]["rounds_s"]) >= 1
        mean = sum(method["rounds_s"]) / len(method["rounds_s"])
        assert method["images_per_second"] == pytest.approx(pictures / mean, rel=0.1)
        base = result["ways"][method["compared_with"]]["rounds_s"]
        speeds = np.array(base) / np.array(method["rounds_s"])
        assert method["times_as_fast"]["median"] == pytest.approx(np.median(speeds), rel=0.1)
    assert result["ways"]["one by one"]["times_as_fast"]["median"] == 1


def test_every_method_finds_the_same(result: dict[str, Any]) -> None:
    counts = {method["detections"] for method in result["ways"].values()}
    assert len(counts) == 1
    assert counts.pop() > 0


def test_a_result_says_what_it_is_of(result: dict[str, Any], bundle: Bundle) -> None:
    assert result["command"].startswith("asag-bench throughput ")
    assert result["machine"]["cores"] >= 1
    assert result["bundle"]["graphs"] == {graph.name: graph.sha256 for graph in bundle.manifest.graphs}
    assert result["input"]["exit_levels"] == {"P5": 1, "P4": 2, "P3": 2}
    assert result["input"]["network_shapes"] == ["64x64", "64x96"]
    assert len(result["input"]["skipped"]) == 1
    assert result["threads"] == 2


def test_the_page(folder: Path, result: dict[str, Any]) -> None:
    page = (folder / "throughput.md").read_text(encoding="utf-8")
    assert page == markdown(typed(result))
    assert page.count("\n| ") == len(METHODS) + 2
    assert result["machine"]["processor"] in page
    assert "UNTRAINED" in page
    assert "skipped: '" in page
    assert {path.name for path in folder.iterdir()} == {"throughput.json", "throughput.md"}


def test_what_is_not_stable_is_said(result: dict[str, Any]) -> None:
    ways = {"a": {**result["ways"]["one by one"], "stable": False}}
    assert rows(typed({**result, "ways": ways}))[1][-1] == "NO"


def test_a_recorded_result_is_read_as_it_was_written() -> None:
    recorded = Path(__file__).parents[3] / "benchmarks" / "results"
    for path in recorded.glob("throughput-*.json"):
        data = json.loads(path.read_text(encoding="utf-8"))
        written = to_json(typed(data))
        for key in data.keys() - {"machine"}:
            assert written[key] == data[key]


def test_generated_pictures_of_one_shape(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    options = [option for option in QUICK if option != "--quiet"]
    arguments = [
        "throughput",
        str(bundle.path),
        "--shape",
        "64x128",
        "--limit",
        "3",
        "--requests",
        "2",
        *options,
    ]
    assert main(arguments) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == [
        "method",
        "images/s",
        "times",
        "as",
        "fast",
        "middle",
        "half",
        "as",
        "detections",
        "stable",
    ]
    assert len(out) == 1 + len(METHODS) - 1


def test_batches_hold_images_of_one_size_and_all_of_them() -> None:
    images = [picture(i, size=(64, 64 + 32 * (i % 2))) for i in range(7)]
    batches = batches_of_one_size(images, 3, Preprocessing(shorter_side=64, longer_side=128))
    assert [[int(image[0, 0, 0]) for image in batch] for batch in batches] == [[0, 2, 4], [1, 3, 5], [6]]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--batch", "1"], "--batch is 1; it must be"),
        (["--batch", "two"], "--batch is two; it must be"),
        (["--requests", "2,0"], "--requests is 0; it must be"),
        (["--limit", "0"], "--limit is 0; it must be"),
        (["--duration", "0"], "--duration is 0; it must be"),
        (["--window", "nan"], "--window is nan; it must be"),
        (["--shape", "64"], "--shape is '64'"),
        (["--shape", "70x70"], "would be resized to 64x64"),
        (["--images", "nowhere"], "there is no folder 'nowhere'"),
        (["--backend", "none"], "unknown backend 'none'"),
        (["--wrong"], "--wrong"),
    ],
)
def test_wrong_input_is_one_sentence(
    bundle: Bundle, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    assert main(["throughput", str(bundle.path), *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("asag-bench: error: ")
    assert sentence in err
    assert err.count("\n") == 1
