"""`asag-detect` from its arguments to its exit code, around a detector that needs no bundle."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from asag_deploy._version import __version__
from asag_deploy.detect import cli
from asag_deploy.detections import Detections
from asag_deploy.errors import BackendError, BundleNotFoundError, ConfigError, ImageError
from asag_deploy.images.reading import read_image
from asag_deploy.images.video_writing import VideoFile
from support.detection_samples import CATEGORIES, make_detections, make_trace
from support.tiny_bundle import make_bundle, tiny_manifest
from support.videos import stored, write_video

HEIGHT, WIDTH = 80, 100


class FakeDetector:
    """Finds the same three things everywhere; brown images (see `scene`) end on P5, others on P3."""

    def __init__(self, *, trained: bool = True) -> None:
        self.options: dict[str, Any] = {}
        self.bundle: Any = None
        self.batches: list[int] = []
        self.closed = False
        self.requests = 1
        self.refuses: int | None = None
        """The red value of images that it raises ImageError for."""
        self.error_after: tuple[int, BaseException] | None = None
        """How many calls go well, and what the next raises."""
        self.manifest = dataclasses.replace(tiny_manifest(), trained=trained, categories=CATEGORIES)

    def load(self, bundle: Any, **options: Any) -> Self:
        self.bundle, self.options, self.requests = bundle, options, options["requests"]
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True

    def __call__(self, images: list[NDArray[np.uint8]], *, channel_order: str) -> list[Detections]:
        assert channel_order == "rgb"
        if self.error_after is not None and len(self.batches) >= self.error_after[0]:
            raise self.error_after[1]
        for image in images:
            if image[0, 0, 0] == self.refuses:
                raise ImageError("expected something else")
        self.batches.append(len(images))
        return [self._detect(image) for image in images]

    def _detect(self, image: NDArray[np.uint8]) -> Detections:
        trace = make_trace(p4=None) if image[0, 0, 0] == 150 else make_trace(p3=((10, 10, 20, 20),))
        return make_detections(image.shape[:2], trace=trace)


@pytest.fixture
def detector(monkeypatch: pytest.MonkeyPatch) -> FakeDetector:
    fake = FakeDetector()
    monkeypatch.setattr("asag_deploy.detector.Detector.load", fake.load)
    return fake


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with in/a.png and in/b.png."""
    monkeypatch.chdir(tmp_path)
    scene("in/a.png")
    scene("in/b.png", red=40)
    return tmp_path


def scene(path: str, red: int = 150) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (WIDTH, HEIGHT), (red, 90, 40)).save(path)


def video(path: str, frames: int = 4, **options: Any) -> None:
    write_video(Path(path), "mjpeg", frames=frames, size=(WIDTH, HEIGHT), **options)


def run(*arguments: str) -> int:
    return cli.main(list(arguments))


def outputs(folder: Path) -> list[str]:
    return sorted(
        str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and "in" not in p.parts
    )


def read_json(path: str) -> Any:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def test_images_to_pictures_json_and_coco(
    detector: FakeDetector, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run("bundle", "in", "--output-dir", "out", "--json", "r.json", "--coco", "c.json", "--trace")
    assert code == 0
    assert outputs(folder) == ["c.json", "out/a.png", "out/b.png", "r.json"]
    entries = read_json("r.json")
    assert [entry["source"] for entry in entries] == ["in/a.png", "in/b.png"]
    assert [len(entry["detections"]) for entry in entries] == [2, 2]  # the third is under 0.3
    assert [entry["trace"]["exit_level"] for entry in entries] == ["P5", "P3"]
    assert [result["image_id"] for result in read_json("c.json")] == [1, 1, 2, 2]
    expected = detector._detect(read_image("in/b.png")).filter(0.3)
    drawn = expected.plot("in/b.png", trace=True, channel_order="rgb")
    np.testing.assert_array_equal(read_image("out/b.png"), drawn)
    out, err = capsys.readouterr()
    assert len(err.splitlines()) == 1
    assert "image ids count the images from 1" in err
    assert "2 images, 4 detections of confidence 0.3 or more: 2 cow, 2 car" in out
    assert "exit levels: P5 1, P4 0, P3 1" in out
    assert "backbone" in out
    assert "20.5" in out
    assert detector.closed


def test_options_reach_the_detector(detector: FakeDetector, folder: Path) -> None:
    assert run("some/bundle", "in/a.png", "--backend", "openvino", "--requests", "2") == 0
    assert detector.bundle == Path("some/bundle")
    assert (detector.options["backend"], detector.options["requests"]) == ("openvino", 2)


def test_options_may_stand_anywhere(detector: FakeDetector, folder: Path) -> None:
    assert run("--json", "r.json", "bundle", "--threshold", "0", "in/a.png", "--quiet", "in/b.png") == 0
    assert [len(entry["detections"]) for entry in read_json("r.json")] == [3, 3]


def test_without_outputs_each_image_is_printed(
    detector: FakeDetector, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("bundle", "in", "--threshold", "0.6") == 0
    out = capsys.readouterr().out
    assert "in/a.png: 1 cow (exit P5: nothing selected)" in out
    assert "in/b.png: 1 cow (exit P3: last level)" in out
    assert outputs(folder) == []
    assert run("bundle", "in/a.png", "--threshold", "1") == 0
    assert "in/a.png: nothing" in capsys.readouterr().out


def test_quiet(detector: FakeDetector, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("bundle", "in", "--quiet") == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("size", "batches"), [("1", [1] * 6), ("4", [4, 2]), ("9", [6])])
def test_batches(detector: FakeDetector, folder: Path, size: str, batches: list[int]) -> None:
    video("in/v.avi")
    assert run("bundle", "in", "--batch", size, "--json", "r.json", "--quiet") == 0
    assert detector.batches == batches
    assert [(Path(e["source"]).name, e["frame"]) for e in read_json("r.json")] == [
        ("a.png", 0),
        ("b.png", 0),
        *(("v.avi", i) for i in range(4)),
    ]


def test_video_becomes_a_video(detector: FakeDetector, folder: Path) -> None:
    video("clip.avi")
    assert run("bundle", "clip.avi", "--output-dir", "out", "--quiet") == 0
    assert stored(Path("out/clip.mp4"))[0] == pytest.approx([0, 0.1, 0.2, 0.3], abs=1e-4)


def test_times_of_a_browsers_recording(detector: FakeDetector, folder: Path) -> None:
    """Its frames come as they like; they keep their times in JSON and in the annotated video."""
    given = [0, 33, 100, 101, 1000, 5000]
    write_video(Path("rec.webm"), "libvpx", times_ms=given)
    assert run("bundle", "rec.webm", "in/a.png", "--output-dir", "out", "--json", "r.json", "--quiet") == 0
    seconds = [time / 1000 for time in given]
    assert [entry["time_s"] for entry in read_json("r.json")] == [*seconds, None]
    assert stored(Path("out/rec.mp4"))[0] == pytest.approx(seconds, abs=1e-4)


def test_camera(
    detector: FakeDetector, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says no times: its frames are written at those at which they come."""

    class Camera:
        frames = 5

        def __init__(self, number: int) -> None:
            assert number == 0

        def read(self) -> tuple[bool, NDArray[np.uint8] | None]:
            self.frames -= 1
            time.sleep(0.01)
            return (True, np.full((HEIGHT, WIDTH, 3), 90, np.uint8)) if self.frames >= 0 else (False, None)

        def release(self) -> None: ...

    monkeypatch.setattr("cv2.VideoCapture", Camera)
    assert run("bundle", "0", "--output-dir", "out", "--json", "r.json") == 1
    assert "incomplete: 'camera:0' broke off after 5 frames" in capsys.readouterr().err
    times = [entry["time_s"] for entry in read_json("r.json")]
    assert times[0] == 0
    assert stored(Path("out/camera-0.mp4"))[0] == pytest.approx(times, abs=1e-4)
    monkeypatch.setitem(sys.modules, "av", None)
    assert run("bundle", "0", "--json", "r.json") == 1
    assert run("bundle", "0", "--output-dir", "out") == 2
    assert "pip install 'asag-deploy[video]'" in capsys.readouterr().err


def test_a_video_that_breaks_off(
    detector: FakeDetector, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    video("whole.avi", 30)
    data = Path("whole.avi").read_bytes()
    Path("cut.avi").write_bytes(data[: len(data) // 2])
    for arguments in (["cut.avi"], ["cut.avi", "in"]):
        assert run("bundle", *arguments, "--output-dir", "out", "--json", "r.json") == 1
        count = sum(entry["source"] == "cut.avi" for entry in read_json("r.json"))
        assert 3 < count < 27
        out, err = capsys.readouterr()
        assert err == f"asag-detect: incomplete: 'cut.avi' broke off after {count} of 30 frames\n"
        assert "incomplete: 1 (cut.avi)" in out
        assert len(stored(Path("out/cut.mp4"))[0]) == count
    assert run("bundle", "whole.avi") == 0
    assert capsys.readouterr().err == ""


def test_a_full_disk_ends_the_run(
    detector: FakeDetector, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    video("clip.avi", 100)
    add = VideoFile.add

    def full(self: VideoFile, *arguments: Any, **options: Any) -> None:
        if len(detector.batches) > 60:
            with self._saved():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        add(self, *arguments, **options)

    monkeypatch.setattr(VideoFile, "add", full)
    assert run("bundle", "clip.avi", "--output-dir", "out", "--json", "r.json") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("asag-detect: error: could not write 'out/clip.mp4': no space left on device")
    assert len(detector.batches) < 80
    assert len(read_json("r.json")) >= 50


def test_without_pyav(
    detector: FakeDetector, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    video("clip.avi")
    monkeypatch.setitem(sys.modules, "av", None)
    assert run("bundle", "clip.avi") == 2
    assert "pip install 'asag-deploy[video]'" in capsys.readouterr().err
    assert run("bundle", "clip.avi", "in", "--output-dir", "out") == 1
    assert outputs(folder) == ["clip.avi", "out/a.png", "out/b.png"]


def test_ids_of_an_annotation_file(
    detector: FakeDetector, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Text order is not the order of the numbers, and the network's classes have other ids there."""
    for number in (1, 2, 10):
        scene(f"in/frame{number}.png")
    images = [{"file_name": f"in/frame{number}.png", "id": 100 + number} for number in (1, 2, 10)]
    categories = [{"name": "Cow", "id": 1}, {"name": "car", "id": 2}, {"name": "traffic light", "id": 3}]
    Path("gt.json").write_text(json.dumps({"images": images, "categories": categories}))
    arguments = [
        "bundle",
        "in/frame*.png",
        "--coco",
        "c.json",
        "--json",
        "r.json",
        "--coco-annotations",
        "gt.json",
    ]
    assert run(*arguments) == 0
    assert capsys.readouterr().err == ""
    assert [entry["image_id"] for entry in read_json("r.json")] == [101, 110, 102]
    assert [(result["image_id"], result["category_id"]) for result in read_json("c.json")] == [
        (number, category) for number in (101, 110, 102) for category in (1, 2)
    ]
    assert run(*arguments, "in/a.png") == 1  # it is not listed
    assert "1 of 4 sources are not listed in 'gt.json'" in capsys.readouterr().err
    assert len(read_json("c.json")) == 6
    before = Path("gt.json").read_bytes()
    assert run("bundle", "in", "--coco", "gt.json", "--coco-annotations", "gt.json") == 2
    assert Path("gt.json").read_bytes() == before


def test_a_bundle_is_never_written_over(detector: FakeDetector, folder: Path) -> None:
    Path("bundle").mkdir()
    Path("bundle/manifest.json").write_text("{}")
    Path("link").symlink_to("bundle/manifest.json")
    for target in ("bundle/manifest.json", "link", "bundle/new.json"):
        assert run("bundle", "in", "--coco", target) == 2
    assert Path("bundle/manifest.json").read_text() == "{}"


def test_animations_say_that_they_gave_one_frame(
    detector: FakeDetector, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = [Image.new("RGB", (WIDTH, HEIGHT), (60 * i, 0, 200)) for i in range(3)]
    pictures[0].save("a.gif", save_all=True, append_images=pictures[1:], duration=200)
    pictures[0].save("b.tif", save_all=True, append_images=pictures[1:])
    assert run("bundle", "a.gif", "b.tif", "--json", "r.json") == 0
    assert len(read_json("r.json")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "(2) only the first frame was taken, beginning with 'a.gif', which has 3; --frames all" in line
    arguments = ["bundle", "a.gif", "b.tif", "--json", "r.json", "--output-dir", "out", "--frames", "all"]
    assert run(*arguments) == 0
    assert capsys.readouterr().err == ""
    times = [entry["time_s"] for entry in read_json("r.json")]
    assert times == [0, 0.2, 0.4, None, None, None]
    assert stored(Path("out/a.mp4"))[0] == pytest.approx([0, 0.2, 0.4], abs=1e-4)
    assert [name for name in outputs(folder) if "pages" in name] == [
        f"out/b-pages/page-{i}.tif" for i in (1, 2, 3)
    ]


def test_one_bad_file_among_many(
    detector: FakeDetector, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("in/aa.jpg").write_bytes(b"nonsense")
    assert run("bundle", "in", "gone.png", "none/*.jpg", "--json", "r.json") == 1
    assert [Path(entry["source"]).name for entry in read_json("r.json")] == ["a.png", "b.png"]
    assert [entry["image_id"] for entry in read_json("r.json")] == [1, 3]
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("asag-detect: skipped: ") for line in lines)
    assert [any(name in line for line in lines) for name in ("aa.jpg", "gone.png", "none/*.jpg")] == [
        True
    ] * 3
    assert "failed: 3 (none/*.jpg, in/aa.jpg, gone.png)" in out


def test_image_that_the_detector_refuses(
    detector: FakeDetector, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    detector.refuses = 40
    assert run("bundle", "in", "--batch", "2", "--json", "r.json") == 1
    assert [entry["source"] for entry in read_json("r.json")] == ["in/a.png"]
    assert "skipped: 'in/b.png': expected something else" in capsys.readouterr().err


def test_all_bad(detector: FakeDetector, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("bundle", "gone.png", "lost.png") == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1] for line in lines] == ["skipped", "skipped", "error"]
    assert "none of the sources could be used" in lines[2]


@pytest.mark.parametrize("source", ["gone.png", "none/*.png", "empty"])
def test_a_single_bad_source_is_one_sentence(
    detector: FakeDetector, folder: Path, capsys: pytest.CaptureFixture[str], source: str
) -> None:
    Path("empty").mkdir()
    assert run("bundle", source) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("asag-detect: error: ")
    assert source in err
    assert err.count("\n") == 1


def test_backend_failure_keeps_what_was_found(
    detector: FakeDetector, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    detector.error_after = (1, BackendError("the backend ran out of memory"))
    assert run("bundle", "in", "--json", "r.json") == 2
    assert len(read_json("r.json")) == 1
    assert capsys.readouterr().err == "asag-detect: error: the backend ran out of memory\n"


def test_ctrl_c_keeps_what_was_found(
    detector: FakeDetector, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    video("clip.avi")
    detector.error_after = (2, KeyboardInterrupt())
    assert run("bundle", "clip.avi", "--json", "r.json", "--coco", "c.json", "--output-dir", "out") == 130
    assert outputs(folder) == ["c.json", "clip.avi", "out/clip.mp4", "r.json"]
    assert [entry["frame"] for entry in read_json("r.json")] == [0, 1]
    assert len(stored(Path("out/clip.mp4"))[0]) == 2
    assert "2 images" in capsys.readouterr().out
    assert detector.closed


def test_ctrl_c_before_the_first_image(
    detector: FakeDetector, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    detector.error_after = (0, KeyboardInterrupt())
    assert run("bundle", "in") == 130
    assert capsys.readouterr() == ("", "")


def test_bundle_that_cannot_be_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_args: object, **_options: object) -> None:
        raise BundleNotFoundError("no bundle at 'bundle'; make one with asag-export")

    monkeypatch.setattr("asag_deploy.detector.Detector.load", refuse)
    assert run("bundle", "in", "--json", "r.json", "--output-dir", "out") == 2
    assert capsys.readouterr().err == "asag-detect: error: no bundle at 'bundle'; make one with asag-export\n"
    assert outputs(folder) == []


def test_untrained_weights_are_pointed_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("asag_deploy.detector.Detector.load", FakeDetector(trained=False).load)
    assert run("bundle", "in", "--json", "r.json") == 0
    assert "untrained" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "no bundle given"),
        (["bundle"], "no sources given"),
        (["bundle", "in", "--threshold", "1.5"], "--threshold is 1.5"),
        (["bundle", "in", "--threshold", "nan"], "--threshold is nan"),
        (["bundle", "in", "--threshold", "high"], "--threshold is high; it must be"),
        (["bundle", "in", "--batch", "0"], "--batch is 0"),
        (["bundle", "in", "--requests", "0"], "--requests is 0"),
        (["bundle", "in", "--wrong"], "--wrong"),
        (["bundle", "in", "--output-dir", "in"], "is one of the sources"),
        (["bundle", "in", "--json", "r.json", "--coco", "r.json"], "the same file"),
        (["bundle", "in", "--json", "in"], "it is a folder"),
        (["bundle", "in", "--json", "in/a.png/r.json"], "could not write"),
        (["--doctor", "bundle", "in"], "takes a bundle at most"),
        (["bundle", "in", "--coco-annotations", "gt.json"], "is for what --coco and --json write"),
        (["bundle", "in", "--coco", "c.json", "--coco-annotations", "gt.json"], "'gt.json' cannot be read"),
        (["bundle", "in", "--frames", "some"], "--frames"),
    ],
)
def test_bad_usage_is_one_sentence(
    detector: FakeDetector,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    sentence: str,
) -> None:
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("asag-detect: error: ")
    assert sentence in err
    assert err.count("\n") == 1
    assert outputs(folder) == []


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"asag-detect {__version__}\n"
    assert run("--help") == 0
    text = capsys.readouterr().out
    for option in ("--output-dir", "--json", "--coco", "--threshold", "--trace", "--backend", "--doctor"):
        assert option in text


def test_command_line_is_the_default(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["asag-detect", "--version"])
    assert cli.main() == 0
    assert __version__ in capsys.readouterr().out


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--doctor") == 0
    out = capsys.readouterr().out
    assert "onnxruntime" in out
    assert "tensorrt-rtx" in out


def test_doctor_looks_at_a_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    assert run("--doctor", str(bundle.path)) == 0
    assert f"bundle '{bundle.path}' is sound: tiny (fp32, untrained weights" in capsys.readouterr().out
    (bundle.path / "backbone.onnx").write_bytes(b"nonsense")
    assert run("--doctor", str(bundle.path)) == 2


def test_progress_bar_counts_frames(
    detector: FakeDetector, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a terminal on stderr there is a bar, which a failed file moves on too."""
    Path("in/aa.jpg").touch()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert run("bundle", "in", "--json", "r.json") == 1
    assert "/3" in capsys.readouterr().err


def test_options_are_checked_where_they_are_made() -> None:
    good = cli.parse_arguments(["bundle", "a", "b"])
    assert good.sources == ("a", "b")
    assert good.threshold == 0.3
    dashed = cli.parse_arguments(["--batch", "2", "--", "bundle", "-a.jpg", "--b"])
    assert dashed.sources == ("-a.jpg", "--b")
    assert dashed.batch == 2
    with pytest.raises(ConfigError, match="--batch"):
        cli.parse_arguments(["bundle", "a", "--batch", "-2"])
