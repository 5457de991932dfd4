"""Videos in, through PyAV: upright uint8 RGB frames with their times, and a word on what is missing."""

from __future__ import annotations

import contextlib
import errno
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heappop, heappush
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

import numpy as np
from numpy.typing import NDArray

from asag_deploy.errors import SourceError, plural
from asag_deploy.extras import missing
from asag_deploy.images.decoder_log import jpeg_complaint
from asag_deploy.images.reading import RgbImage, as_rgb
from asag_deploy.images.video_containers import (
    Condition,
    condition,
    container_of,
    is_row_of_jpegs,
    list_condition,
)

if TYPE_CHECKING:
    import av
    from av.container import InputContainer
    from av.video.codeccontext import VideoCodecContext
    from av.video.stream import VideoStream

_OPEN_S, _READ_S = 15.0, 30.0
"""How long an address may take to answer, and to send something more."""
_STARTS_ANYWHERE = frozenset(
    "mpegts mpeg mpegvideo h264 hevc m4v rtsp rtp sdp hls".split()  # noqa: SIM905
)
"""Formats, as libavformat calls them, that may begin between key frames, where nothing can be decoded."""
_NO_LONG_ZEROS = frozenset(
    "vp8 vp9 av1 h264 hevc mpeg4 mpeg2video mpeg1video h263 flv1 msmpeg4v3 wmv2 wmv3 vc1".split()  # noqa: SIM905
)
_ZEROS = re.compile(rb"\x00{256,}")
"""A hole in a packet: no entropy coder writes this, and stuffing ends with a start code or the packet."""
_UNSTUFFED = frozenset({"vp8", "vp9", "av1"})
"""Codecs that put nothing behind a frame."""
_WITH_OPACITY = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
"""Decoders of opacity, for codecs whose usual ones overlook it."""
_ONE_BY_ONE = frozenset({"vp9", "av1"})
"""Codecs of which every packet gives a frame."""
_MAY_END_WITH_NOTHING = frozenset({"mpeg4", "vp8", "theora"})
"""Codecs whose last packet may say no more than that nothing has changed."""
_HIGH_DEFINITION = 720
"""Lines from which on colours that say nothing are BT.709's; players do so."""
_MICROSECONDS = 1_000_000
_HIGHEST_RATE = 480
"""Frames a second; more is the clock of a file whose frames come as they like."""
_COUNT_FROM_ZERO = frozenset({"flv", "nut"})
"""Formats whose length counts from their clock's zero, not from their first frame."""
_STAMPED_IN_ORDER = frozenset({"avi", "asf", "mxf"})
"""Formats that stamp packets in the order of decoding, or say no more than their place in an even row."""
_TOLD_LENGTH = frozenset({"flv", "nut", "rm", "wtv", "gxf", "hls"})
"""Formats of files that tell a length, while their parts do not tell whether all are there."""


@dataclass(frozen=True, kw_only=True, eq=False)
class VideoFrame:
    """One frame of a video."""

    image: RgbImage
    """As players show it: upright, with square pixels, transparency blended onto white."""
    time: float
    """Seconds from the start of the video; never less than the frame's before."""
    duration: float | None
    """Seconds that it is shown, if the file says."""


def import_av(purpose: str) -> ModuleType:
    """Import PyAV; raises SourceError, which says that it is for `purpose`, where it is not installed."""
    try:
        import av
    except ImportError as error:
        raise SourceError(missing(error, purpose=purpose)) from None
    return av


class Video:
    """A video file or address, read frame by frame; a context manager.

    name: what messages call it.  address: a path, or an address such as rtsp://host/stream.  live: it has no
    end, so that one is a failure.  Of several videos in a file it is the one that players take.  The lines of
    interlaced video stay woven, and colours of a high dynamic range are not mapped to a screen's.
    Raises SourceError for what cannot be opened or holds no video.
    """

    def __init__(self, name: str, address: str | Path, *, live: bool = False) -> None:
        self._name = name
        self._address = address
        self._live = live
        av = import_av(f"reading video '{name}'")
        self._av = av
        try:
            self._container = self._open()
        except (OSError, ValueError, av.error.FFmpegError) as error:
            raise SourceError(self._why_not_opened(error)) from None
        try:
            self._stream = self._pick_stream()
        except BaseException:
            self._container.close()
            raise
        self._decoder = self._pick_decoder()
        self._decoder.thread_type = "AUTO"
        self.problem: str | None = None
        """Once all frames are read: one sentence if the video did not give what it promises."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._container.close()

    @property
    def length(self) -> int | None:
        """How many frames there are, as far as the headers say."""
        if self._live:
            return None
        if self._stream.frames > 0:
            return self._stream.frames
        rate, seconds = self._stream.average_rate, self._seconds()
        if not rate or not seconds or rate > _HIGHEST_RATE:
            return None
        return max(round(seconds * rate), 1)

    def frames(self) -> Iterator[VideoFrame]:
        """Yield the frames in the order they are shown in."""
        clock = _Clock(self._container, self._stream)
        codec = self._stream.codec_context.codec.canonical_name
        lenient = self._format() in _STARTS_ANYWHERE
        tally = _Tally(
            lenient=lenient,
            one_by_one=codec in _ONE_BY_ONE,
            ends_with_last=not lenient and codec not in _MAY_END_WITH_NOTHING,
        )
        broken: str | None = None
        joints = _Joints(self._stream)
        packets = self._container.demux()
        flushed = False
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                break
            except IndexError:  # at the end, where a stream has begun that was not there when it was opened
                if not flushed:
                    yield from self._decoded(None, clock, tally)
                break
            except (OSError, ValueError, self._av.error.FFmpegError) as error:
                broken = None if self._ends_so(error) else _reason(error)
                yield from self._decoded(None, clock, tally)  # what the decoder still holds
                break
            tally.note_end(packet)
            if packet.stream.index != self._stream.index:
                continue
            if joints.is_one(packet):  # the decoder would drop what it still holds
                yield from self._decoded(None, clock, tally)
                self._decoder.flush_buffers()
            yield from self._decoded(packet, clock, tally)
            flushed = packet.size == 0 and packet.dts is None
        self.problem = self._verdict(tally, broken)

    def _decoded(self, packet: Any, clock: _Clock, tally: _Tally) -> Iterator[VideoFrame]:
        if packet is not None:
            clock.expect(packet)
        try:
            frames = self._decoder.decode(packet)
        except (ValueError, self._av.error.FFmpegError):
            tally.note_packet(packet, bad=True)
            clock.forget()
            return
        tally.note_packet(packet, bad=packet is not None and _has_hole(packet, self._stream))
        for frame in frames:
            time, duration = clock.tell(frame)
            tally.note_frame(frame, time)
            try:
                image = _as_shown(frame, self._stream)
            except (ValueError, self._av.error.FFmpegError):
                tally.refuse_frame()
                continue
            yield VideoFrame(image=image, time=time, duration=duration)

    def _open(self) -> InputContainer:
        av = self._av
        if isinstance(self._address, Path):
            # libavformat takes a row of JPEG images for a single one.
            kind = "mjpeg" if self._address.is_file() and is_row_of_jpegs(self._address) else None
            # The prefix keeps a name such as `concat:a` or `-` from meaning something else.
            opened = av.open(f"file:{self._address}", format=kind, metadata_errors="replace")
            return cast("InputContainer", opened)
        options = {"rtsp_transport": "tcp"} if self._address.startswith("rtsp") else {}
        opened = av.open(
            self._address, options=options, timeout=(_OPEN_S, _READ_S), metadata_errors="replace"
        )
        return cast("InputContainer", opened)

    def _pick_stream(self) -> VideoStream:
        """Take the stream that players take, but no cover picture."""
        if self._format().endswith("_pipe") or self._format() == "image2":
            remedy = "give it a name that says so"
            if not isinstance(self._address, Path):
                remedy = "only videos are read from addresses, download it"
            raise SourceError(f"'{self._name}' is an image: {remedy}")
        disposition = self._av.stream.Disposition
        covers = disposition.attached_pic | disposition.timed_thumbnails
        moving = [stream for stream in self._container.streams.video if not stream.disposition & covers]
        if not moving:
            raise SourceError(self._if_cut() or f"'{self._name}' holds no video{self._what_else()}")
        best = self._container.streams.best("video")
        stream = best if best in moving else max(moving, key=lambda one: (one.width or 0) * (one.height or 0))
        codec: object = stream.codec_context  # None for a codec that this build of PyAV lacks
        if codec is None:
            reason = f"'{self._name}' holds video in a way that PyAV cannot decode; convert it to H.264"
            raise SourceError(self._if_cut() or reason)
        return stream

    def _pick_decoder(self) -> VideoCodecContext:
        """Take the stream's own decoder, unless that overlooks the opacity that the stream has."""
        usual = self._stream.codec_context
        name = _WITH_OPACITY.get(usual.codec.canonical_name)
        if name is not None and self._stream.metadata.get("alpha_mode") == "1":
            with contextlib.suppress(ValueError):  # this PyAV was built without it
                return cast("VideoCodecContext", self._av.CodecContext.create(name, "r"))
        return usual

    def _what_else(self) -> str:
        streams = self._container.streams
        if streams.audio:
            return ", only sound with a cover picture" if streams.video else ", only sound"
        return ", only a still picture" if streams.video else ""

    def _format(self) -> str:
        return self._container.format.name

    def _seconds(self) -> float | None:
        """Return the length that the header promises."""
        duration = self._container.duration
        if not duration or duration <= 0:
            return None
        skipped = self._begin() if self._format() in _COUNT_FROM_ZERO else 0.0
        return max(duration / _MICROSECONDS - skipped, 0.0)

    def _ends_so(self, error: Exception) -> bool:
        """Tell whether a server that does not say how long a file is has just ended it.

        Of images between the lines of a form, too, only their last one tells.
        """
        if self._format() == "mpjpeg" and not self._live:
            return isinstance(error, self._av.error.InvalidDataError)
        is_from_server = not isinstance(self._address, Path) and not self._live
        return getattr(error, "errno", None) == errno.EIO and is_from_server and self._container.size <= 0

    def _verdict(self, tally: _Tally, broken: str | None) -> str | None:
        """Say in one sentence what is missing, if anything is."""
        name, count = self._name, tally.frames
        if self._live:
            what = f"broke off after {plural(count, 'frame')}" if count else "gives no pictures"
            return f"'{name}' {what}" + (f": {broken}" if broken else "")
        state = "cut" if broken is not None else self._condition(tally)
        if state == "cut":
            if not count:
                return _before_all(name)
            return f"'{name}' broke off after {self._how_many(tally)}" + (f": {broken}" if broken else "")
        if not count:
            return f"video '{name}' has no frames that can be decoded; it is damaged or of another format"
        if tally.damaged:
            some = f"{tally.damaged} of its {plural(count, 'frame')}"
            return f"'{name}' is damaged: {some} could not be decoded whole"
        if state == "damaged":
            return f"'{name}' is damaged: a part of it is missing between its {plural(count, 'frame')}"
        return None

    def _condition(self, tally: _Tally) -> Condition:
        if tally.last_is_cut:
            return "cut"
        if isinstance(self._address, Path) and self._address.is_file():
            with contextlib.suppress(OSError, ValueError):  # it is gone meanwhile
                is_list = self._format() == "hls"
                state = list_condition(self._address) if is_list else condition(self._address)
                if state != "whole":
                    return state
            if self._format() not in _TOLD_LENGTH:
                says_nothing = container_of(self._address) in ("mpeges", "other")
                return "cut" if says_nothing and tally.last_is_damaged else "whole"
        promised = self._seconds()
        if promised is None or tally.end is None:
            return "whole"
        if not tally.typical_gap:
            return "whole"  # a single frame, which may be shown for long
        shown = tally.end - self._begin()
        if self._format() == "hls" and self._stream.average_rate:  # whose clock may begin anew in each part
            shown = max(shown, float(tally.frames / self._stream.average_rate))
        missing = promised - shown
        return "cut" if missing > max(0.1 * promised, 3 * tally.typical_gap) else "whole"

    def _begin(self) -> float:
        return (self._container.start_time or 0) / _MICROSECONDS

    def _how_many(self, tally: _Tally) -> str:
        promised = self.length
        if promised is None or promised <= tally.frames:
            return plural(tally.frames, "frame")
        if not self._stream.frames and not tally.is_regular(self._stream.average_rate):
            return plural(tally.frames, "frame")
        return f"{tally.frames} of {plural(promised, 'frame')}"

    def _if_cut(self) -> str | None:
        """Say that a file that cannot be used ends early, if it does."""
        with contextlib.suppress(OSError, ValueError):
            is_file = isinstance(self._address, Path) and self._address.is_file()
            if is_file and condition(Path(self._address)) == "cut":
                return _before_all(self._name)
        return None

    def _why_not_opened(self, error: Exception) -> str:
        name, address = self._name, self._address
        if not isinstance(address, Path):
            return (
                f"'{name}' gives no pictures: {_reason(error)}; check the address, and that it can be reached"
            )
        if isinstance(error, FileNotFoundError):
            return f"video '{name}' does not exist"
        if isinstance(error, OSError) and not isinstance(error, ValueError):
            return f"video '{name}' cannot be read: {_reason(error)}"
        if not address.is_file():  # a pipe, which is empty now
            return f"video '{name}' has no frames that can be decoded; it ends early or is no video"
        with contextlib.suppress(OSError, ValueError):
            if address.stat().st_size == 0:
                return f"video '{name}' is empty: the file has 0 bytes"
            if cut := self._if_cut():
                return cut
            if b"mdat" in _head(address):  # an MP4 whose index, which comes last, was never written
                return f"'{name}' broke off before its index was written, without which no frame can be read"
        return f"video '{name}' has no frames that can be decoded; it is damaged or of another format"


class _Joints:
    """Finds where recordings were joined: time goes back, or MPEG's pictures get another size."""

    def __init__(self, stream: VideoStream) -> None:
        self._is_mpeg = stream.codec_context.codec.canonical_name in ("mpeg1video", "mpeg2video")
        self._last: int | None = None
        self._size: bytes | None = None

    def is_one(self, packet: Any) -> bool:
        """Tell whether another recording begins with this packet."""
        before, size = self._last, self._size
        self._last = packet.dts if packet.dts is not None else before
        if not packet.is_keyframe or not packet.size:
            return False
        if self._is_mpeg:
            content = bytes(packet)
            place = content.find(b"\x00\x00\x01\xb3") + 4
            self._size = content[place : place + 3] if place >= 4 else size
        goes_back = before is not None and self._last is not None and self._last < before
        return goes_back or (size is not None and size != self._size)


class _Clock:
    """Turns time stamps into seconds from the start of the video, which never go back."""

    def __init__(self, container: InputContainer, stream: VideoStream) -> None:
        rate = stream.average_rate or stream.guessed_rate
        self._usual = float(1 / rate) if rate else 0.04
        self._start = _start(container, stream)
        self._base = stream.time_base
        self._may_jump = bool(container.format.flags & 0x0200)  # AVFMT_TS_DISCONT
        self._has_places = container.format.name in _STAMPED_IN_ORDER
        self._by_dts = container.format.name != "mxf"  # which has both for MPEG-2
        self._places: list[float] = []
        self._last: float | None = None
        self._shift = 0.0

    def expect(self, packet: Any) -> None:
        """Note the time of a packet whose frame comes later."""
        stamp = packet.dts if packet.pts is None or self._by_dts else packet.pts
        if self._has_places and packet.size and stamp is not None:
            heappush(self._places, float(stamp * packet.time_base))

    def forget(self) -> None:
        """Take note that a packet gives no frame."""
        if self._places:
            heappop(self._places)

    def tell(self, frame: Any) -> tuple[float, float | None]:
        """Return a frame's time, and for how long it is shown if the file says."""
        base = frame.time_base or self._base  # frames that a decoder still held may have none
        duration = float(frame.duration * base) if frame.duration and base else None
        stamp = None if frame.pts is None or base is None else float(frame.pts * base)
        if self._has_places:
            stamp = heappop(self._places) if self._places else None
        if stamp is None:
            time = 0.0 if self._last is None else self._last + self._usual
        else:
            if self._start is None:
                self._start = stamp
            time = stamp - self._start + self._shift
        if self._last is None:
            time = max(time, 0.0)
        elif time < self._last:
            if self._may_jump:  # another recording begins here
                self._shift += self._last + self._usual - time
                time = self._last + self._usual
            else:
                time = self._last
        self._last = time
        return time, duration


def _start(container: InputContainer, stream: VideoStream) -> float | None:
    """Return the second at which players begin: the first of any stream, but not the run-up of the sound."""
    first: int | None = container.start_time  # None if no stream says
    if first is None:
        return None
    own = stream.start_time
    shown = 0.0 if own is None or stream.time_base is None else float(own * stream.time_base)
    return max(first / _MICROSECONDS, min(shown, 0.0))


class _Tally:
    """Counts what came and what was bad of it."""

    def __init__(self, *, lenient: bool, one_by_one: bool, ends_with_last: bool) -> None:
        self.frames = 0
        self._packets = 0
        self._one_by_one = one_by_one
        self._ends_with_last = ends_with_last
        self._waiting: list[int] = []
        """Stamps of packets that no frame has come of yet.
        Of the last ones, which a decoder with threads holds, PyAV does not say that they are damaged."""
        self.end: float | None = None
        """Seconds at which the last packet of any stream ends."""
        self.last_is_cut = False
        self.last_is_damaged = False
        self._bad_packets = 0
        self._bad_frames = 0
        self._begun = not lenient
        self._times: list[float] = []

    @property
    def damaged(self) -> int:
        swallowed = max(self._packets - self.frames, 0) if self._one_by_one else 0
        return max(self._bad_packets, self._bad_frames, swallowed, len(self._waiting))

    @property
    def typical_gap(self) -> float:
        """The mean seconds from one frame to the next."""
        if len(self._times) < 2 or self.frames < 2:
            return 0.0
        return (self._times[1] - self._times[0]) / (self.frames - 1)

    def is_regular(self, rate: Any) -> bool:
        """Tell whether the frames came at about this rate."""
        return bool(rate) and self.typical_gap > 0 and math.isclose(1 / self.typical_gap, rate, rel_tol=0.2)

    def note_end(self, packet: Any) -> None:
        """Note how far a packet of any stream goes."""
        stamp = packet.pts if packet.pts is not None else packet.dts
        if stamp is not None and packet.time_base:
            end = float((stamp + (packet.duration or 0)) * packet.time_base)
            self.end = end if self.end is None else max(self.end, end)

    def note_packet(self, packet: Any, *, bad: bool) -> None:
        """Count a packet of the video; None stands for what the decoder still held."""
        if packet is not None and packet.size:
            self.last_is_cut = packet.is_corrupt
            self._packets += not packet.is_discard
            if self._ends_with_last and packet.pts is not None and not packet.is_discard:
                heappush(self._waiting, packet.pts)
        if bad and self._begun:
            self._bad_packets += 1

    def refuse_frame(self) -> None:
        """Take back a frame whose colours or size nothing can be made of."""
        self.frames -= 1
        self._bad_packets += 1

    def note_frame(self, frame: Any, time: float) -> None:
        self.frames += 1
        while self._waiting and (frame.pts is None or self._waiting[0] <= frame.pts):
            heappop(self._waiting)
        self.last_is_damaged = frame.is_corrupt
        if not frame.is_corrupt:
            self._begun = True
        elif self._begun:
            self._bad_frames += 1
        self._times = [*self._times[:1], time]


def _has_hole(packet: Any, stream: VideoStream) -> bool:
    """Tell whether zeros lie where a download left a gap, which some decoders do not notice."""
    codec = stream.codec_context.codec.canonical_name
    if packet.size < 256 or (codec not in _NO_LONG_ZEROS and codec != "mjpeg"):
        return False
    content = bytes(packet)
    if codec == "mjpeg":  # where zeros may be a plain part of the picture
        return _ZEROS.search(content) is not None and jpeg_complaint(content) is not None
    if not any(content) or (codec in _UNSTUFFED and content.endswith(bytes(256))):
        return True
    ends = (match.end() for match in _ZEROS.finditer(content))
    return any(end < len(content) and content[end] != 1 for end in ends)


def _as_shown(frame: av.VideoFrame, stream: VideoStream) -> RgbImage:
    """Convert to RGB with the frame's own colours, square its pixels, and turn it upright."""
    layout = frame.format
    has_opacity = layout.has_palette or any(part.is_alpha for part in layout.components)
    width, height = _square(frame.width, frame.height, stream.sample_aspect_ratio)
    says_nothing = frame.colorspace == 2 and not layout.is_rgb
    pixels = frame.to_ndarray(
        format="rgba" if has_opacity else "rgb24",
        width=width,
        height=height,
        src_colorspace="ITU709" if says_nothing and frame.height >= _HIGH_DEFINITION else None,
    )
    return as_rgb(_upright(pixels, _display_matrix(frame)), "rgb")


def _square(width: int, height: int, aspect: Any) -> tuple[int, int]:
    """Return the size with square pixels, enlarging one side; `aspect` is a pixel's width by its height."""
    if not aspect or not 0.25 <= aspect <= 4 or abs(aspect - 1) < 0.01:
        return width, height
    return (round(width * aspect), height) if aspect > 1 else (width, round(height / aspect))


def _display_matrix(frame: av.VideoFrame) -> tuple[int, int, int, int] | None:
    """Return a, b, c, d of x' = a x + c y, y' = b x + d y, which leads to the picture as shown."""
    found = frame.side_data.get("DISPLAYMATRIX")
    if found is None:
        return None
    values = np.frombuffer(bytes(cast("Any", found)), dtype=np.int32)
    return int(values[0]), int(values[1]), int(values[3]), int(values[4])


def _upright(pixels: NDArray[Any], matrix: tuple[int, int, int, int] | None) -> NDArray[Any]:
    """Turn by quarters and mirror; angles between are taken to the nearest quarter."""
    if matrix is None:
        return pixels
    a, b, c, d = matrix
    if abs(b) + abs(c) > abs(a) + abs(d):
        pixels = pixels.swapaxes(0, 1)
        right, down = c, b
    else:
        right, down = a, d
    if right < 0:
        pixels = pixels[:, ::-1]
    if down < 0:
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _before_all(name: str) -> str:
    return f"'{name}' broke off before its first frame; copy or download it again"


def _head(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(4096)


def _reason(error: Exception) -> str:
    """Return what went wrong without the address, which may hold a password."""
    if type(error).__name__ == "ExitError":  # PyAV's, at the end of the time that it was given
        return "nothing came in time"
    return (getattr(error, "strerror", None) or type(error).__name__).lower()
