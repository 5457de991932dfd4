"""What a quantised bundle computes beside the bundle it was made from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asag_deploy.backends import open_network
from asag_deploy.bundle import Bundle
from asag_deploy.detector import Detector
from asag_deploy.errors import BackendError, DataError
from asag_deploy.images import RgbImage
from asag_deploy.manifest import Preprocessing
from asag_deploy.preprocess import make_batch
from asag_deploy.stages import Network
from asag_export.quantize.placement import FEATURES
from asag_export.quantize.report import AccuracyPair
from asag_training.data.coco import CocoDataset


def network_inputs(
    network: Network, preprocessing: Preprocessing, pictures: Sequence[RgbImage]
) -> Iterator[dict[str, NDArray[Any]]]:
    """What the graph `backbone` gets of each picture, made by the bundle's own pre-processing."""
    for picture in pictures:
        pixels, sizes = make_batch([picture], preprocessing)
        given = {"pixels": network.upload(pixels), "image_size": network.upload(sizes)}
        image = network.stage("normalize")(given)["image"]
        yield {"image": network.download(image), "image_size": sizes}


def signal_to_noise(
    bundle: Bundle, quantized: Bundle, inputs: Sequence[Mapping[str, NDArray[Any]]]
) -> dict[str, float]:
    """Per feature map, the power of the original over that of the difference over all inputs, in decibels."""
    before, after = open_network(None, bundle), open_network(None, quantized)
    signal = dict.fromkeys(FEATURES, 0.0)
    noise = dict.fromkeys(FEATURES, 0.0)
    for given in inputs:
        expected, actual = (_features(network, given) for network in (before, after))
        for name in FEATURES:
            signal[name] += float(np.square(expected[name], dtype=np.float64).sum())
            noise[name] += float(np.square(expected[name] - actual[name], dtype=np.float64).sum())
    return {name: _decibels(signal[name], noise[name]) for name in FEATURES}


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
        from asag_training.evaluation.evaluate import evaluate
    except ImportError as error:
        raise BackendError(
            f"measuring AP needs {error.name}, which `pip install 'asag-deploy[export]'` installs"
        ) from None
    with Detector.load(bundle, backend=backend) as detector:
        found = evaluate(detector, data, on_image=lambda sample, detections: on_image()).coco.ap
    if found is None:
        raise DataError(f"there are no objects in the {len(data)} images, so AP cannot be measured")
    return found


def _features(network: Network, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    outputs = network.stage("backbone")({name: network.upload(array) for name, array in inputs.items()})
    return {name: network.download(outputs[name]) for name in FEATURES}


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return float("inf")
    return 10 * float(np.log10(signal / noise)) if signal > 0 else float("-inf")
