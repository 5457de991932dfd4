"""What quantisation costs: what is measured of it, as data for the manifest and as a few lines for people."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from asag_deploy.backends import open_network
from asag_deploy.backends.network import Network
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.detector import Detector
from asag_deploy.errors import BackendError, DataError, plural
from asag_deploy.extras import missing
from asag_deploy.loop.stages import FEATURES
from asag_evaluation.data.coco import CocoDataset

Activations = Literal["int8", "uint8"]
"""int8: symmetric, with zero point 0, the only kind that TensorRT takes.  uint8: with a zero point, which
uses all 256 values after a ReLU, and which ONNX Runtime's fast kernels for x86 want; for the CPU alone."""

ACTIVATIONS: tuple[Activations, ...] = ("int8", "uint8")

DEFAULT_MOST_LOSS = 0.005
"""How much AP, from 0 to 1, may fall."""
LEAST_SIGNAL_TO_NOISE = 10.0
"""Decibels below which a result is noise rather than rounded: a tensor's range was wrong."""

RESULTS: dict[str, tuple[str, ...]] = {"backbone": FEATURES, "decoder": ("logits", "boxes")}
"""What is compared of each quantised stage, where it puts it out."""


@dataclass(frozen=True, kw_only=True)
class AccuracyPair:
    """Average precision before and after on the same images with the same backend, each from 0 to 1."""

    backend: str
    images: int
    float32: float
    int8: float

    @property
    def loss(self) -> float:
        """The fall of AP; below 0 if it rose."""
        return self.float32 - self.int8

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**vars(self), "loss": self.loss}


@dataclass(frozen=True, kw_only=True)
class QuantizationReport:
    """Cost of one quantisation."""

    activations: Activations
    pictures: int
    """Number of pictures calibrated on."""
    convolutions: int
    """Number of convolutions of the backbone graph that are quantised."""
    products: int
    """Number of matrix products of the decoder that are quantised."""
    signal_to_noise: dict[str, float]
    """Decibels of each feature map, and of the decoder's results for the same input: the power of the result
    in float32 over the power of what quantisation changes in it."""
    least_signal_to_noise: float
    accuracy: tuple[AccuracyPair, ...] = field(default=())
    """Empty where it was not measured."""
    most_loss: float

    def failures(self) -> list[str]:
        """List what is worse than it may be, each as half a sentence."""
        failed = [
            f"'{name}' has a signal-to-noise ratio of {value:.1f} dB, where "
            f"{self.least_signal_to_noise:g} is the least"
            for name, value in self.signal_to_noise.items()
            if not value >= self.least_signal_to_noise
        ]
        failed += [
            f"AP falls from {pair.float32:.4f} to {pair.int8:.4f} with {pair.backend}, by more than "
            f"{self.most_loss:g}"
            for pair in self.accuracy
            if not pair.loss <= self.most_loss
        ]
        return failed

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**vars(self), "accuracy": [pair.to_dict() for pair in self.accuracy]}


def format_quantization(report: QuantizationReport) -> str:
    """Write the report as a few lines of plain text."""
    ratios = ", ".join(f"{name} {value:.1f}" for name, value in report.signal_to_noise.items())
    calibrated = f"calibrated on {plural(report.pictures, 'picture')}, activations {report.activations}"
    lines = [
        f"{report.convolutions} convolutions and {report.products} matrix products in int8, {calibrated}",
        f"  signal to noise in dB (at least {report.least_signal_to_noise:g}): {ratios}",
    ]
    if not report.accuracy:
        lines.append("  accuracy was not measured: give --data DIR, a data set in COCO layout")
    lines += [
        f"  AP on {plural(pair.images, 'image')}, {pair.backend}: before {pair.float32:.4f}, "
        f"int8 {pair.int8:.4f}, loss {pair.loss:+.4f} (at most {report.most_loss:g})"
        for pair in report.accuracy
    ]
    return "\n".join(lines + [f"  FAILED: {failure}" for failure in report.failures()])


def signal_to_noise(
    bundle: Bundle, quantized: Bundle, stage: str, inputs: Iterable[Mapping[str, NDArray[Any]]]
) -> dict[str, float]:
    """Measure the signal-to-noise ratio of a stage's results over all inputs, in decibels.

    It is the power of a result in `bundle` over the power of the difference.  The results are those of
    `RESULTS`; both stages are given the same inputs.
    """
    outputs = {tensor.name for tensor in bundle.manifest.graph(stage).outputs}
    names = tuple(name for name in RESULTS[stage] if name in outputs)
    before, after = open_network(None, bundle), open_network(None, quantized)
    signal, noise = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for given in inputs:
        expected, actual = (_results(network, stage, given, names) for network in (before, after))
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
    """Measure COCO AP of both bundles with each backend on all images of a data set.

    Raises BackendError if a backend or faster-coco-eval is missing, DataError if there is nothing to measure.
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


def check_measurable() -> None:
    """Raise BackendError if AP cannot be measured here for want of a package."""
    try:
        import asag_evaluation.evaluate  # noqa: F401
    except ImportError as error:
        raise BackendError(missing(error, "asag-quantize", purpose="measuring AP")) from None


def _average_precision(
    bundle: Bundle, backend: str, data: CocoDataset, on_image: Callable[[], object]
) -> float:
    check_measurable()
    from asag_evaluation.evaluate import evaluate

    with Detector.load(bundle, backend=backend) as detector:
        found = evaluate(detector, data, on_image=lambda sample, detections: on_image()).coco.ap
    if found is None:
        raise DataError(f"there are no objects in {plural(len(data), 'image')}, so AP cannot be measured")
    return found


def _results(
    network: Network, stage: str, inputs: Mapping[str, NDArray[Any]], names: Sequence[str]
) -> dict[str, NDArray[Any]]:
    outputs = network.stage(stage)({name: network.upload(array) for name, array in inputs.items()})
    return {name: network.download(outputs[name]) for name in names}


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return float("inf")
    return 10 * float(np.log10(signal / noise)) if signal > 0 else float("-inf")
