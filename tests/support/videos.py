"""Tiny videos, written by PyAV into whatever container and codec a test asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
from av.video.stream import VideoStream
from numpy.typing import NDArray

TICK = Fraction(1, 1000)
_FORMATS = {
    "m2ts": "mpegts", "m3u8": "hls", "m4v": "mp4", "mkv": "matroska", "mpg": "mpeg", "mts": "mpegts",
    "ogv": "ogg", "ts": "mpegts", "wmv": "asf", "y4m": "yuv4mpegpipe",
}  # fmt: skip
"""What libavformat calls the containers of these suffixes; others are called alike."""
_COLOURS = {"mjpeg": "yuvj420p", "prores": "yuv422p10le", "qtrle": "rgb24"}
_SIZES = {"h263": (176, 144), "flv": (176, 144), "dvvideo": (720, 576)}


def noise(height: int, width: int, index: int) -> NDArray[np.uint8]:
    """A picture that compresses badly: every frame has bytes that can be lost."""
    generator = np.random.default_rng(index)
    return generator.integers(0, 256, (height, width, 3), dtype=np.uint8)


def write_video(
    path: Path,
    codec: str = "mpeg4",
    *,
    frames: int = 6,
    times_ms: Sequence[int] | None = None,
    picture: Callable[[int, int, int], NDArray[np.uint8]] = noise,
    size: tuple[int, int] | None = None,
    colours: str | None = None,
    b_frames: int = 0,
    rate: int = 10,
    options: Mapping[str, str] | None = None,
    prepare: Callable[[VideoStream], None] | None = None,
) -> Path:
    """Write `frames` frames at `rate` a second, or at these times; `picture` takes height, width and index.

    size: width and height.  colours: the codec's pixel format.  options: the container's.  prepare: what else
    is set before the first frame.
    """
    suffix = path.suffix[1:]
    kind = _FORMATS.get(suffix, suffix)
    with av.open(path, "w", format=kind, options=dict(options or {})) as container:
        stream = cast("VideoStream", container.add_stream(codec, rate=rate))
        stream.width, stream.height = size or _SIZES.get(codec, (64, 48))
        stream.pix_fmt = colours or _COLOURS.get(codec, "yuv420p")
        stream.codec_context.gop_size = 3
        stream.codec_context.thread_count = 1  # else what is written differs from time to time
        if b_frames:
            stream.codec_context.max_b_frames = b_frames
        if times_ms is not None:
            stream.codec_context.time_base = TICK
        if prepare is not None:
            prepare(stream)
        for index in range(frames if times_ms is None else len(times_ms)):
            frame = av.VideoFrame.from_ndarray(picture(stream.height, stream.width, index), format="rgb24")
            frame.pts = index if times_ms is None else times_ms[index]
            frame.time_base = Fraction(1, rate) if times_ms is None else TICK
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_sound(path: Path, kind: str = "ogg", codec: str = "libopus") -> Path:
    """A file of silence."""
    with av.open(path, "w", format=kind) as container:
        sound: Any = container.add_stream(codec, rate=48000, layout="mono")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 960), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 48000
        container.mux(sound.encode(silence))
        container.mux(sound.encode(None))
    return path


def stored(path: Path) -> tuple[list[float], Any]:
    """The times of a video's frames in seconds, and its stream."""
    with av.open(path) as container:
        stream = container.streams.video[0]
        times = sorted(float(p.pts * p.time_base) for p in container.demux(stream) if p.pts is not None)
        return times, stream
