"""No program replaces a file that none of ours has made."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import pytest

from support.tiny_bundle import make_bundle

PHOTO = b"\xff\xd8\xff\xe0 of somebody's"
FIGURES = Path(__file__).parents[1] / "benchmarks" / "results" / "training-step-asag-a-r50-100-cpu.json"
BENCH, TRAINING = "asag_bench.cli", "asag_training"


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        (f"{TRAINING}.checkpoints.pack", ["weights.pth", "{photo}"]),
        (f"{TRAINING}.evaluation.cli", ["bundle", "--data", "data", "--output-dir", "{evaluation}"]),
        (BENCH, ["run", "bundle", "--images", "photos", "--output-dir", "{result}"]),
        (BENCH, ["throughput", "bundle", "--images", "photos", "--output-dir", "{throughput}"]),
        (BENCH, ["parity", "bundle", "--backend", "onnxruntime", "--output", "{photo}"]),
        (BENCH, ["training-step", "--output", "{photo}"]),
        (BENCH, ["annotations", "--output", "{photo}"]),
        (BENCH, ["torch-cuda-loop", "--output", "{photo}"]),
        (BENCH, ["demo", "--output-dir", "{result}"]),
        (BENCH, ["page", "--results", "results", "--plot", "{photo}"]),
        (BENCH, ["page", "--results", "{page}"]),
        (BENCH, ["gpu", "archive", "--output", "{photo}"]),
        ("asag_export.demo.cli", ["--output-dir", "{gallery}"]),
    ],
)
def test_what_somebody_else_made_stays(
    module: str,
    arguments: Sequence[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    make_bundle(tmp_path / "bundle")
    for folder in ("results", "page"):
        (tmp_path / folder).mkdir()
        shutil.copy(FIGURES, tmp_path / folder)
    places = {"photo": Path("photo.jpg")}
    for place, name in {
        "evaluation": "detections.json",
        "result": "latency.png",
        "throughput": "throughput.md",
        "page": "README.md",
        "gallery": "gallery.jpg",
    }.items():
        places[place] = Path(place, name)
    for file in places.values():
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(PHOTO)
    shown = {place: str(file if place == "photo" else file.parent) for place, file in places.items()}
    command = [argument.format(**shown) for argument in arguments]
    assert import_module(module).main(command) == 2
    assert "so it is not replaced" in capsys.readouterr().err
    assert all(file.read_bytes() == PHOTO for file in places.values())
