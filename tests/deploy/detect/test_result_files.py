"""Results on disk: complete or absent, and never over a source."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from asag_deploy.detect.result_files import JsonList, ResultWriter, coco_image_ids, plan_pictures
from asag_deploy.errors import BackendError, ConfigError, OutputError
from asag_deploy.images.reading import read_image
from asag_deploy.images.sources import Frame, Source
from asag_deploy.images.writing import VideoFile, write_picture
from support.detection_samples import make_detections


def image_source(name: str | Path) -> Source:
    return Source(name=str(name), kind="image")


def picture(height: int = 80, width: int = 100) -> NDArray[np.uint8]:
    return np.full((height, width, 3), (40, 90, 160), dtype=np.uint8)


def frame(source: Source, index: int = 0, number: int = 0) -> Frame:
    return Frame(source=source, index=index, number=number, image=picture(), fps=12.0)


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


@contextmanager
def small_files_only() -> Iterator[None]:
    """Let no file grow beyond 4 KiB meanwhile."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("suffix", [".png", ".JPG", ".jpeg", ".webp", ".bmp", ".tif"])
def test_picture_in_every_format(tmp_path: Path, suffix: str) -> None:
    write_picture(tmp_path / f"a{suffix}", picture())
    assert np.abs(read_image(tmp_path / f"a{suffix}").astype(int) - picture()).max() <= 4
    assert files_in(tmp_path) == [f"a{suffix}"]


def test_picture_too_large_for_its_format(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    wide = np.zeros((2, 20_000, 3), dtype=np.uint8)
    with pytest.raises(OutputError, match=r"20000 x 2 pixels are too many for \.webp"):
        write_picture(tmp_path / "a.webp", wide)
    write_picture(tmp_path / "a.png", wide)
    assert files_in(tmp_path) == ["a.png"]
    assert capfd.readouterr().err == ""


def test_picture_on_a_full_disk_keeps_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "a.bmp").write_bytes(b"old")
    with small_files_only(), pytest.raises(OutputError, match=r"a\.bmp.*file too large"):
        write_picture(tmp_path / "a.bmp", picture())
    assert files_in(tmp_path) == ["a.bmp"]
    assert (tmp_path / "a.bmp").read_bytes() == b"old"


def test_video_on_a_full_disk(tmp_path: Path) -> None:
    def fill() -> None:
        noise = np.random.default_rng(0).integers(0, 256, (20, 96, 128, 3), dtype=np.uint8)
        with small_files_only(), VideoFile(tmp_path / "v.mp4", fps=12, height=96, width=128) as video:
            for image in noise:
                video.add(image)

    with pytest.raises(OutputError, match="is the disk full"):
        fill()
    assert files_in(tmp_path) == []


@pytest.mark.parametrize("items", [[], [1], [{"a": [1.5, "ü"]}, None, "x"]])
def test_json_list(tmp_path: Path, items: list[Any]) -> None:
    with JsonList(tmp_path / "out" / "a.json") as file:
        for item in items:
            file.append(item)
        assert not (tmp_path / "out" / "a.json").exists()
    assert json.loads((tmp_path / "out" / "a.json").read_text(encoding="utf-8")) == items
    assert files_in(tmp_path) == ["a.json"]


def test_json_list_is_dropped_by_an_exception(tmp_path: Path) -> None:
    def fail() -> None:
        with JsonList(tmp_path / "a.json") as file:
            file.append(1)
            raise RuntimeError("bug")

    with pytest.raises(RuntimeError, match="bug"):
        fail()
    assert files_in(tmp_path) == []


@pytest.mark.parametrize("length", [100_000, 6_000])
def test_json_list_on_a_full_disk(tmp_path: Path, length: int) -> None:
    """A limit on file sizes stands for the disk; the shorter text only meets it when the file is closed."""

    def fill() -> None:
        with small_files_only(), JsonList(tmp_path / "a.json") as file:
            file.append("x" * length)
            file.append(1)

    with pytest.raises(OutputError, match=r"a\.json.*file too large"):
        fill()
    assert files_in(tmp_path) == []


def test_json_list_where_a_folder_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"could not write '.*a\.json'"):
        JsonList(tmp_path / "file" / "a.json")


@pytest.mark.parametrize("shape", [(24, 32), (23, 31), (1, 1)])
def test_video(tmp_path: Path, shape: tuple[int, int]) -> None:
    with VideoFile(tmp_path / "v.mp4", fps=12, height=shape[0], width=shape[1]) as video:
        for i in range(6):
            video.add(np.full((*shape, 3), (40 * i, 0, 0), dtype=np.uint8))
        assert not (tmp_path / "v.mp4").exists()
    capture = cv2.VideoCapture(str(tmp_path / "v.mp4"))
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(12)
    stored = [capture.read()[1] for _ in range(6)]
    assert not capture.read()[0]
    assert stored[0].shape == (shape[0] + shape[0] % 2, shape[1] + shape[1] % 2, 3)
    assert stored[5][..., 2].mean() > 150
    assert stored[5][..., 0].mean() < 30
    assert files_in(tmp_path) == ["v.mp4"]


def test_video_of_an_impossible_size(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="20000 x 40 pixels"):
        VideoFile(tmp_path / "v.mp4", fps=12, height=40, width=20_000)
    assert files_in(tmp_path) == []


def test_video_that_lost_frames_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    video = VideoFile(tmp_path / "v.mp4", fps=12, height=24, width=32)
    video.add(picture(24, 32))
    monkeypatch.setattr("asag_deploy.images.writing._frames_in", lambda _path: 0)
    with pytest.raises(OutputError, match="is the disk full"), video:
        pass
    assert files_in(tmp_path) == []


def test_video_is_dropped_by_an_exception(tmp_path: Path) -> None:
    def fail() -> None:
        with VideoFile(tmp_path / "v.mp4", fps=12, height=24, width=32) as video:
            video.add(picture(24, 32))
            raise RuntimeError("bug")

    with pytest.raises(RuntimeError, match="bug"):
        fail()
    assert files_in(tmp_path) == []


def test_plan_gives_every_source_its_own_name() -> None:
    sources = [
        image_source("x/a.jpg"),
        image_source("y/a.jpg"),
        image_source("y/a-2.jpg"),
        image_source("z/A.JPG"),
        image_source("a.gif"),
        image_source("noext"),
        Source(name="x/a.mp4", kind="video"),
        Source(name="x/a.avi", kind="video"),
        Source(name="camera:0", kind="camera"),
    ]
    plan = plan_pictures(sources, Path("out"))
    assert [path.name for path in plan.values()][:2] == ["a.jpg", "a-2.jpg"]
    assert len({path.name.lower() for path in plan.values()}) == len(sources)
    assert plan[sources[4]].name == "a.png"
    assert plan[sources[5]].name == "noext.png"
    assert [plan[source].suffix for source in sources[6:]] == [".mp4"] * 3
    assert plan[sources[8]] == Path("out/camera-0.mp4")


def test_coco_ids_come_from_file_names_if_all_have_one() -> None:
    numbered = [image_source("a/000000000139.jpg"), image_source("a/000000000285.jpg")]
    assert coco_image_ids(numbered) == {numbered[0]: 139, numbered[1]: 285}
    assert coco_image_ids([*numbered, image_source("a/street.jpg")]) == {}
    assert coco_image_ids([*numbered, image_source("b/139.png")]) == {}
    assert coco_image_ids([Source(name="139.mp4", kind="video")]) == {}


def test_everything_about_images(tmp_path: Path) -> None:
    sources = [image_source("in/a.png"), image_source("in/b.png")]
    out = tmp_path / "out"
    with ResultWriter(
        sources, output_dir=out, json_file=tmp_path / "r.json", coco_file=tmp_path / "c.json", trace=True
    ) as writer:
        writer.add(frame(sources[1], number=1), make_detections())
    assert files_in(tmp_path) == ["b.png", "c.json", "r.json"]
    (entry,) = json.loads((tmp_path / "r.json").read_text())
    assert entry["source"] == "in/b.png"
    assert (entry["frame"], entry["image_id"], entry["width"]) == (0, 2, 100)
    results = json.loads((tmp_path / "c.json").read_text())
    assert [result["image_id"] for result in results] == [2, 2, 2]
    drawn = make_detections().plot(picture(), trace=True, channel_order="rgb")
    np.testing.assert_array_equal(read_image(out / "b.png"), drawn)


def test_videos_one_after_the_other(tmp_path: Path) -> None:
    sources = [Source(name="a.avi", kind="video"), Source(name="b.avi", kind="video")]
    with ResultWriter(sources, output_dir=tmp_path) as writer:
        for number in range(6):
            writer.add(frame(sources[number // 3], index=number % 3, number=number), make_detections())
            assert (tmp_path / "a.mp4").exists() == (number >= 3)
    assert files_in(tmp_path) == ["a.mp4", "b.mp4"]
    capture = cv2.VideoCapture(str(tmp_path / "b.mp4"))
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == 3
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(12)


@pytest.mark.parametrize(
    ("error", "kept"), [(KeyboardInterrupt(), True), (BackendError("no"), True), (RuntimeError("bug"), False)]
)
def test_what_is_kept_when_the_stream_ends_early(tmp_path: Path, error: BaseException, kept: bool) -> None:
    source = Source(name="a.avi", kind="video")

    def fail() -> None:
        with ResultWriter([source], output_dir=tmp_path, json_file=tmp_path / "r.json") as writer:
            writer.add(frame(source), make_detections())
            raise error

    with pytest.raises(type(error)):
        fail()
    assert files_in(tmp_path) == (["a.mp4", "r.json"] if kept else [])
    if kept:
        assert len(json.loads((tmp_path / "r.json").read_text())) == 1


def test_a_video_that_fails_does_not_take_the_json_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Source(name="a.avi", kind="video")
    monkeypatch.setattr("asag_deploy.images.writing._frames_in", lambda _path: 0)
    with (
        pytest.raises(OutputError, match=r"a\.mp4"),
        ResultWriter([source], output_dir=tmp_path, json_file=tmp_path / "r.json") as writer,
    ):
        writer.add(frame(source), make_detections())
    assert files_in(tmp_path) == ["r.json"]


def test_sources_are_never_overwritten(tmp_path: Path) -> None:
    source = image_source(tmp_path / "a.png")
    write_picture(tmp_path / "a.png", picture())
    with pytest.raises(ConfigError, match="is one of the sources"):
        ResultWriter([source], output_dir=tmp_path)
    with pytest.raises(ConfigError, match="is one of the sources"):
        ResultWriter([source], json_file=tmp_path / "sub" / ".." / "a.png")
    with pytest.raises(ConfigError, match="same file"):
        ResultWriter([source], json_file=tmp_path / "r.json", coco_file=tmp_path / "r.json")
    with pytest.raises(OutputError, match="is a folder"):
        ResultWriter([source], json_file=tmp_path)
    assert files_in(tmp_path) == ["a.png"]


def test_second_file_that_cannot_be_opened_drops_the_first(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"c\.json"):
        ResultWriter([], json_file=tmp_path / "r.json", coco_file=tmp_path / "file" / "c.json")
    assert files_in(tmp_path) == ["file"]
