"""Videos of which a part is missing: a hole, a piece of a list, the end of what comes through a pipe."""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from asag_deploy.errors import SourceError
from asag_deploy.images.sources import Failure, iter_frames, list_sources
from asag_deploy.images.video_containers import condition
from asag_deploy.images.videos import Video, VideoFrame
from support.videos import write_video


def read(path: Path) -> tuple[list[VideoFrame], str | None]:
    with Video("clip", path) as video:
        return list(video.frames()), video.problem


@pytest.mark.parametrize(
    ("suffix", "codec"),
    [
        ("webm", "libvpx"),
        ("webm", "libvpx-vp9"),
        ("mkv", "mpeg4"),
        ("mp4", "libx264"),
        ("avi", "mpeg4"),
        ("ts", "mpeg2video"),
        ("mpg", "mpeg2video"),
        ("ogv", "libvpx"),
        ("flv", "flv"),
        ("avi", "mjpeg"),
        ("mov", "mjpeg"),
    ],
)
def test_a_hole_in_the_middle(tmp_path: Path, suffix: str, codec: str) -> None:
    """Zeros, as a download leaves where something is missing; noise may still be a picture."""
    path = write_video(tmp_path / f"a.{suffix}", codec, frames=8, rate=25)
    data = bytearray(path.read_bytes())
    size = min(1500, len(data) // 6)
    data[len(data) // 2 : len(data) // 2 + size] = bytes(size)
    path.write_bytes(data)
    frames, problem = read(path)
    assert 2 <= len(frames) <= 8
    assert problem is not None
    assert "is damaged" in problem or "broke off" in problem


def test_plain_pictures_have_no_hole(tmp_path: Path) -> None:
    """Though whole JPEG images of them may be zeros."""
    path = write_video(
        tmp_path / "a.avi",
        "mjpeg",
        picture=lambda height, width, _: np.zeros((height, width, 3), np.uint8),
        size=(640, 480),
    )
    assert bytes(256) in path.read_bytes()
    frames, problem = read(path)
    assert (len(frames), problem) == (6, None)


@pytest.mark.parametrize(
    ("suffix", "codec", "part"),
    [
        ("vob", "mpeg2video", b"\x00\x00\x01\xba"),
        ("mxf", "mpeg2video", bytes.fromhex("060e2b34")),
        ("dv", "dvvideo", b"\x1f\x07\x00\xbf"),
        ("avi", "mpeg4", b"movi"),
    ],
)
def test_a_hole_where_a_part_begins(tmp_path: Path, suffix: str, codec: str, part: bytes) -> None:
    """FFmpeg goes on where it finds another; zeros that fill up the place before one are no hole."""
    path = write_video(tmp_path / f"a.{suffix}", codec, frames=8, rate=25)
    assert condition(path) == "whole"
    data = path.read_bytes()
    place = data.find(part) if suffix == "avi" else data.find(part, len(data) // 2)
    path.write_bytes(data[:place] + bytes(600) + data[place + 600 :])
    assert condition(path) == "damaged"
    if suffix == "vob":
        path.write_bytes(data[:place] + bytes(600) + data[place:])
        assert condition(path) == "whole"


@pytest.mark.parametrize(
    ("suffix", "codec", "part", "said"),
    [
        ("mkv", "mpeg4", 1.0, None),
        ("mkv", "mpeg4", 0.5, r"'clip' broke off after \d+ of 30 frames"),
        ("webm", "libvpx", 0.5, r"'clip' broke off after \d+ of 30 frames"),
        ("mp4", "mpeg4", 0.5, "video 'clip' has no frames that can be decoded; it ends early or is no video"),
    ],
)
def test_what_comes_through_a_pipe_is_held_against_its_header(
    tmp_path: Path, suffix: str, codec: str, part: float, said: str | None
) -> None:
    whole = write_video(tmp_path / f"whole.{suffix}", codec, frames=30).read_bytes()
    pipe = tmp_path / f"pipe.{suffix}"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as others:
        others.submit(pipe.write_bytes, whole[: int(len(whole) * part)])
        try:
            _, problem = read(pipe)
        except SourceError as error:
            problem = str(error)
    assert (problem, said) == (None, None) or re.fullmatch(said or "", problem or ""), problem


@pytest.mark.parametrize(
    ("missing", "frames", "said"),
    [
        ("list2.ts", 6, "broke off after 6 of 9 frames"),
        ("list1.ts", 7, "is damaged: a part of it is missing between its 7 frames"),
    ],
)
@pytest.mark.parametrize("is_empty", [False, True])
def test_a_part_of_a_playlist_that_is_not_there_is_told(
    tmp_path: Path, missing: str, frames: int, said: str, is_empty: bool
) -> None:
    options = {"hls_time": "0.3", "hls_list_size": "0"}
    path = write_video(tmp_path / "list.m3u8", "libx264", frames=9, options=options)
    choice = tmp_path / "choice.m3u8"
    choice.write_text("#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=9\nlist.m3u8\n")
    assert len(read(choice)[0]) == 9
    (tmp_path / missing).unlink()
    if is_empty:
        (tmp_path / missing).touch()
    *found, failure = iter_frames(list_sources([str(path)]).sources)
    assert isinstance(failure, Failure)
    assert (len(found), failure.message) == (frames, f"'{path}' {said}")


@pytest.mark.parametrize(
    ("suffix", "codec", "begin", "size"),
    [
        ("mp4", "libx264", 0.95, 1.0),  # where a decoder with threads says nothing of what it cannot decode
        ("flv", "libx264", 0.95, 1.0),
        ("wmv", "wmv2", 0.5, 0.2),
        ("ogv", "libvpx", 0.5, 0.1),
    ],
)
@pytest.mark.parametrize("filling", [b"\0", b"\x5a"])
def test_what_was_lost_of_a_file_that_keeps_its_length(
    tmp_path: Path, suffix: str, codec: str, begin: float, size: float, filling: bytes
) -> None:
    options = {"movflags": "faststart"} if suffix == "mp4" else {}
    b_frames = 2 if codec == "libx264" else 0
    path = write_video(
        tmp_path / f"a.{suffix}", codec, frames=20, rate=25, b_frames=b_frames, options=options
    )
    data = path.read_bytes()
    first = int(len(data) * begin)
    hole = min(int(len(data) * size), len(data) - first)
    path.write_bytes(data[:first] + filling * hole + data[first + hole :])
    frames, problem = read(path)
    assert 0 < len(frames) <= 20
    assert problem is not None
    assert "is damaged" in problem or "broke off" in problem
