"""Pre- and post-processing on the GPU, with the compiled kernels of `plugins/`.

Of an image its bytes travel to the GPU, as they are, through pinned memory, unless it lies there already; one
launch resizes, normalises and pads it.  What travels back are the detections, with one wait for all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from asag_deploy import kernels
from asag_deploy.bundle.manifest import Manifest, Preprocessing
from asag_deploy.cuda import Device, DeviceArray, is_device_array
from asag_deploy.cuda.arena import BYTE, Arena
from asag_deploy.errors import ImageError
from asag_deploy.images import reading as images
from asag_deploy.images.reading import ChannelOrder, ImageLike, check_channel_order
from asag_deploy.kernels import KernelLibrary
from asag_deploy.kernels.limits import MOST_DETECTIONS
from asag_deploy.loop.stages import Array
from asag_deploy.processing.canvases import Canvas
from asag_deploy.processing.on_host import Decoded, GpuImage, Prepared, Shape, decode
from asag_deploy.processing.postprocess import Found
from asag_deploy.processing.preprocess import padded_shape, resize, resized_shape
from asag_deploy.timing import since


class _Source(NamedTuple):
    """An image (H, W, 3) of bytes, on the host or on the GPU."""

    pixels: NDArray[np.uint8] | DeviceArray
    channel_order: ChannelOrder

    @property
    def shape(self) -> Shape:
        height, width, _ = self.pixels.shape
        return height, width


class OnGpu:
    """The compiled kernels, on the network's stream: an `asag_deploy.processing.on_host.Processing`."""

    def __init__(
        self, device: Device, kernels: KernelLibrary, manifest: Manifest, canvases: Sequence[Canvas] = ()
    ) -> None:
        """Prepare images and finish detections, on its device, for the network that `manifest` describes.

        canvases: the network's own, see `asag_deploy.backends.network.Network.canvases`.
        """
        self._device = device
        self._kernels = kernels
        self._manifest = manifest
        self._canvases = canvases

    def prepare(self, given: Sequence[ImageLike | GpuImage], channel_order: ChannelOrder) -> Prepared:
        """Make a batch.  The host does not wait for it; images on the GPU are used where they lie.

        Raises ImageError also for an image on the GPU that is not uint8 (H, W, 3) and contiguous.
        """
        start = time.perf_counter()
        check_channel_order(channel_order)
        sources = [self._source(image, channel_order) for image in given]
        times_ms = {"preprocess": since(start)}
        begin = time.perf_counter()
        spec = self._manifest.preprocessing
        sizes = np.array([resized_shape(*source.shape, spec) for source in sources], dtype=np.int64)
        shape = (len(sources), 3, *padded_shape(sizes, spec, self._canvases))
        batch = self._device.empty(shape, self._input_type())
        for number, source in enumerate(sources):
            self._fill(batch, number, source, spec)
        times_ms["normalize"] = since(begin)
        return Prepared(batch, sizes, [source.shape for source in sources], times_ms)

    def begin_decode(self, outputs: Mapping[str, Array], shapes: Sequence[Shape]) -> Callable[[], Decoded]:
        """Sort and scale outputs and drop duplicates on the GPU; what is left is read at once.

        More detections of an image than the kernel takes are finished on the host.
        """
        shape, nms_iou = outputs["det_scores"].shape, self._manifest.postprocessing.nms_iou
        if shape[1] > MOST_DETECTIONS:
            return lambda: decode(outputs, shapes, download=self._device.download, nms_iou=nms_iou)
        found = Arena(self._device, alignment=8)
        found.add("class_id", shape, np.int64)
        found.add("counts", shape[:1], np.int64)
        found.add("xyxy", (*shape, 4), np.float32)
        found.add("confidence", shape, np.float32)
        with self._device.lock:
            found.take()
            kernels.postprocess(
                self._kernels,
                outputs["det_scores"].buffer(),
                outputs["det_labels"].buffer(),
                outputs["det_boxes"].buffer(),
                self._device.upload(np.array(shapes, dtype=np.int64)).buffer(),
                xyxy=found["xyxy"].buffer(),
                confidence=found["confidence"].buffer(),
                class_id=found["class_id"].buffer(),
                counts=found["counts"].buffer(),
                nms_iou=nms_iou,
                stream=self._device.stream,
            )
            read = (found.whole, outputs["anchors"], outputs["anchor_count"])
            fetch = self._device.begin_download(read)

        def finish() -> Decoded:
            content, anchors, anchor_count = fetch()
            part = found.on_host(content)
            detections = [
                Found(*(part[name][image, :count].copy() for name in Found._fields))
                for image, count in enumerate(part["counts"].tolist())
            ]
            return Decoded(detections, anchors, anchor_count)

        return finish

    def _source(self, image: ImageLike | GpuImage, channel_order: ChannelOrder) -> _Source:
        if is_device_array(image):
            adopted = self._device.adopt(image)
            if adopted.dtype != BYTE or len(adopted.shape) != 3 or adopted.shape[2] != 3 or not adopted.size:
                raise ImageError(
                    f"expected a uint8 image (H, W, 3) on the GPU, got {adopted.dtype} {adopted.shape}; "
                    "convert it there, or pass a NumPy array"
                )
            return _Source(adopted, channel_order)
        if isinstance(image, np.ndarray) and _is_plain(image):
            return _Source(image, channel_order)
        return _Source(images.load(image, channel_order), "rgb")  # type: ignore[arg-type]

    def _fill(self, batch: DeviceArray, number: int, source: _Source, spec: Preprocessing) -> None:
        """Put an image into its slot of the batch."""
        new_shape = resized_shape(*source.shape, spec)
        pixels = source.pixels
        if _grows_and_shrinks(source.shape, new_shape):  # which OpenCV does otherwise than the kernel
            on_host = self._device.download(pixels) if isinstance(pixels, DeviceArray) else pixels
            pixels = resize(on_host, spec)
        slot = batch.shape[1:]
        # Not under the lock: several threads copy their images into pinned memory at once.
        uploaded = pixels if isinstance(pixels, DeviceArray) else self._device.upload(pixels)
        with self._device.lock:
            kernels.preprocess(
                self._kernels,
                uploaded.buffer(),
                batch.buffer(slot, number * batch.nbytes // batch.shape[0]),
                new_shape=new_shape,
                mean=spec.mean,
                deviation=spec.std,
                channel_order=source.channel_order,
                stream=self._device.stream,
            )
            if uploaded is source.pixels:  # another library's, which may let go of it once this call is over
                self._device.keep(uploaded)

    def _input_type(self) -> np.dtype[Any]:
        inputs = self._manifest.graph("backbone").inputs
        return np.dtype(next(spec.dtype for spec in inputs if spec.name == "image"))


def _is_plain(image: NDArray[Any]) -> bool:
    """Tell whether an array can travel as it is."""
    return (
        image.dtype == BYTE
        and image.ndim == 3
        and image.shape[2] == 3
        and image.size > 0
        and image.flags.c_contiguous
    )


def _grows_and_shrinks(shape: Shape, new_shape: Shape) -> bool:
    taller, wider = new_shape[0] - shape[0], new_shape[1] - shape[1]
    return taller * wider < 0
