"""What quantisation cost, as data for the manifest and as a few lines for people."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from asag_export.quantize.graph import Activations


@dataclass(frozen=True, kw_only=True)
class AccuracyPair:
    """Average precision before and after on the same images with the same backend, each from 0 to 1."""

    backend: str
    images: int
    float32: float
    int8: float

    @property
    def loss(self) -> float:
        """How much lower it is after; below 0 where it rose."""
        return self.float32 - self.int8

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {**vars(self), "loss": self.loss}


@dataclass(frozen=True, kw_only=True)
class QuantizationReport:
    """Of one quantisation."""

    activations: Activations
    pictures: int
    """Calibrated on."""
    convolutions: int
    """Of the backbone graph that are quantised."""
    products: int
    """Of the decoder, likewise."""
    signal_to_noise: dict[str, float]
    """Of each feature map, and of what the decoder makes of the same input, in decibels: the result in
    float32 over what quantisation changes in it."""
    least_signal_to_noise: float
    accuracy: tuple[AccuracyPair, ...] = field(default=())
    """Empty where it was not measured."""
    most_loss: float

    def failures(self) -> list[str]:
        """What is worse than it may be, each as half a sentence."""
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
        """As plain JSON values."""
        return {**vars(self), "accuracy": [pair.to_dict() for pair in self.accuracy]}


def format_quantization(report: QuantizationReport) -> str:
    """A few lines of plain text."""
    ratios = ", ".join(f"{name} {value:.1f}" for name, value in report.signal_to_noise.items())
    calibrated = f"calibrated on {report.pictures} pictures, activations {report.activations}"
    lines = [
        f"{report.convolutions} convolutions and {report.products} matrix products in int8, {calibrated}",
        f"  signal to noise in dB (at least {report.least_signal_to_noise:g}): {ratios}",
    ]
    if not report.accuracy:
        lines.append("  accuracy was not measured: give --data DIR, a data set in COCO layout")
    lines += [
        f"  AP on {pair.images} images, {pair.backend}: float32 {pair.float32:.4f}, "
        f"int8 {pair.int8:.4f}, loss {pair.loss:+.4f} (at most {report.most_loss:g})"
        for pair in report.accuracy
    ]
    return "\n".join(lines + [f"  FAILED: {failure}" for failure in report.failures()])
