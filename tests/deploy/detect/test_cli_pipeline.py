"""`asag-detect` with a whole detector: several requests and batches, and files that stay whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from asag_deploy.detect import cli
from asag_deploy.detect.result_files import ResultWriter
from asag_deploy.detections import Detections
from asag_deploy.detector import Detector
from asag_deploy.errors import ImageError
from asag_deploy.images.reading import read_image
from asag_deploy.images.sources import Failure, Frame, Source
from support.detection_samples import make_detections
from support.tiny_bundle import make_bundle, picture
from support.videos import stored

FRAMES = 9


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_bundle(tmp_path_factory.mktemp("cli") / "bundle").path)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with pictures of two sizes, one that is broken, and a video, in `in`."""
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    for i in range(8):
        size = (64, 64) if i % 3 else (64, 96)
        Image.fromarray(picture(i, i // 2, size=size)).save(f"in/{i}.png")
    Path("in/5.png").write_bytes(b"nonsense")
    writer = cv2.VideoWriter("in/v.avi", cv2.VideoWriter.fourcc(*"FFV1"), 10, (64, 64))
    for i in range(FRAMES):
        writer.write(picture(0, 2, i))
    writer.release()
    return tmp_path


def run(bundle: str, *arguments: str) -> int:
    return cli.main([bundle, "in", "--threads", "2", *arguments])


def read(path: str) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads(Path(path).read_text(encoding="utf-8"))
    return [{name: value for name, value in entry.items() if name != "times_ms"} for entry in entries]


def outputs() -> list[str]:
    return sorted(str(path) for path in Path().rglob("*") if path.is_file() and path.parts[0] != "in")


def test_requests_and_batches_change_neither_results_nor_order(
    bundle: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plans = [("1", "1"), ("3", "1"), ("2", "4")]
    for requests, batch in plans:
        name = f"{requests}-{batch}"
        arguments = ["--output-dir", f"out-{name}", "--json", f"{name}.json"]
        assert run(bundle, *arguments, "--requests", requests, "--batch", batch) == 1
        assert len(list(Path(f"out-{name}").iterdir())) == 8
    alone, concurrent, batched = (read(f"{requests}-{batch}.json") for requests, batch in plans)
    assert [entry["frame"] for entry in alone] == [0] * 7 + list(range(FRAMES))
    assert concurrent == alone
    assert [e["source"] for e in batched] == [e["source"] for e in alone]
    assert [len(e["detections"]) for e in batched] == [len(e["detections"]) for e in alone]
    assert {entry["trace"]["exit_level"] for entry in alone} == {"P5", "P4", "P3"}
    for name in ("1.png", "7.png"):
        np.testing.assert_array_equal(read_image(f"out-3-1/{name}"), read_image(f"out-1-1/{name}"))
    out, err = capsys.readouterr()
    assert out.count(" images/s, from reading to writing, in ") == 3
    assert err.count("skipped: 'in/5.png'") == 3


def test_ctrl_c_while_writing_leaves_whole_files(
    bundle: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It comes in the main thread while others read and detect."""
    add = ResultWriter.add

    def interrupted(self: ResultWriter, frame: Frame, detections: Detections) -> None:
        if frame.number == 11:
            raise KeyboardInterrupt
        add(self, frame, detections)

    monkeypatch.setattr(ResultWriter, "add", interrupted)
    assert run(bundle, "--output-dir", "out", "--json", "r.json", "--requests", "2") == 130
    assert len(read("r.json")) == 10
    assert outputs() == [*(f"out/{i}.png" for i in range(8) if i != 5), "out/v.mp4", "r.json"]
    assert len(stored(Path("out/v.mp4"))[0]) == 3
    assert "10 images" in capsys.readouterr().out
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("asag-")]


def test_output_that_cannot_be_written_ends_the_run(
    bundle: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("out").write_text("a file")
    assert run(bundle, "--output-dir", "out", "--json", "r.json", "--requests", "2") == 2
    assert "asag-detect: error: could not write 'out/0.png'" in capsys.readouterr().err
    assert len(read("r.json")) == 1
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("asag-")]


def test_only_images_of_one_size_make_a_batch(
    bundle: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[tuple[int, ...]]] = []
    call = Detector.__call__

    def noted(self: Detector, images: list[NDArray[np.uint8]], **options: Any) -> Any:
        seen.append({image.shape for image in images} if len(images) > 1 else set())
        return call(self, images, **options)

    monkeypatch.setattr(Detector, "__call__", noted)
    assert run(bundle, "--batch", "3", "--json", "r.json", "--quiet") == 1
    assert max(len(shapes) for shapes in seen) == 1
    assert len(seen) < 7 + FRAMES


def test_failures_keep_their_place_among_the_results(capsys: pytest.CaptureFixture[str]) -> None:
    progress = cli._Run(cli.parse_arguments(["bundle", "source"]), alone=False)
    source = Source(name="a.png", kind="image")
    frame = Frame(source=source, index=0, number=1, image=np.zeros((2, 2, 3), np.uint8))
    found = make_detections((2, 2))
    failure = Failure(source="x", message="x is bad")
    results: list[Any] = [(failure, None), (frame, found), (frame, ImageError("refused"))]
    assert [item for item, _ in progress.successes(results)] == [frame]
    assert [each.message for each in progress.failures] == ["x is bad", "'a.png': refused"]
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_names_in_a_program_that_prints_ascii(bundle: str, tmp_path: Path) -> None:
    """Results go to stdout whole, with names that are no UTF-8, and nothing else does."""
    (tmp_path / "in").mkdir()
    strange = os.fsencode(tmp_path) + b"/in/\xff\n\xc3\xa9.png"
    Image.fromarray(picture(1, 1, size=(64, 64))).save(tmp_path / "a.png")
    os.rename(tmp_path / "a.png", strange)  # noqa: PTH104 (bytes are no path)
    (tmp_path / "in" / "bad\n.png").write_bytes(b"nonsense")
    command = [sys.executable, "-m", "asag_deploy.detect.cli", bundle, "in"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    for options in ([], ["--json", "/dev/stdout"]):
        done = subprocess.run(
            [*command, *options], cwd=tmp_path, env=environment, capture_output=True, check=False
        )
        assert done.returncode == 1, done.stderr
        assert b"Traceback" not in done.stderr
        assert b"skipped: 'in/bad\\n.png'" in done.stderr
        if options:
            (entry,) = json.loads(done.stdout)
            assert os.fsencode(entry["source"]) == strange.removeprefix(os.fsencode(tmp_path) + b"/")
            assert b"images/s" in done.stderr
        else:
            assert b"in/\\xff\\n" in done.stdout
