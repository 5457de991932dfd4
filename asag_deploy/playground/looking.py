"""What is looked at, and what is seen: of a picture and a visitor's choices, pictures and sentences."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Unpack

import numpy as np

from asag_deploy.bundle.manifest import FIRST_LEVEL, Level, Manifest, Mode
from asag_deploy.call_options import CallOptions
from asag_deploy.detections import Detections
from asag_deploy.detector_options import DetectorOptions
from asag_deploy.errors import plural
from asag_deploy.images.drawing import Picture, draw_detections, shown_at
from asag_deploy.images.formats import image_header
from asag_deploy.images.header import Format
from asag_deploy.images.level_pictures import Scale, decoder_picture, level_picture, scaled
from asag_deploy.images.reading import ChannelOrder, RgbImage, decode_image, read_bytes
from asag_deploy.loop.trace import StopReason
from asag_deploy.playground.words import decoder_caption, level_caption, story

MOST_PIXELS = 100_000_000
"""Of a picture that is taken."""
_MOST_TIMES = 4
_SHOWN_BY_BROWSERS: frozenset[Format] = frozenset({"jpeg", "png", "webp", "avif", "gif", "bmp"})
_ENOUGH_SECONDS = 1.0
"""After which a comparison is not timed again."""


class LookingDetector(Protocol):
    """What is asked of a detector: `asag_deploy.Detector`, or what stands in for it."""

    @property
    def manifest(self) -> Manifest:
        """What the bundle says about itself."""
        ...

    def __call__(
        self, images: RgbImage, *, channel_order: ChannelOrder = ..., **options: Unpack[CallOptions]
    ) -> Detections:
        """Detect in one picture."""
        ...


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What a visitor has chosen; the detector refuses what makes no sense with its bundle."""

    threshold: float
    max_level: Level
    mode: Mode
    deadline_ms: float | None = None
    """None, 0 and less are no deadline."""
    anchor_cap: int | None = None
    """None where the bundle's is fixed."""
    max_detections: int

    def options(self) -> CallOptions:
        """Return what the call is given."""
        return {
            "threshold": self.threshold,
            "max_level": self.max_level,
            "mode": self.mode,
            "deadline_ms": math.inf if not self.has_deadline else self.deadline_ms,
            "anchor_cap": self.anchor_cap,
            "max_detections": self.max_detections,
        }

    @property
    def has_deadline(self) -> bool:
        """Whether there is one."""
        return self.deadline_ms is not None and self.deadline_ms > 0


@dataclass(frozen=True, kw_only=True)
class Ranges:
    """What a bundle lets a visitor choose from."""

    levels: tuple[Level, ...]
    modes: tuple[Mode, ...]
    anchor_cap: tuple[int, int]
    """Least and most; both the same where it is fixed."""
    max_detections: int

    @classmethod
    def of(cls, manifest: Manifest) -> Ranges:
        """Read them from what the bundle says about itself."""
        probing = manifest.probing
        most = probing.anchor_cap
        return cls(
            levels=(FIRST_LEVEL, *(level.level for level in probing.levels)),
            modes=("exact", "fast") if probing.mode == "exact" else ("fast",),
            anchor_cap=(max(probing.anchor_floor, 1) if probing.cap_can_be_lowered else most, most),
            max_detections=manifest.postprocessing.max_detections,
        )

    def first_choices(self, loaded: DetectorOptions, threshold: float) -> Choices:
        """Return where a page begins: as the detector was loaded."""
        least, most = self.anchor_cap
        return Choices(
            threshold=threshold,
            max_level=loaded.max_level or self.levels[-1],
            mode=loaded.mode or self.modes[0],
            deadline_ms=loaded.deadline_ms,
            anchor_cap=None if least == most else loaded.anchor_cap or most,
            max_detections=loaded.max_detections or self.max_detections,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Sight:
    """What was found in a picture, and how it was looked for."""

    found: Detections
    picture: Picture
    """The picture with its detections."""
    levels: tuple[tuple[Picture, str], ...]
    """A picture of each level with its caption, and one of the anchors that reached the decoder."""
    story: str

    @property
    def trace_json(self) -> str:
        """Everything as a JSON text: detections, anchors, the trace with every level's anchors, times."""
        return json.dumps(self.found.to_json(), indent=1)


def read(file: Path, name: str | None = None) -> RgbImage:
    """Read a picture that a visitor has given; raises ImageError for one that is none.

    name: what messages call it, by default the file's name without its folder, which is the server's.
    """
    return decode_image(read_bytes(file), file.name if name is None else name, max_pixels=MOST_PIXELS)


def browsers_show(file: Path) -> bool:
    """Tell whether browsers show a picture, by what is in its file; raises ImageError if that is gone."""
    header = image_header(read_bytes(file))
    return header is not None and header.format in _SHOWN_BY_BROWSERS


def look(detector: LookingDetector, picture: RgbImage, choices: Choices) -> Sight:
    """Detect, and draw what was found and how probing decided.

    Raises ConfigError for choices that make no sense with the bundle, and what the detector raises.
    """
    options = choices.options()
    options["explain"] = True
    found = detector(picture, channel_order="rgb", **options)
    shown, scale = shown_at(picture)
    levels = [
        (level_picture(shown, scale, found.trace, number), level_caption(found.trace, number))
        for number in range(len(found.trace.levels))
    ]
    levels.append((decoder_picture(shown, scale, found.trace), decoder_caption(found.trace)))
    return Sight(
        found=found,
        picture=with_detections(shown, scale, found),
        levels=tuple(levels),
        story=story(
            found.trace,
            deepest=Ranges.of(detector.manifest).levels[-1],
            deadline_ms=choices.deadline_ms if choices.has_deadline else None,
        ),
    )


def compare(detector: LookingDetector, picture: RgbImage, choices: Choices) -> list[tuple[Picture, str]]:
    """Detect once or a few times for each level that the bundle has as the deepest, without a deadline.

    Returns pictures with detections, each with a caption that says how many objects it took how long to find,
    in the shortest of these times: the first call of a size of picture takes longer than those after it.
    """
    shown, scale = shown_at(picture)
    levels = Ranges.of(detector.manifest).levels
    found: dict[Level, Detections] = {}
    times: dict[Level, float] = dict.fromkeys(levels, math.inf)
    begin = time.perf_counter()
    for number in range(_MOST_TIMES):
        if number and time.perf_counter() - begin > _ENOUGH_SECONDS:
            break
        for level in levels:
            options = choices.options()
            options["max_level"], options["deadline_ms"] = level, math.inf
            found[level] = detector(picture, channel_order="rgb", **options)
            times[level] = min(times[level], found[level].times_ms["total"])
    return [
        (with_detections(shown, scale, found[level]), _stopped_caption(level, found[level], times[level]))
        for level in levels
    ]


def _stopped_caption(level: Level, found: Detections, time_ms: float) -> str:
    caption = f"{level}: {plural(len(found), 'object')} in {time_ms:.0f} ms"
    exit_level = found.trace.exit_level
    if exit_level == level:
        return caption
    few = "too few" if found.trace.stop == StopReason.FEW_SELECTED else "none"
    return f"{caption}; it stopped after {exit_level}, where {few} asked for a closer look"


def with_detections(shown: Picture, scale: Scale, found: Detections) -> Picture:
    """Return a copy of a picture with detections drawn on it; scale: from the image's pixels to its own."""
    drawn = np.array(shown)
    draw_detections(
        drawn,
        xyxy=scaled(found.xyxy, scale),
        class_id=found.class_id,
        names=found.names,
        confidence=found.confidence,
    )
    return drawn
