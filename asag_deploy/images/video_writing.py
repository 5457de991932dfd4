"""Videos on disk, through PyAV: H.264 in MP4, as browsers play it, each frame at its own time."""

from __future__ import annotations

import contextlib
import errno
import os
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

import cv2
import numpy as np

from asag_deploy.atomic import atomic_write
from asag_deploy.errors import OutputError, first_line
from asag_deploy.images.reading import RgbImage
from asag_deploy.images.video_containers import whole_mp4
from asag_deploy.images.videos import import_av

if TYPE_CHECKING:
    from av.container import OutputContainer
    from av.video.stream import VideoStream

_OF_THE_DISK = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT}
)
"""Errors that have nothing to do with the encoder."""
_TICK = Fraction(1, 60_000)
"""Divides the frames of all usual rates, and is as fine as MPEG-4 part 2 can be."""
_ENCODERS = {
    "libx264": {"preset": "veryfast", "crf": "23"},
    "libopenh264": {},
    "h264_videotoolbox": {},
    "mpeg4": {"q:v": "3"},
}
"""Encoders in the order in which they are tried, with their options; the last one is no H.264."""
_KEY_FRAMES = 50
"""Frames from key frame to key frame, which is what a full disk may cost."""
_GROWING = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
"""While it is written a video consists of fragments, so that what is on disk plays at any time."""
_FINISHED = {"movflags": "faststart"}
_BT709, _LIMITED = 1, 1
_MARK = {"comment": "made by asag-deploy"}
"""Names what made the video, by which it is known again."""


def is_own_video(path: Path) -> bool:
    """Tell whether a file was written by `VideoFile`.

    Raises SourceError where PyAV is not installed.
    """
    av = import_av(f"writing video '{path}'")
    try:
        with av.open(f"file:{path}") as container:
            return bool(container.metadata.items() >= _MARK.items())
    except (OSError, ValueError, av.error.FFmpegError):
        return False


class VideoFile:
    """An MP4 video in a file, written frame by frame: H.264 where PyAV has an encoder for it.

    A context manager: the file appears when it ends well, with its index in front.  Raises OutputError when
    it cannot be written.  Where the disk is full, what was written until then appears and the error says so;
    otherwise nothing is left behind.  Raises SourceError where PyAV is not installed.
    """

    def __init__(self, path: str | os.PathLike[str], *, height: int, width: int) -> None:
        self._av = import_av(f"writing video '{path}'")
        self._path = Path(path)
        self._size = (width, height)
        self._first = 0
        self._last: int | None = None
        self._gap = round(Fraction(1, 25) / _TICK)
        self._end: int | None = None
        self._held: Any = None
        self.scaled = 0
        """Frames of another size than the first, which were scaled to it."""
        with ExitStack() as stack:
            self._temporary = stack.enter_context(atomic_write(path))
            self._container, self._stream = self._open()
            self._stack = stack.pop_all()

    @property
    def is_h264(self) -> bool:
        """Whether browsers play it; MPEG-4 part 2, the way out, only plays in players."""
        return self._stream.codec_context.name != "mpeg4"

    def add(self, picture: RgbImage, *, time: float, duration: float | None = None) -> None:
        """Add an RGB frame that is shown from `time` on, in seconds.

        Times grow; one that does not is taken as just after the frame before.  duration: the seconds that the
        frame is shown if no other follows; None for as long as the one before.  An odd side gets its last row
        or column twice, as the codec wants it even.
        """
        stamp = round(time / _TICK)
        if self._last is None:
            self._first = stamp
        else:
            stamp = max(stamp, self._last + 1)
            self._gap = stamp - self._last
        self._last = stamp
        self._end = stamp + (self._gap if duration is None else max(round(duration / _TICK), 1))
        frame = self._av.VideoFrame.from_ndarray(self._fitted(picture), format="rgb24")
        frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
        frame.pts, frame.time_base = stamp, _TICK
        with self._saved():
            self._mux(self._stream.encode(frame))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            with contextlib.suppress(OSError, self._av.error.FFmpegError):
                self._container.close()
            self._stack.__exit__(kind, error, traceback)
            return
        with self._saved():
            self._mux(self._stream.encode(None))
            if self._held is not None and self._end is not None:
                self._held.duration = self._end - self._held.pts
                self._container.mux_one(self._held)
            self._container.close()
        # Where the disk has no room for a second copy, the fragments stay: they are the same video.
        with self._stack, contextlib.suppress(OutputError, self._av.error.FFmpegError):
            self._put_index_in_front()

    def _open(self) -> tuple[OutputContainer, VideoStream]:
        problem: Exception | None = None
        for name, options in _ENCODERS.items():
            try:
                return self._open_with(name, options)
            except (OSError, ValueError, self._av.error.FFmpegError) as error:
                if getattr(error, "errno", None) in _OF_THE_DISK:
                    raise
                problem = error
        width, height = self._size
        raise OutputError(
            f"could not write video '{self._path}' of {width} x {height} pixels: no encoder takes that size "
            "(H.264 ends at 16384 a side)"
        ) from problem

    def _open_with(self, encoder: str, options: dict[str, str]) -> tuple[OutputContainer, VideoStream]:
        container = self._av.open(f"file:{self._temporary}", "w", format="mp4", options=_GROWING)
        container.metadata.update(_MARK)
        try:
            stream = cast("VideoStream", container.add_stream(encoder, rate=25, options=dict(options)))
            context = stream.codec_context
            context.width, context.height = (side + side % 2 for side in self._size)
            context.pix_fmt = "yuv420p"
            context.time_base = _TICK
            context.gop_size = _KEY_FRAMES
            context.max_b_frames = 0  # so that packets come in the order of their times
            context.colorspace = context.color_primaries = context.color_trc = _BT709
            context.color_range = _LIMITED
            container.start_encoding()
        except BaseException:
            with contextlib.suppress(OSError, ValueError, self._av.error.FFmpegError):
                container.close()
            raise
        return cast("OutputContainer", container), stream

    def _fitted(self, picture: RgbImage) -> RgbImage:
        width, height = self._size
        if picture.shape[:2] != (height, width):
            self.scaled += 1
            picture = cast(RgbImage, cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA))
        if width % 2 or height % 2:
            sides = (0, height % 2, 0, width % 2)
            picture = cast(RgbImage, cv2.copyMakeBorder(picture, *sides, cv2.BORDER_REPLICATE))
        return np.ascontiguousarray(picture)

    def _mux(self, packets: list[Any]) -> None:
        """Write packets, each once the next one says how long it is shown."""
        for packet in packets:
            if self._held is not None:
                self._held.duration = packet.pts - self._held.pts
                self._container.mux_one(self._held)
            self._held = packet

    @contextlib.contextmanager
    def _saved(self) -> Any:
        """Keep what is whole when the disk is full, and raise OutputError in any case."""
        try:
            yield
        except (OSError, ValueError, self._av.error.FFmpegError) as error:
            reason = (getattr(error, "strerror", None) or first_line(error)).lower()
            with contextlib.suppress(OSError, self._av.error.FFmpegError):
                self._container.close()
            kept = self._cut_to_whole()
            failure = OutputError(f"could not write '{self._path}': {reason}")
            if not kept:
                self._stack.__exit__(OutputError, failure, None)
                raise failure from error
            self._stack.close()
            frames = "first frame is" if kept == 1 else f"first {kept} frames are"
            raise OutputError(f"{failure}; its {frames} kept") from error

    def _cut_to_whole(self) -> int:
        """Cut the file after its last whole fragment, and return how many frames that leaves."""
        with contextlib.suppress(OSError, ValueError, self._av.error.FFmpegError):
            os.truncate(self._temporary, whole_mp4(self._temporary))
            with self._av.open(f"file:{self._temporary}") as container:
                return sum(packet.size > 0 for packet in container.demux(video=0))
        return 0

    def _put_index_in_front(self) -> None:
        if not self._temporary.is_file() or self._temporary.is_symlink():
            return  # a spool in memory, whose content goes elsewhere
        with (
            atomic_write(self._temporary) as copy,
            self._av.open(f"file:{self._temporary}") as fragments,
            self._av.open(f"file:{copy}", "w", format="mp4", options=_FINISHED) as whole,
        ):
            whole.metadata.update(_MARK)
            source = fragments.streams.video[0]
            stream = whole.add_stream_from_template(source)
            begin = round(self._first * _TICK / source.time_base)  # which fragments do not keep
            for packet in fragments.demux(video=0):
                if packet.size:
                    packet.pts += begin
                    packet.dts += begin
                    packet.stream = stream
                    whole.mux_one(packet)
