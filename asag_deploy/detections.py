"""`Detections`: what the detector found in one image, and how it looked for it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from asag_deploy.bundle.manifest import Category, distinct_names
from asag_deploy.errors import ConfigError, ImageError
from asag_deploy.extras import missing
from asag_deploy.images.drawing import draw_caption, draw_detections, draw_trace, trace_caption
from asag_deploy.images.reading import ChannelOrder, ImageLike, load
from asag_deploy.images.writing import write_picture
from asag_deploy.loop.trace import ProbingTrace

if TYPE_CHECKING:
    import supervision


@dataclass(frozen=True, kw_only=True, eq=False)
class Detections:
    """The n detections of one image, best first, and the probing trace that led to them.

    Boxes are x1, y1, x2, y2 in pixels of the original image.  Raises ConfigError when shapes, types or
    classes do not fit together.
    """

    xyxy: NDArray[np.float32]
    """(n, 4) x1, y1, x2, y2, clipped to the image."""
    confidence: NDArray[np.float32]
    """(n,) from 0 to 1, descending."""
    class_id: NDArray[np.int64]
    """(n,) indices into `categories`."""
    categories: tuple[Category, ...]
    """Every class the network knows, with the id it has in the data set."""
    original_shape: tuple[int, int]
    """Height and width of the original image."""
    anchors: NDArray[np.float32]
    """(q, 4) x1, y1, x2, y2: the anchors the decoder started from.

    Best scored first if more would have passed than the cap lets through; otherwise level by level, as they
    were predicted.  Their scores are in the trace of a call with `explain=True`."""
    trace: ProbingTrace
    """The levels that were run, with their patches in pixels of the original image, and why they ended."""
    times_ms: dict[str, float]
    """Wall time in milliseconds of each phase of the call (`preprocess`, `backbone`, ..., `postprocess`, and
    `explain` where that was asked for).

    The images of a batch share it.  `normalize` begins with the upload; where images are prepared on the GPU
    it holds resizing and padding too, and `preprocess` reading them alone.  A GPU backend goes on before the
    GPU has finished: what it takes shows where the host next needs a value."""
    time_s: float | None = None
    """Seconds from the start of the video or animation that the image is a frame of.

    `Detector.stream` sets it; None for other images."""

    def __post_init__(self) -> None:
        count = len(self.xyxy)
        _check("xyxy", self.xyxy, np.float32, (count, 4))
        _check("confidence", self.confidence, np.float32, (count,))
        _check("class_id", self.class_id, np.int64, (count,))
        _check("anchors", self.anchors, np.float32, (len(self.anchors), 4))
        if count and not (self.class_id.min() >= 0 and self.class_id.max() < len(self.categories)):
            raise ConfigError(
                f"expected class_id from 0 to {len(self.categories) - 1}, "
                f"got {self.class_id.min()} to {self.class_id.max()}"
            )
        if not (self.confidence[:-1] >= self.confidence[1:]).all():
            raise ConfigError("expected confidence in descending order, got detections that are not sorted")
        if len(self.original_shape) != 2 or min(self.original_shape) < 1:
            raise ConfigError(f"expected original_shape (height, width), got {self.original_shape}")

    def __len__(self) -> int:
        return len(self.xyxy)

    @property
    def names(self) -> list[str]:
        """The class name of each detection, with the id of its class where several have that name."""
        names = distinct_names(self.categories)
        return [names[i] for i in self.class_id]

    def filter(self, threshold: float) -> Detections:
        """Return the detections whose confidence is at least `threshold`; the trace stays as it is."""
        if not 0 <= threshold <= 1:
            raise ConfigError(f"expected a threshold from 0 to 1, got {threshold}")
        keep = self.confidence >= threshold
        return dataclasses.replace(
            self, xyxy=self.xyxy[keep], confidence=self.confidence[keep], class_id=self.class_id[keep]
        )

    def plot(
        self, image: ImageLike, *, trace: bool = False, channel_order: ChannelOrder = "bgr"
    ) -> NDArray[np.uint8]:
        """Draw the detections on a copy of the image they were found in.

        `image` is a path, or an array in `channel_order`; the picture returned is uint8 (H, W, 3) in that
        order too.  `trace` adds the probed patches in red, the anchors in white, and a caption.  Raises
        ImageError if the image cannot be read or is not of `original_shape`.
        """
        picture = self._picture(image, trace, channel_order)
        return picture if channel_order == "rgb" else np.ascontiguousarray(picture[..., ::-1])

    def save(
        self,
        path: str | os.PathLike[str],
        image: ImageLike,
        *,
        trace: bool = False,
        channel_order: ChannelOrder = "bgr",
    ) -> None:
        """Write what `plot` draws to `path`, in the format of its suffix, whole or not at all.

        Raises ImageError as `plot` does, and OutputError if the file cannot be written.
        """
        write_picture(path, self._picture(image, trace, channel_order))

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain JSON values.

        - `width`, `height`: of the original image
        - `detections`: best first, each with `box` [x1, y1, x2, y2] in pixels, `confidence`, `class_id`
          (index), `category_id` (of the data set) and `name`
        - `anchors`: [x1, y1, x2, y2] each
        - `trace`: as `ProbingTrace.to_dict`
        - `times_ms`: phase to milliseconds
        """
        height, width = self.original_shape
        return {
            "width": int(width),
            "height": int(height),
            "detections": [
                {
                    "box": _rounded(box, 2),
                    "confidence": round(float(confidence), 6),
                    "class_id": int(i),
                    "category_id": self.categories[i].id,
                    "name": name,
                }
                for box, confidence, i, name in zip(
                    self.xyxy, self.confidence, self.class_id, self.names, strict=True
                )
            ],
            "anchors": [_rounded(box, 2) for box in self.anchors],
            "trace": self.trace.to_dict(),
            "times_ms": {phase: round(float(time), 3) for phase, time in self.times_ms.items()},
        }

    def to_coco(
        self, image_id: int | str, *, categories: Mapping[int, int | str] | None = None
    ) -> list[dict[str, Any]]:
        """Return COCO results: one dict a detection, `bbox` being x, y, width, height in pixels.

        categories: the id to write for each of the bundle's category ids; detections of others are left out.
        None writes the bundle's own.
        """
        ids = {one.id: one.id for one in self.categories} if categories is None else categories
        return [
            {
                "image_id": image_id,
                "category_id": ids[self.categories[i].id],
                "bbox": _rounded((x1, y1, x2 - x1, y2 - y1), 3),
                "score": round(float(confidence), 6),
            }
            for (x1, y1, x2, y2), confidence, i in zip(self.xyxy, self.confidence, self.class_id, strict=True)
            if self.categories[i].id in ids
        ]

    def to_supervision(self) -> supervision.Detections:
        """Convert to Roboflow's supervision, with names under `data["class_name"]`.

        Raises ConfigError if supervision is not installed.
        """
        try:
            import supervision
        except ImportError as error:
            raise ConfigError(missing(error, purpose="to_supervision()")) from None
        return supervision.Detections(
            xyxy=self.xyxy.copy(),
            confidence=self.confidence.copy(),
            class_id=self.class_id.copy(),
            data={"class_name": np.array(self.names, dtype=np.str_)},
        )

    def _picture(self, image: ImageLike, trace: bool, channel_order: ChannelOrder) -> NDArray[np.uint8]:
        rgb = load(image, channel_order)
        if rgb.shape[:2] != tuple(self.original_shape):
            raise ImageError(
                f"expected the image of {_size(self.original_shape)} that the detections belong to, "
                f"got one of {_size(rgb.shape)}"
            )
        picture = rgb.copy()
        if trace:
            draw_trace(picture, self.anchors, self.trace)
        draw_detections(
            picture, xyxy=self.xyxy, class_id=self.class_id, names=self.names, confidence=self.confidence
        )
        if trace:
            draw_caption(picture, trace_caption(self.trace))
        return picture


def _check(name: str, array: Any, dtype: Any, shape: tuple[int, ...]) -> None:
    if array.dtype != dtype or array.shape != shape:
        raise ConfigError(
            f"expected {name} as {np.dtype(dtype)} of shape {shape}, got {array.dtype} of shape {array.shape}"
        )


def _rounded(values: Any, digits: int) -> list[float]:
    return [round(float(value), digits) for value in values]


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]} x {shape[0]} pixels (width x height)"
