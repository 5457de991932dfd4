"""What a quantised bundle computes beside the bundle it was made from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asag_deploy.backends import open_network
from asag_deploy.backends.hooked_network import HookedNetwork
from asag_deploy.backends.network import Network
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.detector import Detector
from asag_deploy.errors import BackendError, DataError
from asag_deploy.images.reading import RgbImage
from asag_deploy.loop.stages import Array
from asag_deploy.loop.stopping import stop_rule
from asag_evaluation.data.coco import CocoDataset
from asag_export.quantize.placement import FEATURES
from asag_export.quantize.report import AccuracyPair

RESULTS = {"backbone": FEATURES, "decoder": ("logits", "boxes")}
"""What is compared of each quantised stage."""


def stage_inputs(
    bundle: Bundle, stage: str, pictures: Sequence[RgbImage]
) -> Iterator[dict[str, NDArray[Any]]]:
    """What a stage that is quantised gets of each picture, as far as its graph takes it."""
    given = _backbone_inputs(bundle, pictures) if stage == "backbone" else _decoder_inputs(bundle, pictures)
    taken = {spec.name for spec in bundle.manifest.graph(stage).inputs}
    return ({name: array for name, array in inputs.items() if name in taken} for inputs in given)


def _backbone_inputs(bundle: Bundle, pictures: Sequence[RgbImage]) -> Iterator[dict[str, NDArray[Any]]]:
    """Made by the bundle's own pre-processing, without running the rest."""
    network = open_network(None, bundle)
    processing = network.processing(bundle.manifest)
    for picture in pictures:
        prepared = processing.prepare([picture], "rgb")
        yield {"image": network.download(prepared.image), "image_size": prepared.sizes}


def _decoder_inputs(bundle: Bundle, pictures: Sequence[RgbImage]) -> Iterator[dict[str, NDArray[Any]]]:
    """Once probing has stopped."""
    network = open_network(None, bundle)
    given: dict[str, NDArray[Any]] = {}

    def note(stage: str, inputs: Mapping[str, Array]) -> None:
        if stage == "decoder":
            given.update((name, network.download(array)) for name, array in inputs.items())

    watched = HookedNetwork(network, before=note)
    with Detector(bundle.manifest, watched, stop_rule(bundle.manifest, None, None)) as detector:
        for picture in pictures:
            given.clear()
            detector(picture, channel_order="rgb")
            yield dict(given)


def signal_to_noise(
    bundle: Bundle, quantized: Bundle, stage: str, inputs: Iterable[Mapping[str, NDArray[Any]]]
) -> dict[str, float]:
    """Of a stage's results, the power in `bundle` over that of the difference over all inputs, in decibels.

    The results are those of `RESULTS`; both stages are given the same.
    """
    names = RESULTS[stage]
    before, after = open_network(None, bundle), open_network(None, quantized)
    signal, noise = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for given in inputs:
        expected, actual = (_results(network, stage, given) for network in (before, after))
        for name in names:
            signal[name] += float(np.square(expected[name], dtype=np.float64).sum())
            noise[name] += float(np.square(expected[name] - actual[name], dtype=np.float64).sum())
    return {name: _decibels(signal[name], noise[name]) for name in names}


def compare_accuracy(
    bundle: Bundle,
    quantized: Bundle,
    data: CocoDataset,
    backends: Sequence[str],
    on_image: Callable[[], object] = lambda: None,
) -> tuple[AccuracyPair, ...]:
    """COCO AP of both bundles with each backend on all images of a data set.

    Raises BackendError if a backend or pycocotools is missing, DataError if there is nothing to measure.
    """
    return tuple(
        AccuracyPair(
            backend=backend,
            images=len(data),
            float32=_average_precision(bundle, backend, data, on_image),
            int8=_average_precision(quantized, backend, data, on_image),
        )
        for backend in backends
    )


def open_data(folder: Path, split: str, bundle: Bundle, limit: int | None) -> CocoDataset:
    """A split of a data set with the bundle's classes, or its first `limit` images; raises DataError."""
    data = CocoDataset.open(folder, split, categories=bundle.manifest.categories)
    return data if limit is None else data.subset(range(min(limit, len(data))))


def _average_precision(
    bundle: Bundle, backend: str, data: CocoDataset, on_image: Callable[[], object]
) -> float:
    try:
        from asag_evaluation.evaluate import evaluate
    except ImportError as error:
        raise BackendError(
            f"measuring AP needs {error.name}, which `pip install 'asag-deploy[evaluate]'` installs"
        ) from None
    with Detector.load(bundle, backend=backend) as detector:
        found = evaluate(detector, data, on_image=lambda sample, detections: on_image()).coco.ap
    if found is None:
        raise DataError(f"there are no objects in the {len(data)} images, so AP cannot be measured")
    return found


def _results(network: Network, stage: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    outputs = network.stage(stage)({name: network.upload(array) for name, array in inputs.items()})
    return {name: network.download(outputs[name]) for name in RESULTS[stage]}


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return float("inf")
    return 10 * float(np.log10(signal / noise)) if signal > 0 else float("-inf")
