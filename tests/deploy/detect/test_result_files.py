"""Results on disk: complete or absent, and never over a source."""

from __future__ import annotations

import json
import os
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from asag_deploy.detect.result_files import JsonList, ResultWriter, plan_pictures
from asag_deploy.errors import BackendError, ConfigError, OutputError
from asag_deploy.images.reading import read_image
from asag_deploy.images.sources import Frame, Source
from asag_deploy.images.video_writing import VideoFile
from asag_deploy.images.writing import write_picture
from support.detection_samples import make_detections
from support.videos import noise, stored


def image_source(name: str | Path) -> Source:
    return Source(name=str(name), kind="image")


def picture(height: int = 80, width: int = 100) -> NDArray[np.uint8]:
    return np.full((height, width, 3), (40, 90, 160), dtype=np.uint8)


def frame(source: Source, index: int = 0, number: int = 0) -> Frame:
    return Frame(source=source, index=index, number=number, image=picture(), time=index / 12, duration=1 / 12)


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


@contextmanager
def small_files_only(size: int = 4096) -> Iterator[None]:
    """Let no file grow beyond `size` bytes meanwhile."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
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


def fill(path: Path, room: int) -> int:
    """Write a video on a disk with so much room; return how many frames were taken before it was full."""
    added = 0
    video = VideoFile(path, height=96, width=128)
    with pytest.raises(OutputError) as caught, video, small_files_only(room):  # noqa: PT012
        for index in range(200):
            video.add(noise(96, 128, index), time=index / 12)
            added += 1
    found = re.search(r"v\.mp4': file too large(; its first (\d+) frames are kept)?$", str(caught.value))
    assert found is not None
    assert added < 150
    return int(found[2] or 0)


def test_video_on_a_full_disk(tmp_path: Path) -> None:
    """It stops at once, and keeps what is whole."""
    assert fill(tmp_path / "v.mp4", 4096) == 0
    assert files_in(tmp_path) == []
    kept = fill(tmp_path / "v.mp4", 200_000)
    assert kept > 10
    times, _ = stored(tmp_path / "v.mp4")
    assert times == pytest.approx([index / 12 for index in range(kept)], abs=1e-3)
    assert files_in(tmp_path) == ["v.mp4"]


def test_everything_on_a_full_disk(tmp_path: Path) -> None:
    """The run ends with the video's sentence; what was found until then is in the JSON."""
    source = Source(name="a.avi", kind="video")

    def fill() -> None:
        writer = ResultWriter([source], output_dir=tmp_path / "out", json_file=tmp_path / "r.json")
        with writer, small_files_only(100_000):
            for index in range(100):
                image = noise(80, 100, index)
                item = Frame(source=source, index=index, number=index, image=image, time=index / 10)
                writer.add(item, make_detections())

    with pytest.raises(OutputError, match=r"(a\.mp4|r\.json)': file too large; its first \d+ .* are kept"):
        fill()
    assert files_in(tmp_path) == ["a.mp4", "r.json"]
    entries = json.loads((tmp_path / "r.json").read_text())
    assert [entry["frame"] for entry in entries] == list(range(len(entries)))
    assert len(entries) > 20


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


@pytest.mark.parametrize("length", [10, 200, 1000, 6_000])
def test_json_list_on_a_full_disk(tmp_path: Path, length: int) -> None:
    """A limit on file sizes stands for the disk.  The items that fit end well."""

    def fill() -> None:
        with small_files_only(), JsonList(tmp_path / "a.json") as file:
            for _ in range(1000):
                file.append("x" * length)

    with pytest.raises(OutputError, match=r"a\.json': file too large; "):
        fill()
    kept = json.loads((tmp_path / "a.json").read_text())
    assert kept == ["x" * length] * len(kept)
    assert len(kept) >= 4096 // (length + 5) - 1
    assert files_in(tmp_path) == ["a.json"]


def test_json_list_that_is_full_at_its_end(tmp_path: Path) -> None:
    """There is room for the item, but not for the bracket behind it."""
    with pytest.raises(OutputError, match="its first 1 results are kept"):  # noqa: PT012, SIM117
        with small_files_only(), JsonList(tmp_path / "a.json") as file:
            file.append("x")
            file.append("y" * (4096 - 11))
    assert json.loads((tmp_path / "a.json").read_text()) == ["x"]


def test_names_that_are_no_unicode_in_json(tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff\xfe \xc3\xa9.png")
    with JsonList(tmp_path / "a.json") as file:
        file.append({"source": name})
        file.append({"source": "\u00e9"})
    content = (tmp_path / "a.json").read_bytes()
    assert b"\\udcff\\udcfe \\u00e9.png" in content
    assert "\u00e9".encode() in content
    assert os.fsencode(json.loads(content)[0]["source"]) == os.fsencode(name)


def test_json_list_where_a_folder_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"could not write '.*a\.json'"):
        JsonList(tmp_path / "file" / "a.json")


@pytest.mark.parametrize("shape", [(24, 32), (23, 31), (1, 1)])
def test_video(tmp_path: Path, shape: tuple[int, int]) -> None:
    """H.264 in what browsers play, with the index in front."""
    with VideoFile(tmp_path / "v.mp4", height=shape[0], width=shape[1]) as video:
        for i in range(6):
            video.add(np.full((*shape, 3), (40 * i, 0, 0), dtype=np.uint8), time=i / 12)
        assert not (tmp_path / "v.mp4").exists()
    times, stream = stored(tmp_path / "v.mp4")
    assert times == pytest.approx([i / 12 for i in range(6)], abs=1e-4)
    assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
    assert float(stream.duration * stream.time_base) == pytest.approx(0.5, abs=1e-3)
    content = (tmp_path / "v.mp4").read_bytes()
    assert content.find(b"moov") < content.find(b"mdat")
    capture = cv2.VideoCapture(str(tmp_path / "v.mp4"))
    images = [capture.read()[1] for _ in range(6)]
    assert not capture.read()[0]
    assert images[0].shape == (shape[0] + shape[0] % 2, shape[1] + shape[1] % 2, 3)
    assert images[5].reshape(-1, 3).mean(axis=0) == pytest.approx((0, 0, 200), abs=8)
    assert files_in(tmp_path) == ["v.mp4"]


@pytest.mark.parametrize("begin", [0, 2])
def test_times_are_kept(tmp_path: Path, begin: int) -> None:
    """That of the first, too, before which there may be sound."""
    given = [begin + time for time in (0, 0.033, 0.1, 0.101, 1, 5)]
    with VideoFile(tmp_path / "v.mp4", height=24, width=32) as video:
        for index, time in enumerate(given):
            video.add(noise(24, 32, index), time=time, duration=0.5)
    times, stream = stored(tmp_path / "v.mp4")
    assert times == pytest.approx(given, abs=1e-4)
    assert float(stream.duration * stream.time_base) == pytest.approx(5.5, abs=1e-3)


def test_times_that_stand_still_and_pictures_that_grow(tmp_path: Path) -> None:
    with VideoFile(tmp_path / "v.mp4", height=24, width=32) as video:
        for time, side in ((0.0, 24), (0.0, 24), (1.0, 48), (0.5, 12)):
            video.add(noise(side, 2 * side // 3 * 2, 0), time=time)
    times, stream = stored(tmp_path / "v.mp4")
    assert times == pytest.approx([0, 0, 1, 1], abs=1e-3)
    assert len(set(times)) == 4
    assert (stream.width, stream.height) == (32, 24)
    assert video.scaled == 2


def test_another_encoder_where_there_is_none_for_h264(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Source(name="a.avi", kind="video")
    encoders = {"no_such": {}, "mpeg4": {"q:v": "3"}}
    monkeypatch.setattr("asag_deploy.images.video_writing._ENCODERS", encoders)
    with ResultWriter([source], output_dir=tmp_path) as writer:
        for index in range(3):
            writer.add(frame(source, index), make_detections())
    assert "browsers do not play" in writer.notes[0]
    times, stream = stored(tmp_path / "a.mp4")
    assert stream.codec_context.name == "mpeg4"
    assert times == pytest.approx([0, 1 / 12, 2 / 12], abs=1e-4)


def test_video_of_an_impossible_size(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="20000 x 40 pixels"):
        VideoFile(tmp_path / "v.mp4", height=40, width=20_000)
    assert files_in(tmp_path) == []


def test_video_on_a_disk_that_is_full_before_it_begins(tmp_path: Path) -> None:
    with (
        small_files_only(1),
        pytest.raises(OutputError, match=r"could not write '.*v\.mp4': file too large$"),
    ):
        VideoFile(tmp_path / "v.mp4", height=24, width=32)
    assert files_in(tmp_path) == []


def test_video_is_dropped_by_an_exception(tmp_path: Path) -> None:
    def fail() -> None:
        with VideoFile(tmp_path / "v.mp4", height=24, width=32) as video:
            video.add(picture(24, 32), time=0)
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


def test_names_at_the_limit_keep_to_it(tmp_path: Path) -> None:
    long = "\u00fc" * 125
    sources = [Source(name=f"{folder}/{long}.ts", kind="video") for folder in "abc"]
    names = [path.name for path in plan_pictures(sources, tmp_path).values()]
    assert len(set(names)) == 3
    assert all(len(os.fsencode(name)) <= 255 and name.endswith(".mp4") for name in names)


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
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(12, rel=0.01)


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
    (tmp_path / "link").symlink_to("a.png")
    (tmp_path / "r").symlink_to("s")
    (tmp_path / "s").symlink_to("t.json")
    with pytest.raises(ConfigError, match="is one of the sources"):
        ResultWriter([source], json_file=tmp_path / "link")
    with pytest.raises(ConfigError, match="same file"):
        ResultWriter([source], json_file=tmp_path / "r", coco_file=tmp_path / "t.json")
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(OutputError, match="too many levels of symbolic links"):
        ResultWriter([source], json_file=tmp_path / "circle")
    ResultWriter([source], json_file=Path("/dev/null"), coco_file=Path("/dev/null")).__exit__(
        None, None, None
    )
    (tmp_path / "bundle").mkdir()
    (tmp_path / "ids.json").touch()
    inputs = [tmp_path / "bundle", tmp_path / "ids.json"]
    with pytest.raises(ConfigError, match="lies in the bundle"):
        ResultWriter([source], coco_file=tmp_path / "bundle" / "manifest.json", inputs=inputs)
    with pytest.raises(ConfigError, match="is one of the sources"):
        ResultWriter([source], coco_file=tmp_path / "ids.json", inputs=inputs)
    for name in ("link", "r", "s", "ids.json"):
        (tmp_path / name).unlink()
    assert files_in(tmp_path) == ["a.png"]


@pytest.mark.parametrize("content", [b'{"images": []}', b"\x89PNG", b"notes", b'[{"name": "x"}]', b"[1, 2]"])
def test_what_holds_no_results_is_not_replaced(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "instances.json"
    file.write_bytes(content)
    for outputs in ({"json_file": file}, {"coco_file": file}):
        with pytest.raises(OutputError, match="holds something else than results"):
            ResultWriter([], **outputs)  # type: ignore[arg-type]
    assert file.read_bytes() == content
    for earlier in (b"", b"\n[\n]\n"):
        file.write_bytes(earlier)
        with ResultWriter([], json_file=file):
            pass
        assert json.loads(file.read_bytes()) == []


@pytest.mark.parametrize("name", ["a.png", "a.JPG", "a.webp", "a.bmp", "a.tif", "a.avi", "a.gif"])
def test_only_what_a_run_of_ours_wrote_is_replaced(tmp_path: Path, name: str) -> None:
    kind: Any = {"a.avi": "video", "a.gif": "animation"}.get(name, "image")
    source = Source(name=name, kind=kind)
    out = plan_pictures([source], tmp_path)[source]
    photo = cv2.imencode(".png", picture())[1].tobytes()
    for foreign in (photo, b"\0" * 10_000):
        out.write_bytes(foreign)
        with pytest.raises(OutputError, match="holds something else than what asag-detect wrote"):
            ResultWriter([source], output_dir=tmp_path)
        assert out.read_bytes() == foreign
    out.write_bytes(b"")
    for _ in range(2):
        with ResultWriter([source], output_dir=tmp_path) as writer:
            writer.add(frame(source), make_detections())
    assert files_in(tmp_path) == [out.name]


def test_pages_of_another_program_are_not_replaced(tmp_path: Path) -> None:
    source = Source(name="a.tif", kind="pages")
    page = plan_pictures([source], tmp_path)[source] / "page-2.tif"
    page.parent.mkdir()
    page.write_bytes(b"II*\0 a scan")
    with pytest.raises(OutputError, match=r"page-2\.tif' is there and holds something else"):
        ResultWriter([source], output_dir=tmp_path)
    page.unlink()
    for _ in range(2):
        with ResultWriter([source], output_dir=tmp_path) as writer:
            writer.add(frame(source), make_detections())
            writer.add(frame(source, 1), make_detections())
    assert files_in(tmp_path) == ["page-1.tif", "page-2.tif"]


def test_second_file_that_cannot_be_opened_drops_the_first(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"c\.json"):
        ResultWriter([], json_file=tmp_path / "r.json", coco_file=tmp_path / "file" / "c.json")
    assert files_in(tmp_path) == ["file"]
