"""Files, folders, globs, videos and cameras as one stream of frames."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from asag_deploy.errors import SourceError
from asag_deploy.images.sources import Failure, Frame, Source, count_frames, iter_frames, list_sources
from support.videos import write_sound, write_video


def write_image(path: Path, colour: tuple[int, int, int] = (200, 100, 50)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 24), colour).save(path)
    return path


def write_avi(path: Path, frames: int = 5) -> Path:
    """A video of 32 x 24 pixels at 10 frames a second, whose frames grow redder."""

    def picture(height: int, width: int, index: int) -> NDArray[np.uint8]:
        return np.full((height, width, 3), (40 * index, 0, 0), dtype=np.uint8)

    return write_video(path, "mjpeg", frames=frames, picture=picture, size=(32, 24))


def names(arguments: list[str | Path]) -> list[str]:
    return [Path(source.name).name for source in list_sources([str(a) for a in arguments]).sources]


def frames_of(*arguments: Path) -> list[Frame | Failure]:
    return list(iter_frames(list_sources([str(a) for a in arguments]).sources))


def test_files_in_the_order_given_each_once(tmp_path: Path) -> None:
    b, a = write_image(tmp_path / "b.png"), write_image(tmp_path / "a.png")
    assert names([b, a, b]) == ["b.png", "a.png"]


def test_folder_is_sorted_and_not_entered_further(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpg", "inner/c.png", ".hidden.png"):
        write_image(tmp_path / name)
    write_avi(tmp_path / "clip.avi")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "folder.png").mkdir()
    listing = list_sources([str(tmp_path)])
    assert [Path(s.name).name for s in listing.sources] == ["a.jpg", "b.PNG", "clip.avi"]
    assert [s.kind for s in listing.sources] == ["image", "image", "video"]
    assert listing.failures == ()


def test_globs(tmp_path: Path) -> None:
    for name in ("a.png", "b.jpg", "deep/er/c.png"):
        write_image(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    assert names([tmp_path / "*.png"]) == ["a.png"]
    assert names([tmp_path / "*"]) == ["a.png", "b.jpg"]
    assert names([tmp_path / "**" / "*.png"]) == ["a.png", "c.png"]


def test_a_file_whose_name_looks_like_a_glob_or_a_camera(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_image(tmp_path / "a[1].png")
    assert names([tmp_path / "a[1].png"]) == ["a[1].png"]
    monkeypatch.chdir(tmp_path)
    write_image(tmp_path / "0.png").rename("0")
    assert list_sources(["0"]).sources == (Source(name="0", kind="image"),)
    clips = ["camera:0.avi", "camera:rtsp:a.avi", "udp:a.avi", "tcp:a.avi", "file:a.avi"]
    for name in clips:
        (tmp_path / name).write_bytes(write_avi(tmp_path / ".clip.avi", 2).read_bytes())
    for arguments in (clips, ["."]):
        found = [source for source in list_sources(arguments).sources if source.kind == "video"]
        assert sorted(source.name for source in found) == sorted(clips)
        assert all(source.is_file for source in found)
        assert len(list(iter_frames(found))) == 2 * len(clips)


@pytest.mark.parametrize(
    ("argument", "name"),
    [
        ("0", "camera:0"),
        ("camera:2", "camera:2"),
        ("camera:/dev/video1", "camera:/dev/video1"),
    ],
)
def test_cameras(argument: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert list_sources([argument]).sources == (Source(name=name, kind="camera"),)


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [("empty", "holds no images or videos"), ("*.png", "matches no images"), ("camera:", "names no camera")],
)
def test_what_stands_for_nothing(
    argument: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match=sentence):
        list_sources([argument])
    write_image(tmp_path / "good.jpg")
    listing = list_sources([argument, "good.jpg"])
    assert [source.name for source in listing.sources] == ["good.jpg"]
    assert [failure.source for failure in listing.failures] == [argument]
    assert sentence in listing.failures[0].message


def test_a_folder_whose_subfolders_alone_hold_some_says_how_to_name_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    inner = tmp_path / "photos [1]" / "a" / "b"
    inner.mkdir(parents=True)
    (tmp_path / "photos [1]" / ".trash").mkdir()
    for name in ("a/notes.txt", "a/b/.hidden.jpg", ".trash/old.jpg"):
        (tmp_path / "photos [1]" / name).write_text("none")
    with pytest.raises(SourceError, match=r"^folder 'photos \[1\]' holds no images or videos$"):
        list_sources(["photos [1]"])
    write_image(inner / "good.jpg")
    with pytest.raises(SourceError, match=r"but its subfolders do: give '.*' in quotes") as caught:
        list_sources(["photos [1]"])
    glob = str(caught.value).split("give '")[1].split("' in quotes")[0]
    assert [source.name for source in list_sources([glob]).sources] == ["photos [1]/a/b/good.jpg"]


def test_nothing_at_all(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no sources given"):
        list_sources([])
    with pytest.raises(SourceError, match="none of the 2 sources"):
        list_sources([str(tmp_path / "*.png"), str(tmp_path)])


def test_images_are_rgb_frames(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.png")
    (frame,) = frames_of(path)
    assert isinstance(frame, Frame)
    assert (frame.index, frame.number, frame.time, frame.frames) == (0, 0, None, 1)
    assert frame.name == str(path)
    assert (frame.image == (200, 100, 50)).all()


def test_video_frames(tmp_path: Path) -> None:
    path = write_avi(tmp_path / "clip.avi", frames=5)
    frames = frames_of(path)
    assert [f.index for f in frames if isinstance(f, Frame)] == [0, 1, 2, 3, 4]
    last = frames[-1]
    assert isinstance(last, Frame)
    assert last.name == f"{path}#4"
    assert (last.time, last.duration) == pytest.approx((0.4, 0.1))
    assert last.image.shape == (24, 32, 3)
    assert last.image[..., 0].mean() == pytest.approx(160, abs=6)
    assert last.image[..., 2].max() < 20


def test_bad_files_are_reported_and_the_rest_go_on(tmp_path: Path) -> None:
    good = [
        write_image(tmp_path / "a.png"),
        write_avi(tmp_path / "v.avi", 2),
        write_image(tmp_path / "z.png"),
    ]
    empty, broken, missing = tmp_path / "empty.jpg", tmp_path / "broken.mp4", tmp_path / "missing.mp4"
    empty.touch()
    broken.write_bytes(b"not a video" * 50)
    items = frames_of(good[0], empty, broken, good[1], missing, tmp_path / "gone.png", good[2])
    kinds = [type(item).__name__ for item in items]
    assert kinds == ["Frame", "Failure", "Failure", "Frame", "Frame", "Failure", "Failure", "Frame"]
    messages = [item.message for item in items if isinstance(item, Failure)]
    for message, path, reason in zip(
        messages,
        (empty, broken, missing, tmp_path / "gone.png"),
        ("is empty", "no frames", "does not exist", "does not exist"),
        strict=True,
    ):
        assert str(path) in message
        assert reason in message
    assert [item.number for item in items if isinstance(item, Frame)] == [0, 3, 4, 7]


def test_counting(tmp_path: Path) -> None:
    image, video = write_image(tmp_path / "a.png"), write_avi(tmp_path / "v.avi", 4)
    sources = list_sources([str(image), str(video)]).sources
    assert count_frames(sources) == 5
    assert count_frames([*sources, Source(name=str(tmp_path / "gone.mp4"), kind="video")]) == 6
    assert count_frames([*sources, Source(name="camera:0", kind="camera")]) is None


class FakeCapture:
    """Stands for cv2.VideoCapture on a camera that gives a few pictures."""

    opened: list[Any]
    released = 0
    pictures = 3

    def __init__(self, address: int | str) -> None:
        FakeCapture.opened.append(address)
        self._left = FakeCapture.pictures

    def get(self, _what: int) -> float:
        return 0.0

    def read(self) -> tuple[bool, NDArray[np.uint8] | None]:
        if self._left == 0:
            return False, None
        self._left -= 1
        return True, np.full((4, 6, 3), (10, 20, 30), dtype=np.uint8)

    def release(self) -> None:
        FakeCapture.released += 1


@pytest.fixture
def camera(monkeypatch: pytest.MonkeyPatch) -> type[FakeCapture]:
    FakeCapture.opened, FakeCapture.released, FakeCapture.pictures = [], 0, 3
    monkeypatch.setattr(cv2, "VideoCapture", FakeCapture)
    return FakeCapture


def test_camera_gives_frames_until_it_breaks_off(camera: type[FakeCapture]) -> None:
    items = list(iter_frames([Source(name="camera:1", kind="camera")]))
    assert camera.opened == [1]
    assert [type(item) for item in items] == [Frame, Frame, Frame, Failure]
    first, last = items[0], items[-1]
    assert isinstance(first, Frame)
    assert isinstance(last, Failure)
    assert (first.image == (30, 20, 10)).all()
    assert first.time == 0
    assert "broke off after 3 frames" in last.message
    assert camera.released == 1


def test_camera_is_released_when_the_caller_stops(camera: type[FakeCapture]) -> None:
    frames = iter_frames([Source(name="camera:/dev/video7", kind="camera")])
    next(frames)
    assert camera.opened == ["/dev/video7"]
    assert camera.released == 0
    frames.close()  # type: ignore[attr-defined]
    assert camera.released == 1


def test_absent_camera(camera: type[FakeCapture]) -> None:
    camera.pictures = 0
    (item,) = iter_frames([Source(name="camera:0", kind="camera")])
    assert isinstance(item, Failure)
    assert "'camera:0' gives no pictures" in item.message


@pytest.mark.parametrize(
    ("argument", "name", "kind", "address"),
    [
        ("rtsp://host/stream", "rtsp://host/stream", "camera", None),
        ("camera:rtsp://host/stream", "rtsp://host/stream", "camera", None),
        ("RTSP://u:p%40ss@host:554/a?b=1", "rtsp://u:***@host:554/a?b=1", "camera", "rtsp://u:p%40ss@host:554/a?b=1"),
        ("https://host/x.mp4?token=abc&n=2", "https://host/x.mp4?token=***&n=2", "video", None),
        ("HTTP://a:b@c@host/", "http://a:***@host/", "video", "http://a:b@c@host/"),
        ("udp:@239.0.0.1:1234", "udp://@239.0.0.1:1234", "camera", None),
        ("srt://host:9?passphrase=hush", "srt://host:9?passphrase=***", "camera", "srt://host:9?passphrase=hush"),
    ],
)  # fmt: skip
def test_addresses(argument: str, name: str, kind: str, address: str | None) -> None:
    (source,) = list_sources([argument]).sources
    assert (source.name, source.kind, source.is_file) == (name, kind, False)
    if address is not None:
        assert source.address == address
    assert "ss@" not in repr(source)
    assert "hush" not in repr(source)


def test_an_address_that_does_not_answer(tmp_path: Path) -> None:
    (item,) = iter_frames(list_sources(["rtsp://me:secret@127.0.0.1:9/x"]).sources)
    assert isinstance(item, Failure)
    assert item.message.startswith("'rtsp://me:***@127.0.0.1:9/x' gives no pictures: connection refused")
    assert "secret" not in repr(item)


def test_devices_and_pipes(tmp_path: Path) -> None:
    assert list_sources(["/dev/video7"]).sources == (Source(name="camera:/dev/video7", kind="camera"),)
    with pytest.raises(SourceError, match="'/dev/zero' is a device and no camera"):
        list_sources(["/dev/zero"])
    content = write_video(tmp_path / "a.ts", "mpeg2video", frames=3).read_bytes()
    os.mkfifo(tmp_path / "pipe.ts")
    sources = list_sources([str(tmp_path / "pipe.ts")]).sources
    assert count_frames(sources) is None
    with ThreadPoolExecutor(1) as pool:
        pool.submit((tmp_path / "pipe.ts").write_bytes, content)
        assert [isinstance(item, Frame) for item in iter_frames(sources)] == [True] * 3


def test_file_addresses(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a b\u00fc.png")
    for argument in (path.as_uri(), f"FILE://{path}", f"file:{path}"):
        assert list_sources([argument]).sources == (Source(name=str(path), kind="image"),)


def test_videos_are_known_by_what_they_hold(tmp_path: Path) -> None:
    """Whatever they are called, if they are named; in a folder, if a video may be called so."""
    for suffix in ("ts", "mts", "m2ts", "flv", "3gp", "ogv", "mxf"):
        codec = {"flv": "flv", "3gp": "h263", "ogv": "libvpx"}.get(suffix, "mpeg2video")
        options = {"size": (720, 576), "rate": 25} if suffix == "mxf" else {}
        write_video(tmp_path / f"a.{suffix}", codec, frames=1, **options)  # type: ignore[arg-type]
    (tmp_path / "a.ts").rename(tmp_path / "a.TS")
    (tmp_path / "module.ts").write_text("export const G = 'G';\n" * 200)
    (tmp_path / "tune.mod").write_bytes(b"M.K." * 500)
    (tmp_path / "types.mts").write_text("G" * 2000)
    for name in ("music.ogg", "voice"):
        write_sound(tmp_path / name)
    found = list_sources([str(tmp_path)]).sources
    names = ["a.3gp", "a.TS", "a.flv", "a.m2ts", "a.mts", "a.mxf", "a.ogv", "types.mts"]
    assert [Path(source.name).name for source in found if source.kind == "video"] == names[:-1]
    for number, (source, target) in enumerate(zip(found, ("clip", "b.jpg", "c.dat", "d"), strict=False)):
        renamed = Path(source.name).rename(tmp_path / target)
        (named,) = list_sources([str(renamed)]).sources
        assert named.kind == "video", number
        assert all(isinstance(item, Frame) for item in iter_frames([named]))
    image = write_image(tmp_path / "x.png").rename(tmp_path / "x.mp4")
    assert list_sources([str(image)]).sources[0].kind == "image"


@pytest.mark.parametrize(
    "name",
    [b"\xff.png", b"new\nline.png", b" .png", b"-x.png", b"[ab].png", b"a.PNG ", b"\xfe", b'"\x1b[31m.png'],
)
def test_names_that_a_file_system_allows(tmp_path: Path, name: bytes) -> None:
    good = write_image(tmp_path / "good.png")
    strange = os.fsencode(tmp_path) + b"/in/" + name
    (tmp_path / "in").mkdir()
    os.rename(good, strange)  # noqa: PTH104 (bytes are no path)
    for argument in (os.fsdecode(strange), str(tmp_path / "in"), str(tmp_path / "in" / "*")):
        (frame,) = iter_frames(list_sources([argument]).sources)
        assert isinstance(frame, Frame)
        assert os.fsencode(frame.name) == strange
    video = write_video(tmp_path / "v.avi", frames=2)
    os.rename(video, strange)  # noqa: PTH104
    assert len(frames_of(Path(os.fsdecode(strange)))) == 2


def test_names_that_are_none() -> None:
    with pytest.raises(SourceError, match="an empty name"):
        list_sources([""])
    (item,) = iter_frames(list_sources(["a\0b"]).sources)
    assert isinstance(item, Failure)
    assert "null byte" in item.message


def test_animations_and_pages(tmp_path: Path) -> None:
    """The first frame, and how many there are; or all of them, with their times."""
    pictures = [Image.new("RGB", (16, 16), (60 * i, 0, 200)) for i in range(3)]
    for name, options in (
        ("a.gif", {"duration": [100, 300, 500]}),
        ("a.png", {"duration": 200}),
        ("a.tif", {}),
    ):
        pictures[0].save(tmp_path / name, save_all=True, append_images=pictures[1:], **options)
    first = frames_of(tmp_path / "a.gif", tmp_path / "a.png", tmp_path / "a.tif")
    assert [(item.time, item.frames) for item in first if isinstance(item, Frame)] == [(None, 3)] * 3
    listing = list_sources([str(tmp_path)], all_frames=True)
    assert [source.kind for source in listing.sources] == ["animation", "animation", "pages"]
    assert count_frames(listing.sources) == 9
    frames = [item for item in iter_frames(listing.sources) if isinstance(item, Frame)]
    assert [frame.number for frame in frames] == list(range(9))
    assert [frame.time for frame in frames] == pytest.approx([0, 0.1, 0.4, 0, 0.2, 0.4, None, None, None])
    assert [frame.image[0, 0, 0] for frame in frames] == pytest.approx([0, 60, 120] * 3, abs=2)
    data = (tmp_path / "a.gif").read_bytes()
    (tmp_path / "a.gif").write_bytes(data[: len(data) - 20])
    *rest, failure = iter_frames(list_sources([str(tmp_path / "a.gif")], all_frames=True).sources)
    assert isinstance(failure, Failure)
    assert failure.frames == len(rest) == 2
