"""What has to be equal on a GPU: what its kernels and the CPU make of pictures, and the images of a batch."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asag_deploy.backends import open_network
from asag_deploy.bundle import Bundle
from asag_deploy.errors import BackendError, ParityError
from asag_deploy.images import read_image
from asag_deploy.kernels import LIBRARY_VARIABLE
from asag_deploy.postprocess import Found
from asag_deploy.probing import StopRule, detect
from asag_deploy.processing import Decoded, OnHost, Processing
from asag_deploy.stages import Network
from asag_deploy.wrapped_network import HookedNetwork

Picture = NDArray[np.uint8]

SIZES = ((1080, 1920), (480, 640), (333, 211), (600, 600))
"""Heights and widths of generated pictures: some grow and some shrink, one to a multiple of 32."""
REPEATS = 20


class Recorder(HookedNetwork):
    """A network that notes the inputs of every stage."""

    def __init__(self, network: Network) -> None:
        super().__init__(network, before=lambda name, inputs: self.calls.append((name, dict(inputs))))
        self.calls: list[tuple[str, dict[str, Any]]] = []


@contextmanager
def kernels_at(library: Path) -> Iterator[None]:
    """Let backends find the compiled kernels there, unless the environment names others."""
    before = os.environ.get(LIBRARY_VARIABLE)
    os.environ[LIBRARY_VARIABLE] = before or str(library.resolve())
    try:
        yield
    finally:
        if before is None:
            del os.environ[LIBRARY_VARIABLE]


def pictures(folder: Path | None) -> list[Picture]:
    """The photographs of a folder (at most 8), or generated scenes of `SIZES`."""
    if folder is not None:
        files = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
        return [read_image(file) for file in files[:8]]
    from asag_training.scenes import draw_scene

    return [draw_scene(height, width, seed=i) for i, (height, width) in enumerate(SIZES)]


def compare_processing(bundle: Bundle, backend: str, images: Sequence[Picture]) -> dict[str, Any]:
    """What the kernels and the CPU make of pictures, alone and on the GPU already, and of their detections.

    Raises ParityError if a single bit differs.
    """
    network = open_network(backend, bundle)
    on_gpu = network.processing(bundle.manifest)
    if isinstance(on_gpu, OnHost):
        raise BackendError(f"the backend '{backend}' did not take the kernels; set {LIBRARY_VARIABLE}")
    cpu = open_network(None, bundle)
    on_cpu, here = OnHost(cpu, bundle.manifest), OnHost(network, bundle.manifest)
    differing = {"inputs": 0, "inputs of pictures on the GPU": 0, "detections": 0}
    for image in images:
        expected = on_cpu.prepare([image], "rgb")
        truth = cpu.download(expected.image)
        prepared = on_gpu.prepare([image], "rgb")
        differing["inputs"] += entries(truth, network.download(prepared.image))
        there = on_gpu.prepare([network.upload(image)], "rgb")
        differing["inputs of pictures on the GPU"] += entries(truth, network.download(there.image))
        probed = detect(network, bundle.manifest.probing, StopRule(), prepared.image, prepared.sizes)
        found = (side.decode(probed.outputs, prepared.shapes) for side in (here, on_gpu))
        differing["detections"] += detections_that_differ(*found)
    if any(differing.values()):
        raise ParityError(f"entries that differ from the CPU's: {differing}; rebuild the kernels")
    sides = {"gpu": on_gpu, "cpu": here}
    times = {name: time_processing(side, network, images[0]) for name, side in sides.items()}
    took = f"{times['gpu']:.2f} ms on the GPU, {times['cpu']:.2f} on the CPU"
    return {"detail": f"{len(images)} are equal; {took}", "pictures": len(images), "prepare_ms": times}


def time_processing(side: Processing, network: Any, image: Picture) -> float:
    """Milliseconds to prepare a picture for a TensorRT backend, until the GPU has done it."""
    taken = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        side.prepare([image], "rgb")
        network.device.synchronize()
        taken.append((time.perf_counter() - start) * 1000)
    return statistics.median(taken)


def entries(expected: NDArray[Any], actual: NDArray[Any]) -> int:
    """How many entries are not equal bit by bit; all, if the shapes differ."""
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        return int(expected.size)
    return int(np.count_nonzero(expected.view(np.uint32) != actual.view(np.uint32)))


def detections_that_differ(expected: Decoded, actual: Decoded) -> int:
    """How many images have other detections, anchors or counts."""
    same = [
        all(np.array_equal(getattr(first, name), getattr(second, name)) for name in Found._fields)
        for first, second in zip(expected.found, actual.found, strict=True)
    ]
    rest = np.array_equal(expected.anchors, actual.anchors)
    return same.count(False) + (not rest) + (not np.array_equal(expected.anchor_count, actual.anchor_count))


def compare_batches(bundle: Bundle, backend: str, image: Any, size: NDArray[np.int64]) -> dict[str, Any]:
    """The gate's checks on batches, of every stage at the inputs of one image.

    image: a normalised picture (1, 3, H, W) and its size (1, 2).  Raises ParityError if one does not hold.
    """
    from asag_export.gate import tolerance
    from asag_export.gate_checks import IMAGES, batch_checks

    network = open_network(backend, bundle)
    recorder = Recorder(network)
    detect(recorder, bundle.manifest.probing, StopRule(), network.upload(image), size)
    samples: dict[str, Mapping[str, NDArray[Any]]] = {
        name: {key: network.download(array) for key, array in inputs.items() if key in declared(bundle, name)}
        for name, inputs in recorder.calls
    }

    def allowed(output: str, value: NDArray[Any]) -> float:
        return tolerance(output, value, bundle.manifest.precision)

    checks = batch_checks(network, samples, allowed, IMAGES)
    wrong = [(check.name, row) for check in checks for row in check.rows if not row.passed]
    if wrong:
        name, row = wrong[0]
        raise ParityError(
            f"{name}: '{row.output}' of '{row.stage}' differs by {row.difference:.3g} where "
            f"{row.tolerance:.3g} is allowed; look at the layers of that engine"
        )
    rows = {check.name: {row.stage: row.difference for row in check.rows} for check in checks}
    return {"detail": f"{len(samples)} stages, {IMAGES} images", "differences": rows}


def declared(bundle: Bundle, stage: str) -> set[str]:
    """The inputs that a stage's graph has."""
    return {spec.name for spec in bundle.manifest.graph(stage).inputs}
