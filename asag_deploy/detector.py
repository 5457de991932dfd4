"""`Detector`: images in, detections and probing traces out."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack, overload

import numpy as np
from numpy.typing import NDArray

from asag_deploy import pipeline
from asag_deploy.backends import check_runs_here, open_network
from asag_deploy.backends.network import Network
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.bundle.manifest import Level, Manifest, Mode
from asag_deploy.call_options import Call, CallLimits, CallOptions
from asag_deploy.cuda import is_device_array
from asag_deploy.detections import Detections
from asag_deploy.errors import BackendError, BundleCorruptError, ConfigError, ImageError
from asag_deploy.images.reading import ChannelOrder, ImageLike, refuse_encoded
from asag_deploy.loop.contract import check_stages
from asag_deploy.loop.loop import Begun, Loop, LoopChoice
from asag_deploy.loop.probing import Probed
from asag_deploy.loop.stages import Array
from asag_deploy.loop.stopping import StopRule, stop_rule
from asag_deploy.loop.trace import ProbingTrace
from asag_deploy.processing.boxes import anchors_of
from asag_deploy.processing.candidates import explained
from asag_deploy.processing.on_host import Decoded, GpuImage, Prepared
from asag_deploy.processing.postprocess import best_of, traces_of
from asag_deploy.processing.preprocess import check_batch, check_batch_shape
from asag_deploy.timing import since


@dataclass(frozen=True, kw_only=True, eq=False)
class RawOutput:
    """What the network computes for a batch of B images, before it becomes detections.

    Q is the largest `anchor_count` of the batch; an image's rows from its own count on are padding.
    """

    logits: NDArray[np.float32]
    """(B, Q, classes), before the sigmoid."""
    boxes: NDArray[np.float32]
    """(B, Q, 4) cx, cy, w, h relative to the image's valid size."""
    anchors: NDArray[np.float32]
    """(B, Q, 4) cx, cy, w, h in pixels of the images given, best scored first."""
    anchor_count: NDArray[np.int64]
    """(B,) anchors that reached the decoder."""
    trace: tuple[ProbingTrace, ...]
    """One per image, with patch boxes in pixels of the images given."""


@dataclass(frozen=True, kw_only=True)
class _Origin:
    """What a detector was loaded from, and how."""

    path: Path
    options: dict[str, Any]


def _load_again(kind: type[Detector], origin: _Origin, fingerprint: str) -> Detector:
    bundle = Bundle.open(origin.path)
    if bundle.fingerprint != fingerprint:
        raise BundleCorruptError(
            f"the bundle '{origin.path}' is another than the detector was loaded from; load it again in the "
            "process that sends it"
        )
    return kind.load(bundle, **origin.options)


class Detector:
    """An exported network, ready to detect; made by `Detector.load`.

    It may be called from several threads at once, and is a context manager that closes itself.  To another
    process it travels as the path of its bundle and the options of `load` (pickle, copy, multiprocessing),
    and is loaded there anew.  In a process that was forked it goes on with the caller's thread alone; but
    a fork while OpenVINO detects in another thread, or has just done so, may never end there, so start such
    processes by spawn.
    """

    _origin: _Origin | None = None
    """Where another process loads it from; None for a network that came from elsewhere."""

    def __init__(
        self,
        manifest: Manifest,
        network: Network,
        rule: StopRule,
        *,
        loop: Loop | None = None,
        deadline_ms: float | None = None,
        max_detections: int | None = None,
        anchor_cap: int | None = None,
        requests: int = 1,
    ) -> None:
        """Take a network that is loaded, whatever it was loaded from.

        manifest: what it computes; its graphs are not asked for.  loop: as `Network.loop` gives it; None for
        the one that `Detector.load` would take.  The rest is as `Detector.load` says.
        """
        self._manifest = manifest
        self.requests = requests
        """Calls at once that the network was loaded for."""
        self._network: Network | None = network
        self._limits = CallLimits(
            manifest=manifest,
            rule=rule,
            deadline_ms=deadline_ms,
            max_detections=max_detections,
            anchor_cap=anchor_cap,
        )
        self._loop: Loop = network.loop("auto", deadline_ms) if loop is None else loop

    @classmethod
    def load(
        cls,
        bundle: str | os.PathLike[str] | Bundle,
        *,
        backend: str | None = None,
        mode: Mode | None = None,
        max_level: Level | None = None,
        deadline_ms: float | None = None,
        threads: int | None = None,
        loop: LoopChoice = "auto",
        requests: int = 1,
        max_detections: int | None = None,
        anchor_cap: int | None = None,
    ) -> Detector:
        """Load a bundle.

        bundle: its folder, or an address that it is fetched from once and kept, hf:// or http(s)://; or a
        `Bundle` that is open.
        backend: a name of `asag_deploy.backends.BACKENDS`, or None for ONNX Runtime on the CPU.
        mode: `exact`, or `fast` (stop when fewer than 3 anchors ask for a closer look, 15 patches a level at
        most); None for what the bundle was exported for.
        max_level: the deepest level that may be probed, P5, P4 or P3; None for all that the bundle has.
        deadline_ms: no further level is begun once a call has taken this many milliseconds.
        threads: CPU threads, or None for the backend's choice.
        loop: who takes the stop decisions; `host`; `device` for the GPU itself, a whole detection being one
        launch (TensorRT, compiled kernels, CUDA 13); `auto` for the device where it can and no deadline is
        set.  Detections and traces are the same.
        requests: calls at once that the threads are divided among.  With 1, a call has all of them and is
        done soonest; with as many as there are cores, `stream` and calls from that many threads get most
        images a second, each taking longer.
        max_detections: the most detections of an image, at most what the bundle was exported for.
        anchor_cap: the most anchors that reach the decoder, from the floor to what the bundle was exported
        for; the best-scored of more.

        What a call asks for (`CallOptions`) takes precedence over mode, max_level, deadline_ms,
        max_detections and anchor_cap.

        Raises BundleError if the bundle cannot be used, ConfigError for an option that makes no sense with
        it, BackendError if the backend cannot run here, EngineError if the bundle has no engine for it.
        """
        options = {
            "backend": backend,
            "mode": mode,
            "max_level": max_level,
            "deadline_ms": deadline_ms,
            "threads": threads,
            "loop": loop,
            "requests": requests,
            "max_detections": max_detections,
            "anchor_cap": anchor_cap,
        }
        check_runs_here(backend)  # before a bundle is fetched
        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        check_stages(opened)
        rule = stop_rule(opened.manifest, mode, max_level)
        CallLimits(  # to refuse what makes no sense before the network takes its time
            manifest=opened.manifest,
            rule=rule,
            deadline_ms=deadline_ms,
            max_detections=max_detections,
            anchor_cap=anchor_cap,
        )
        network = open_network(backend, opened, threads, requests)
        detector = cls(
            opened.manifest,
            network,
            rule,
            loop=network.loop(loop, deadline_ms),
            deadline_ms=deadline_ms,
            max_detections=max_detections,
            anchor_cap=anchor_cap,
            requests=requests,
        )
        detector._origin = _Origin(path=opened.path, options=options)
        return detector

    def __reduce__(self) -> tuple[Callable[..., Detector], tuple[type[Detector], _Origin, str]]:
        """Travel to another process as what `load` was called with.

        Raises ConfigError where there is no such thing, and in the other process what `load` raises, or
        BundleCorruptError if the bundle is not the same any more.
        """
        if self._network is None:
            raise ConfigError("a detector that is closed cannot be pickled or copied; load it again first")
        if self._origin is None:
            raise ConfigError(
                "a detector whose network was made in memory cannot be pickled or copied; load a bundle that "
                "asag-export has written with Detector.load, or make the detector in the other process"
            )
        bundle = Bundle(path=self._origin.path, manifest=self._manifest)
        return _load_again, (type(self), self._origin, bundle.fingerprint)

    @property
    def manifest(self) -> Manifest:
        """What the bundle says about itself."""
        return self._manifest

    # A str is a path, although it is a Sequence[str] too.
    @overload
    def __call__(  # type: ignore[overload-overlap]
        self,
        images: ImageLike | GpuImage,
        *,
        channel_order: ChannelOrder = ...,
        **options: Unpack[CallOptions],
    ) -> Detections: ...

    @overload
    def __call__(
        self,
        images: Sequence[ImageLike | GpuImage],
        *,
        channel_order: ChannelOrder = ...,
        **options: Unpack[CallOptions],
    ) -> list[Detections]: ...

    def __call__(
        self,
        images: ImageLike | GpuImage | Sequence[ImageLike | GpuImage],
        *,
        channel_order: ChannelOrder = "bgr",
        **options: Unpack[CallOptions],
    ) -> Detections | list[Detections]:
        """Detect objects in one image, or in a list of them as one batch.

        An image is a path, or a uint8 or uint16 array (H, W), (H, W, 3) or (H, W, 4) whose colours stand in
        `channel_order`; with a TensorRT backend and the compiled kernels of `plugins/` also a uint8 (H, W, 3)
        array on the GPU (CuPy, PyCUDA, PyTorch), which never leaves it.  In a batch of images of one size,
        detections do not depend on the others, up to rounding; where sizes differ, padding changes the
        smaller images' features near the border.

        options: what this call asks for, else it is as the detector was loaded: `threshold`, the least
        confidence of what is returned; `mode`, `max_level`, `deadline_ms`, `max_detections` and `anchor_cap`,
        as `load` says; `explain=True` keeps every level's anchors in the trace (`LevelTrace.candidates`).  A
        call with a deadline is decided on by the host (`asag_deploy.call_options.CallOptions`).

        Raises ImageError for what is no image, ConfigError for options that make no sense with the bundle,
        BackendError if the backend fails or the detector is closed.
        """
        refuse_encoded(images)  # which Python takes for a sequence
        if isinstance(images, Sequence) and not isinstance(images, str):
            return self._detect(images, channel_order, options)
        return self._detect([images], channel_order, options)[0]

    def stream(
        self,
        sources: ImageLike | Iterable[ImageLike],
        *,
        batch_size: int = 1,
        requests: int | None = None,
        channel_order: ChannelOrder = "bgr",
        frames: pipeline.Frames = "first",
        **options: Unpack[CallOptions],
    ) -> Generator[Detections, None, None]:
        """Detect in image after image, reading the next ones meanwhile; results come in the images' order.

        sources: arrays as calling the detector takes them (not on a GPU), and names of image files, folders,
        globs, videos, addresses or cameras, in any mixture and number, or a single one.
        batch_size: images that go through the network together, of those that reach it at the same size and
        are near each other; with 1, detections are those of calling the detector image by image.
        requests: batches that are detected in at once; None for what the detector was loaded for.
        frames: `all` goes through every frame of animated and multi-page images, whose first is taken else.
        options: as calling the detector takes them; a deadline is of each batch, from when it is begun.

        Videos need PyAV (`pip install 'asag-deploy[video]'`); `Detections.time_s` is the time of a frame.
        A few images at most are read ahead.  What calling the detector would raise for an image, and what the
        iterable raises, is raised in its turn and ends the stream; so is SourceError for a folder or video
        that gives nothing, and at the end of a video that breaks off before its own or is damaged.  Closing
        the iterator ends it early, once what is under way is done.  Raises ConfigError at once for numbers
        less than 1, and for options that make no sense.
        """
        self._limits.of(options, start=0)
        return pipeline.stream(
            self,
            sources,
            batch_size=batch_size,
            requests=requests,
            channel_order=channel_order,
            frames=frames,
            options=options,
        )

    def forward(self, images: NDArray[np.float32] | Any, sizes: NDArray[np.integer[Any]]) -> RawOutput:
        """Run the network on a batch that is already normalised.

        images: float32 (B, 3, H, W) RGB, padded right and bottom with zeros: a NumPy array, or with a GPU
        backend a contiguous array on the GPU that has DLPack or `__cuda_array_interface__` (CuPy, PyCUDA,
        PyTorch), which is used where it lies; sizes: integer (B, 2), the valid height and width of each.
        Raises ImageError for other shapes or types, BackendError as calling the detector does, and with a
        TensorRT backend EngineUnfitError for sizes that its engines were not built for.
        """
        network, valid, probed = self._forward(images, sizes)
        count = network.download(probed.outputs["anchor_count"])
        logits, boxes, anchors = (
            network.download(probed.outputs[name])[:, : count.max()].astype(np.float32)
            for name in ("logits", "boxes", "anchors")
        )
        scales = [(1.0, 1.0)] * len(valid)
        trace = traces_of(network, self.manifest.probing, probed, valid, count, scales)
        return RawOutput(logits=logits, boxes=boxes, anchors=anchors, anchor_count=count, trace=trace)

    def forward_on_device(
        self, images: NDArray[np.float32] | Any, sizes: NDArray[np.integer[Any]]
    ) -> dict[str, Array]:
        """Run `forward`, but leave the decoder's outputs on the GPU, without waiting for them.

        Returns the outputs of `decoder` by name (`asag_deploy.loop.stages`); rows from `anchor_count` on are
        padding.
        Each array has DLPack and `__cuda_array_interface__`, so that CuPy, PyCUDA or PyTorch take it without
        a copy.  Raises ConfigError with a backend whose arrays are not on a GPU, and what `forward` raises.
        """
        network = self._open_network()
        if not network.takes_device_arrays:
            raise ConfigError(
                "forward_on_device needs a backend that runs on a GPU with TensorRT; load the detector with "
                "backend='tensorrt-rtx', or call forward"
            )
        return self._forward(images, sizes)[2].outputs

    def _forward(
        self, images: NDArray[np.float32] | Any, sizes: NDArray[np.integer[Any]]
    ) -> tuple[Network, NDArray[np.int64], Probed]:
        call = self._limits.of({}, start=time.perf_counter())
        network = self._open_network()
        if not is_device_array(images):
            check_batch(images, sizes)
        elif not network.takes_device_arrays:
            raise ImageError(
                "the images lie on a GPU, but this backend takes arrays on the host; load the detector with "
                "backend='tensorrt-rtx', or pass a NumPy array"
            )
        image = network.upload(images)
        try:
            if is_device_array(images):
                check_batch_shape(image.shape, image.dtype, sizes)
            valid = sizes.astype(np.int64)
            return network, valid, self._begin(network, image, valid, call).finish()
        finally:
            network.keep(image)

    def close(self) -> None:
        """Let go of the network; calls that are under way end as usual.  Closing twice does no harm."""
        self._network = None

    def __enter__(self) -> Self:
        self._open_network()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _detect(
        self, images: Sequence[ImageLike | GpuImage], channel_order: ChannelOrder, options: CallOptions
    ) -> list[Detections]:
        start = time.perf_counter()
        call = self._limits.of(options, start=start)
        network = self._open_network()
        if not images:
            return []
        processing = network.processing(self.manifest)
        prepared = processing.prepare(images, channel_order)
        times_ms = dict(prepared.times_ms)

        # Where the loop runs on the device, the host waits once, when all has been begun.
        begun = self._begin(network, prepared.image, prepared.sizes, call)
        finish_decoding = processing.begin_decode(begun.outputs, prepared.shapes)
        probed = begun.finish()
        times_ms.update(probed.times_ms)

        begin = time.perf_counter()
        decoded = finish_decoding()
        if probed.outputs is not begun.outputs:  # detected again
            decoded = processing.begin_decode(probed.outputs, prepared.shapes)()
        counts, scales = decoded.anchor_count, prepared.scales
        traces = traces_of(network, call.probing, probed, prepared.sizes, counts, scales)
        results = list(self._results(prepared, decoded, call, scales))
        times_ms["postprocess"] = since(begin)
        if call.explain:
            begin = time.perf_counter()
            traces = tuple(explained(network, call.probing, probed.levels, traces, decoded.anchors, scales))
            times_ms["explain"] = since(begin)
        times_ms["total"] = since(start)
        return [
            Detections(**fields, trace=trace, times_ms=dict(times_ms))
            for fields, trace in zip(results, traces, strict=True)
        ]

    def _begin(self, network: Network, image: Array, sizes: NDArray[np.int64], call: Call) -> Begun:
        return self._loop.begin(network, call.probing, call.rule, image, sizes)

    def _results(
        self, prepared: Prepared, decoded: Decoded, call: Call, scales: Sequence[tuple[float, float]]
    ) -> Iterator[dict[str, Any]]:
        """Yield the fields of each image's `Detections`, but for trace and times."""
        for i, (scale, count) in enumerate(zip(scales, decoded.anchor_count, strict=True)):
            yield {
                **best_of(decoded.found[i], call.threshold, call.max_detections)._asdict(),
                "categories": self.manifest.categories,
                "original_shape": prepared.shapes[i],
                "anchors": anchors_of(decoded.anchors[i, :count], scale),
            }

    def _open_network(self) -> Network:
        network = self._network
        if network is None:
            raise BackendError("the detector is closed; load it again with Detector.load")
        return network
