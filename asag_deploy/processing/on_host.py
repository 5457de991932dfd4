"""Before and after the network: images become its input, and its outputs detections.

`OnHost` does it for every backend, with OpenCV and NumPy.  `processing.on_gpu.OnGpu` does the same, to the
bit, where the network runs on a GPU and the compiled kernels of `plugins/` are there
(`asag_deploy.backends.network.Network.processing`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from asag_deploy.bundle.manifest import Manifest
from asag_deploy.cuda import is_device_array
from asag_deploy.errors import ImageError
from asag_deploy.images import reading as images
from asag_deploy.images.reading import ChannelOrder, ImageLike
from asag_deploy.kernels import LIBRARY_VARIABLE
from asag_deploy.loop.stages import Array, Stages
from asag_deploy.processing.canvases import Canvas
from asag_deploy.processing.postprocess import Found, detections_of
from asag_deploy.processing.preprocess import make_batch, normalize, resize_all
from asag_deploy.timing import since

Shape = tuple[int, int]
"""Height and width in pixels."""


class GpuImage(Protocol):
    """A uint8 image (H, W, 3) in the memory of a GPU: of PyCUDA, CuPy, Numba, PyTorch."""

    @property
    def __cuda_array_interface__(self) -> Mapping[str, Any]: ...


class Prepared(NamedTuple):
    """A batch of B images as the network takes it."""

    image: Array
    """(B, 3, H, W) on the network's device, normalised and zero-padded right and bottom."""
    sizes: NDArray[np.int64]
    """(B, 2) valid height and width of each."""
    shapes: list[Shape]
    """Of the images given."""
    times_ms: dict[str, float]
    """`preprocess` and `normalize`."""

    @property
    def scales(self) -> list[tuple[float, float]]:
        """How many times (x, y) as large as the network's each given image is."""
        sizes = self.sizes.tolist()
        return [(w / size[1], h / size[0]) for (h, w), size in zip(self.shapes, sizes, strict=True)]


class Decoded(NamedTuple):
    """What the decoder made of a batch of B images, on the host."""

    found: list[Found]
    """One per image."""
    anchors: NDArray[np.floating[Any]]
    """(B, Q, 4) cx, cy, w, h in the network's pixels."""
    anchor_count: NDArray[np.int64]
    """(B,) how many of them are real."""


class Processing(Protocol):
    """What comes before and after a network."""

    def prepare(self, given: Sequence[ImageLike | GpuImage], channel_order: ChannelOrder) -> Prepared:
        """Make a batch of at least one image.  Raises ImageError for what is no image."""
        ...

    def begin_decode(self, outputs: Mapping[str, Array], shapes: Sequence[Shape]) -> Callable[[], Decoded]:
        """Begin to turn the decoder's outputs into detections in images of these shapes.

        What is returned waits for them, and is to be called once.
        """
        ...


def decode(
    outputs: Mapping[str, Array],
    shapes: Sequence[Shape],
    *,
    download: Callable[[Any], NDArray[Any]],
    nms_iou: float | None,
) -> Decoded:
    """Turn the decoder's outputs into detections in images of these shapes, in NumPy."""
    names = ("det_scores", "det_labels", "det_boxes", "anchors", "anchor_count")
    scores, labels, boxes, anchors, count = (download(outputs[name]) for name in names)
    found = [
        detections_of(scores[i], labels[i], boxes[i], original_shape=shape, nms_iou=nms_iou)
        for i, shape in enumerate(shapes)
    ]
    return Decoded(found, anchors, count)


class OnHost:
    """OpenCV resizes and normalises, or the network's own stage `normalize` does: a `Processing`."""

    def __init__(
        self,
        stages: Stages,
        manifest: Manifest,
        *,
        canvases: Sequence[Canvas] = (),
        takes_device_arrays: bool = False,
        normalizes: bool = False,
    ) -> None:
        """Prepare images and finish detections for the network that `manifest` describes.

        canvases, takes_device_arrays: the network's own, see `asag_deploy.backends.network.Network`.
        normalizes: whether to do without the stage `normalize`.
        """
        self._stages = stages
        self._manifest = manifest
        self._canvases = canvases
        self._takes_device_arrays = takes_device_arrays
        self._normalizes = normalizes

    def prepare(self, given: Sequence[ImageLike | GpuImage], channel_order: ChannelOrder) -> Prepared:
        """Make a batch; images on a GPU are refused with ImageError."""
        start = time.perf_counter()
        originals = [images.load(self._on_host(image), channel_order) for image in given]
        spec = self._manifest.preprocessing
        if self._normalizes:
            resized, sizes, padded = resize_all(originals, spec, self._canvases)
            times_ms = {"preprocess": since(start)}
            begin = time.perf_counter()
            normalized = normalize(resized, padded, spec)
            times_ms["normalize"] = since(begin)
            image = self._stages.upload(normalized)
        else:
            pixels, sizes = make_batch(originals, spec, self._canvases)
            times_ms = {"preprocess": since(start)}
            begin = time.perf_counter()
            inputs = {"pixels": self._stages.upload(pixels), "image_size": self._stages.upload(sizes)}
            image = self._stages.stage("normalize")(inputs)["image"]
            times_ms["normalize"] = since(begin)
        return Prepared(image, sizes, [original.shape[:2] for original in originals], times_ms)

    def begin_decode(self, outputs: Mapping[str, Array], shapes: Sequence[Shape]) -> Callable[[], Decoded]:
        """Sort and scale outputs and drop duplicates in NumPy, once they are waited for."""
        return lambda: self._decode(outputs, shapes)

    def _decode(self, outputs: Mapping[str, Array], shapes: Sequence[Shape]) -> Decoded:
        nms_iou = self._manifest.postprocessing.nms_iou
        return decode(outputs, shapes, download=self._stages.download, nms_iou=nms_iou)

    def _on_host(self, image: ImageLike | GpuImage) -> ImageLike:
        if not is_device_array(image):
            return image  # type: ignore[return-value]
        if self._takes_device_arrays:
            raise ImageError(
                "the image lies on a GPU, and to resize it there takes the compiled kernels; build them as "
                f"plugins/README.md says and set {LIBRARY_VARIABLE}, or pass a NumPy array"
            )
        raise ImageError(
            "the image lies on a GPU, but this backend takes arrays on the host; load the detector with "
            "backend='tensorrt-rtx', or pass a NumPy array"
        )
