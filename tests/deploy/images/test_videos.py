"""Videos: every frame, upright, at its time; whole files are whole, and what is missing of others is said."""

from __future__ import annotations

import io
import re
import struct
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.video.stream import VideoStream
from numpy.typing import NDArray
from PIL import Image

from asag_deploy.errors import SourceError
from asag_deploy.images.sources import list_sources
from asag_deploy.images.video_containers import condition, container_of
from asag_deploy.images.videos import Video, VideoFrame
from support.videos import noise, write_sound, write_video

WHOLE = [
    ("mp4", "libx264", 2), ("mp4", "mpeg4", 0), ("mp4", "libvpx-vp9", 0), ("mov", "mjpeg", 0),
    ("mov", "prores", 0), ("mov", "qtrle", 0), ("3gp", "h263", 0), ("3g2", "mpeg4", 0),
    ("f4v", "libx264", 0), ("mkv", "libx264", 2), ("mkv", "ffv1", 0), ("webm", "libvpx", 0),
    ("webm", "libvpx-vp9", 0), ("avi", "mpeg4", 2), ("avi", "mjpeg", 0), ("avi", "rawvideo", 0),
    ("mpg", "mpeg1video", 0), ("mpg", "mpeg2video", 2), ("vob", "mpeg2video", 0), ("ts", "libx264", 2),
    ("m2ts", "mpeg2video", 0), ("flv", "flv", 0), ("flv", "libx264", 2), ("wmv", "wmv2", 0),
    ("wmv", "libx264", 2),
    ("mxf", "mpeg2video", 2), ("mxf", "libx264", 2), ("asf", "msmpeg4v3", 0),
    ("ogv", "libvpx", 0), ("y4m", "rawvideo", 0), ("ivf", "libvpx", 0),
    ("dv", "dvvideo", 0), ("mjpeg", "mjpeg", 0), ("h264", "libx264", 2),
]  # fmt: skip
"""Containers and codecs with the number of B-frames."""
WITHOUT_TIMES = ("h264", "mjpeg", "y4m")
"""Containers without time stamps: 25 frames a second, or what the file's header says."""


def read(path: Path) -> tuple[list[VideoFrame], str | None]:
    with Video("clip", path) as video:
        return list(video.frames()), video.problem


def times(path: Path) -> list[float]:
    frames, problem = read(path)
    assert problem is None
    return [round(frame.time, 3) for frame in frames]


@pytest.mark.parametrize(("suffix", "codec", "b_frames"), WHOLE)
def test_whole_and_cut(tmp_path: Path, suffix: str, codec: str, b_frames: int) -> None:
    """Every frame of a whole file comes at its time without a word; of a cut one, those before, with one."""
    rate = 25 if suffix in ("mpg", "vob", "dv", "mxf", *WITHOUT_TIMES) else 10
    path = write_video(tmp_path / f"whole.{suffix}", codec, frames=6, b_frames=b_frames, rate=rate)
    assert (container_of(path) is not None) == (suffix != "mjpeg")
    frames, problem = read(path)
    assert problem is None
    assert [frame.time for frame in frames] == pytest.approx([i / rate for i in range(6)], abs=0.0015)
    data, cut = path.read_bytes(), tmp_path / f"cut.{suffix}"
    for part in (0.25, 0.5, 0.8) if suffix != "h264" else ():  # which does not tell where a frame ends
        cut.write_bytes(data[: int(len(data) * part) // 188 * 188 + 100])  # within a transport packet
        try:
            frames, problem = read(cut)
        except SourceError as error:  # not even the first frame is there, or no index
            frames, problem = [], str(error)
        assert len(frames) <= 6
        assert problem is not None, f"{part} of {path.name}, {len(frames)} frames"
        assert "broke off" in problem or "is damaged: 1 of its" in problem


@pytest.mark.parametrize(("suffix", "codec"), [("flv", "flv"), ("ts", "mpeg2video"), ("webm", "libvpx")])
def test_a_single_frame_is_whole(tmp_path: Path, suffix: str, codec: str) -> None:
    frames, problem = read(write_video(tmp_path / f"a.{suffix}", codec, frames=1))
    assert (len(frames), frames[0].time, problem) == (1, 0, None)


def test_how_many_of_how_many(tmp_path: Path) -> None:
    for suffix, codec, options in (
        ("avi", "mjpeg", {}), ("mkv", "mpeg4", {}), ("mp4", "mpeg4", {"movflags": "faststart"})
    ):  # fmt: skip
        path = write_video(tmp_path / f"a.{suffix}", codec, frames=20, options=options)
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
        frames, problem = read(path)
        assert 3 < len(frames) < 17
        assert problem == f"'clip' broke off after {len(frames)} of 20 frames"


@pytest.mark.parametrize(("suffix", "codec"), [("avi", "mjpeg"), ("wmv", "wmv2"), ("mkv", "ffv1")])
def test_room_that_nothing_came_into(tmp_path: Path, suffix: str, codec: str) -> None:
    """Downloads make room for a file first, so that zeros stand for what they have not reached."""
    options = {"cluster_size_limit": "2000"} if suffix == "mkv" else {}
    path = write_video(tmp_path / f"a.{suffix}", codec, frames=8, options=options)
    data = path.read_bytes()
    assert condition(path) == "whole"
    if suffix != "wmv":
        begin = b"00dc" if suffix == "avi" else b"\x1f\x43\xb6\x75"
        fifth = [match.start() for match in re.finditer(begin, data)][4]
    else:
        (header,) = struct.unpack_from("<Q", data, 16)
        fifth = header + 50 + 3200 * (len(data) // 3200 // 2)
    path.write_bytes(data[:fifth] + bytes(len(data) - fifth))
    frames, problem = read(path)
    assert 0 < len(frames) < 8
    assert problem is not None
    assert "broke off after" in problem


@pytest.mark.parametrize("options", [{"live": "1"}, {"cluster_size_limit": "2000"}])
def test_recordings_of_browsers(tmp_path: Path, options: dict[str, str]) -> None:
    """Their length stands nowhere, and their frames come as they like."""
    path = write_video(tmp_path / "a.webm", "libvpx", times_ms=[0, 33, 100, 101, 1000, 5000], options=options)
    assert times(path) == [0, 0.033, 0.1, 0.101, 1, 5]
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 3 // 5])
    frames, problem = read(path)
    assert problem == f"'clip' broke off after {len(frames)} frames"


def test_fragments(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", options={"movflags": "frag_keyframe+empty_moov"})
    assert times(path) == pytest.approx([i / 10 for i in range(6)])
    data = path.read_bytes()
    path.write_bytes(data[: data.rfind(b"moof") - 4])  # whole fragments: recorders end like this
    assert times(path) == pytest.approx([i / 10 for i in range(5)])
    path.write_bytes(data[: data.rfind(b"mdat") + 40])
    assert "broke off after" in str(read(path)[1])


@pytest.mark.parametrize(
    ("suffix", "codec", "behind"),
    [
        ("mpg", "mpeg2video", b"\0\0\1\xb9"),
        ("mpg", "mpeg2video", bytes(3000)),
        ("mkv", "mpeg4", bytes(3000)),
        ("mkv", "mpeg4", b"TAG of some other program"),
        ("mp4", "mpeg4", bytes(3000)),
        ("mp4", "mpeg4", b"\0\0\0\x08free"),
        ("avi", "mpeg4", bytes(3000)),
        ("flv", "flv", bytes(3000)),
        ("ts", "mpeg2video", b"\x47\x1f\xff\x10" + b"\xff" * 184),
        ("ogv", "libvpx", bytes(3000)),
        *(
            (*kind, behind)
            for kind in (("mp4", "mpeg4"), ("flv", "flv"), ("mpg", "mpeg2video"), ("ogv", "libvpx"))
            for behind in (b"\n", b"\r\n--the end of a form, as browsers send it--\r\n")
        ),
        ("mxf", "mpeg2video", b"\n"),
        ("mjpeg", "mjpeg", b"\n--the end of a form--\n"),
    ],
)
def test_what_stands_behind_a_whole_video(tmp_path: Path, suffix: str, codec: str, behind: bytes) -> None:
    """End codes, padding and other programs' additions are nothing that is missing."""
    path = write_video(tmp_path / f"a.{suffix}", codec, frames=4, rate=25)
    path.write_bytes(path.read_bytes() + behind)
    frames, problem = read(path)
    assert (len(frames), problem) == (4, None)


@pytest.mark.parametrize(
    "between", [b"", b"--part\r\nContent-type: image/jpeg\r\nContent-length: %d\r\n\r\n"]
)
def test_a_row_of_jpeg_images_is_a_video(tmp_path: Path, between: bytes) -> None:
    """As FFmpeg, cameras and `cat` write it; libavformat by itself takes it for one image."""
    row = io.BytesIO()
    for index in range(3):
        image = io.BytesIO()
        Image.fromarray(noise(48, 64, index)).save(image, format="JPEG")
        row.write(between and between % len(image.getvalue()))
        row.write(image.getvalue() + b"\r\n" * bool(between))
    path = tmp_path / "a.mjpg"
    path.write_bytes(row.getvalue())
    assert times(path) == [0, 0.04, 0.08]
    path.write_bytes(row.getvalue()[:-400])
    assert "broke off after" in str(read(path)[1])


@pytest.mark.parametrize("suffix", ["wmv", "mxf"])
def test_stamps_in_the_order_of_decoding(tmp_path: Path, suffix: str) -> None:
    """As these containers have them: the times of frames that lean on later ones neither jump nor stand."""

    def lean_on_later_ones(stream: VideoStream) -> None:
        stream.codec_context.gop_size = 30
        stream.codec_context.options = {"b-adapt": "0"}

    path = write_video(
        tmp_path / f"a.{suffix}",
        "libx264",
        frames=9,
        b_frames=2,
        rate=25,
        picture=lambda height, width, index: np.full((height, width, 3), 20 * index, np.uint8),
        prepare=lean_on_later_ones,
    )
    assert times(path) == pytest.approx([i / 25 for i in range(9)], abs=0.0015)


def test_a_playlist_is_a_video(tmp_path: Path) -> None:
    """By its name; a folder has its parts themselves."""
    options = {"hls_time": "0.3", "hls_list_size": "0"}
    path = write_video(tmp_path / "list.m3u8", "libx264", frames=9, options=options)
    assert [source.kind for source in list_sources([str(path)]).sources] == ["video"]
    assert times(path) == pytest.approx([i / 10 for i in range(9)], abs=0.001)
    parts = list_sources([str(tmp_path)]).sources
    assert {Path(source.name).suffix for source in parts} == {".ts"}


def test_a_recording_that_begins_between_key_frames_is_whole(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.ts", "libx264", frames=12)
    data = path.read_bytes()
    path.write_bytes(data[188 * (len(data) // 188 // 6) :])
    frames, problem = read(path)
    assert problem is None
    assert 6 <= len(frames) < 12


def test_recordings_joined_go_on_in_time(tmp_path: Path) -> None:
    one = write_video(tmp_path / "a.ts", "mpeg2video", frames=3, rate=25)
    other = write_video(tmp_path / "b.ts", "mpeg2video", frames=3, rate=25, size=(96, 64))
    one.write_bytes(one.read_bytes() + other.read_bytes())
    frames, problem = read(one)
    assert problem is None
    assert [frame.image.shape for frame in frames] == [(48, 64, 3)] * 3 + [(64, 96, 3)] * 3
    assert [frame.time for frame in frames] == pytest.approx([i / 25 for i in range(6)])


def corners(height: int, width: int, index: int) -> NDArray[np.uint8]:
    """Red at the upper left, green at the upper right, blue at the lower left, white at the lower right."""
    picture = np.zeros((height, width, 3), np.uint8)
    top, left = slice(0, height // 2), slice(0, width // 2)
    picture[top, :, 1] = picture[:, left, 0] = picture[height // 2 :, :, 2] = 255
    picture[top, left], picture[top, width // 2 :] = (255, 0, 0), (0, 255, 0)
    picture[height // 2 :, left], picture[height // 2 :, width // 2 :] = (0, 0, 255), (255, 255, 255)
    return picture


def upper_row(image: NDArray[np.uint8]) -> tuple[list[int], list[int]]:
    """The colours at the upper left and right, each channel as 0 or 1."""
    row = image[image.shape[0] // 4]
    left, right = row[image.shape[1] // 4], row[image.shape[1] * 3 // 4]
    return [int(value > 128) for value in left], [int(value > 128) for value in right]


RED, GREEN, BLUE, WHITE = [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]


@pytest.mark.parametrize("suffix", ["mov", "mp4", "mkv"])
@pytest.mark.parametrize(
    ("turn", "row"),
    [
        ({"degrees": 0}, (RED, GREEN)),
        ({"degrees": 90}, (GREEN, WHITE)),
        ({"degrees": 180}, (WHITE, BLUE)),
        ({"degrees": 270}, (BLUE, RED)),
        ({"degrees": 0, "hflip": True}, (GREEN, RED)),
        ({"degrees": 0, "vflip": True}, (BLUE, WHITE)),
        ({"degrees": 90, "hflip": True}, (WHITE, GREEN)),
    ],
)
def test_upright(tmp_path: Path, suffix: str, turn: dict[str, Any], row: tuple[list[int], list[int]]) -> None:
    """As phones hold it; players turn it counter-clockwise by what PyAV calls the rotation."""
    path = tmp_path / f"a.{suffix}"
    write_video(path, picture=corners, prepare=lambda stream: stream.set_display_rotation(**turn))
    frames, _ = read(path)
    assert frames[0].image.shape == ((48, 64, 3) if turn["degrees"] % 180 == 0 else (64, 48, 3))
    assert upper_row(frames[0].image) == row


def test_pixels_are_square(tmp_path: Path) -> None:
    def wide(stream: VideoStream) -> None:
        stream.sample_aspect_ratio = Fraction(4, 3)

    def high(stream: VideoStream) -> None:
        stream.sample_aspect_ratio = Fraction(8, 9)

    assert read(write_video(tmp_path / "a.mp4", prepare=wide))[0][0].image.shape == (48, 85, 3)
    assert read(write_video(tmp_path / "b.mp4", prepare=high))[0][0].image.shape == (54, 64, 3)


def flat(colour: tuple[int, int, int]) -> Callable[[int, int, int], NDArray[np.uint8]]:
    return lambda height, width, index: np.full((height, width, 3), colour, np.uint8)


@pytest.mark.parametrize(
    ("name", "codec", "colours", "expected"),
    [
        ("a.mkv", "ffv1", "yuv420p", (200, 60, 30)),
        ("a.mkv", "ffv1", "yuv444p16le", (200, 60, 30)),
        ("a.mkv", "ffv1", "gray", (98, 98, 98)),
        ("a.mkv", "ffv1", "gray16le", (98, 98, 98)),
        ("a.mkv", "ffv1", "bgra", (200, 60, 30)),
        ("a.mkv", "libx264", "yuv420p10le", (200, 60, 30)),
        ("a.mov", "prores", "yuv422p10le", (200, 60, 30)),
        ("a.mov", "mjpeg", "yuvj420p", (200, 60, 30)),
    ],
)
def test_colours(tmp_path: Path, name: str, codec: str, colours: str, expected: tuple[int, int, int]) -> None:
    path = write_video(tmp_path / name, codec, colours=colours, picture=flat((200, 60, 30)), frames=1)
    ((frame,), problem) = read(path)
    assert problem is None
    assert np.abs(frame.image.reshape(-1, 3).mean(axis=0) - expected).max() <= 4


@pytest.mark.parametrize(
    ("name", "codec", "colours"), [("a.mov", "qtrle", "argb"), ("a.webm", "libvpx-vp9", "yuva420p")]
)
def test_opacity_is_blended_onto_white(tmp_path: Path, name: str, codec: str, colours: str) -> None:
    path = tmp_path / name
    with av.open(path, "w") as container:
        stream: Any = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 16, 16, colours
        pixels = np.full((16, 16, 4), (128, 255, 0, 0), np.uint8)  # half a red
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="argb")))
        container.mux(stream.encode(None))
    assert np.abs(read(path)[0][0].image.astype(int) - (255, 127, 127)).max() <= 2


def test_colours_of_high_definition_that_say_nothing(tmp_path: Path) -> None:
    """They are BT.709's, as players take them; smaller ones are BT.601's."""
    for size, matrix in (((64, 48), "ITU601"), ((64, 720), "ITU709")):
        path = tmp_path / f"{size[1]}.mkv"
        with av.open(path, "w") as container:
            stream: Any = container.add_stream("ffv1", rate=10)
            stream.width, stream.height, stream.pix_fmt = *size, "yuv444p"
            pixels = np.full((size[1], size[0], 3), (30, 200, 60), np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame = frame.reformat(format="yuv444p", dst_colorspace=matrix)
            frame.colorspace = 2
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        assert np.abs(read(path)[0][0].image.astype(int) - (30, 200, 60)).max() <= 3, matrix


def test_sound_is_no_video(tmp_path: Path) -> None:
    path = write_sound(tmp_path / "a.mp4", "mp4", "aac")
    with pytest.raises(SourceError, match="'clip' holds no video, only sound"):
        Video("clip", path)


def test_times_count_from_the_first_of_all_streams(tmp_path: Path) -> None:
    assert times(write_video(tmp_path / "a.mkv", times_ms=[2000, 2100, 2500])) == [0, 0.1, 0.5]
    assert times(write_video(tmp_path / "a.ts", "mpeg2video", frames=3)) == [0, 0.1, 0.2]


@pytest.mark.parametrize(("codec", "b_frames"), [("libx264", 2), ("libvpx-vp9", 0)])
def test_what_an_edit_list_leaves_out(tmp_path: Path, codec: str, b_frames: int) -> None:
    """A trimmed copy: players do not show what the first frames are stored for, and nothing is missing."""
    options = {"avoid_negative_ts": "disabled", "use_editlist": "1"}
    with (
        av.open(write_video(tmp_path / "a.mp4", codec, frames=12, b_frames=b_frames)) as whole,
        av.open(tmp_path / "b.mp4", "w", options=options) as trimmed,
    ):
        stream = trimmed.add_stream_from_template(whole.streams.video[0])
        for packet in whole.demux(video=0):
            if packet.pts is not None and packet.dts is not None:
                earlier = round(0.45 / packet.time_base)
                packet.pts, packet.dts = packet.pts - earlier, packet.dts - earlier
                packet.stream = stream
                trimmed.mux_one(packet)
    assert times(tmp_path / "b.mp4") == pytest.approx([i / 10 for i in range(7)], abs=0.002)


def test_without_pyav(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mp4")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(SourceError, match=r"pip install 'asag-deploy\[video\]'"):
        Video("clip", path)


def test_what_is_no_video_is_not_cut(tmp_path: Path) -> None:
    for name, content in (("a", b""), ("b", b"x" * 5000), ("c", bytes(5000)), ("d", b"RIFF")):
        (tmp_path / name).write_bytes(content)
        assert container_of(tmp_path / name) is None
        assert condition(tmp_path / name) == "whole"
    assert container_of(tmp_path / "gone") is None


@pytest.mark.parametrize(
    ("suffix", "codec"),
    [
        ("mp4", "libx264"),
        ("webm", "libvpx"),
        ("avi", "mpeg4"),
        ("ts", "mpeg2video"),
        ("flv", "flv"),
        ("wmv", "wmv2"),
    ],
)
def test_any_bytes_give_frames_or_a_sentence(tmp_path: Path, suffix: str, codec: str) -> None:
    whole = write_video(tmp_path / f"a.{suffix}", codec, frames=3).read_bytes()
    generator, path = np.random.default_rng(0), tmp_path / "b"
    for length in range(0, 240, 7):
        path.write_bytes(whole[:length])
        assert condition(path) in ("whole", "cut", "damaged")
    for _ in range(40):
        data = bytearray(whole)
        for place in generator.integers(0, min(len(data), 2000), 6):
            data[place : place + 2] = generator.bytes(2)
        path.write_bytes(data)
        try:
            frames, problem = read(path)
        except SourceError as error:
            frames, problem = [], str(error)
        assert frames or problem


class LateStream:
    """A container in which a stream begins late: PyAV raises IndexError when it comes to its end.

    Whether it does depends on what lies in the memory behind the streams that it knows.
    """

    def __init__(self, container: Any, *, flushed: bool) -> None:
        self.container = container
        self.flushed = flushed

    def demux(self) -> Any:
        for packet in self.container.demux():
            if packet.size == 0 and packet.dts is None and not self.flushed:
                break
            yield packet
        raise IndexError("list index out of range")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.container, name)


@pytest.mark.parametrize("flushed", [True, False])
def test_a_stream_that_begins_late(tmp_path: Path, flushed: bool) -> None:
    write_video(tmp_path / "a.mp4", "libx264", b_frames=2, frames=8)
    with Video("clip", tmp_path / "a.mp4") as video:
        video._container = LateStream(video._container, flushed=flushed)  # type: ignore[assignment]
        assert len(list(video.frames())) == 8
        assert video.problem is None
