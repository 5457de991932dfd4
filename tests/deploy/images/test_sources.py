"""Files, folders, globs, videos and cameras as one stream of frames."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from asag_deploy.errors import SourceError
from asag_deploy.images.sources import Failure, Frame, Source, count_frames, iter_frames, list_sources


def write_image(path: Path, colour: tuple[int, int, int] = (200, 100, 50)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 24), colour).save(path)
    return path


def write_video(path: Path, frames: int = 5) -> Path:
    """A video of 32 x 24 pixels at 10 frames a second, whose frames grow redder."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, (32, 24))
    for i in range(frames):
        writer.write(np.full((24, 32, 3), (0, 0, 40 * i), dtype=np.uint8))
    writer.release()
    return path


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
    write_video(tmp_path / "clip.avi")
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


@pytest.mark.parametrize(
    ("argument", "name"),
    [
        ("0", "camera:0"),
        ("camera:2", "camera:2"),
        ("camera:/dev/video1", "camera:/dev/video1"),
        ("camera:rtsp://host/stream", "camera:rtsp://host/stream"),
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


def test_nothing_at_all(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no sources given"):
        list_sources([])
    with pytest.raises(SourceError, match="none of the 2 sources"):
        list_sources([str(tmp_path / "*.png"), str(tmp_path)])


def test_images_are_rgb_frames(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.png")
    (frame,) = frames_of(path)
    assert isinstance(frame, Frame)
    assert (frame.index, frame.number, frame.fps) == (0, 0, None)
    assert frame.name == str(path)
    assert (frame.image == (200, 100, 50)).all()


def test_video_frames(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.avi", frames=5)
    frames = frames_of(path)
    assert [f.index for f in frames if isinstance(f, Frame)] == [0, 1, 2, 3, 4]
    last = frames[-1]
    assert isinstance(last, Frame)
    assert last.name == f"{path}#4"
    assert last.fps == pytest.approx(10)
    assert last.image.shape == (24, 32, 3)
    assert last.image[..., 0].mean() == pytest.approx(160, abs=6)
    assert last.image[..., 2].max() < 12


def test_bad_files_are_reported_and_the_rest_go_on(tmp_path: Path) -> None:
    good = [
        write_image(tmp_path / "a.png"),
        write_video(tmp_path / "v.avi", 2),
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
    image, video = write_image(tmp_path / "a.png"), write_video(tmp_path / "v.avi", 4)
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
    assert first.fps is None
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
