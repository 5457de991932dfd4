"""Latencies as figures, and whether they can be trusted.  No sample is ever left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

import numpy as np
from numpy.typing import NDArray

WINDOWS_TO_AGREE = 3
AGREEMENT = 0.05


@dataclass(kw_only=True)
class Latencies:
    """Milliseconds of every call of one subject on one kind of image, in windows."""

    batch: int
    windows: list[list[float]] = field(default_factory=list)
    phases: list[dict[str, float]] = field(default_factory=list)
    """Per call, milliseconds by phase; empty for what cannot be split."""

    @property
    def samples(self) -> list[float]:
        """Of all windows, in order."""
        return [sample for window in self.windows for sample in window]

    @property
    def stable(self) -> bool:
        """Whether the medians of the last windows agree; one that the time cut short has no say."""
        return agree([median(window) for window in self.windows if len(window) == len(self.windows[0])])

    def images_per_second(self) -> float:
        """Throughput of calls that follow one another."""
        return 1000 * self.batch / fmean(self.samples)

    def percentiles(self, wanted: Sequence[float]) -> dict[str, float]:
        """By name (`p50`)."""
        values = np.percentile(self.samples, list(wanted))
        return {f"p{q:g}": float(value) for q, value in zip(wanted, values, strict=True)}

    def median_phases(self) -> dict[str, float]:
        """Median milliseconds of each phase; a phase that a call did not have counts as 0."""
        names = dict.fromkeys(name for call in self.phases for name in call)
        return {name: median(call.get(name, 0.0) for call in self.phases) for name in names}

    def to_dict(self, wanted: Sequence[float]) -> dict[str, Any]:
        """The figures and every sample as plain JSON values."""
        samples = self.samples
        return {
            "calls": len(samples),
            "stable": self.stable,
            "ms": {
                **{name: round(value, 3) for name, value in self.percentiles(wanted).items()},
                "mean": round(fmean(samples), 3),
                "min": round(min(samples), 3),
                "max": round(max(samples), 3),
            },
            "images_per_second": round(self.images_per_second(), 3),
            "phases_ms": {name: round(value, 4) for name, value in self.median_phases().items()},
            "windows_ms": [[round(sample, 3) for sample in window] for window in self.windows],
        }


def agree(medians: Sequence[float]) -> bool:
    """Whether the last three of these lie within 5% of the least of them."""
    last = medians[-WINDOWS_TO_AGREE:]
    return len(last) == WINDOWS_TO_AGREE and max(last) <= (1 + AGREEMENT) * min(last)


def ratio(times: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """How many times as long as `base`, round by round: the median ratio, and the middle half of them."""
    return spread(np.array(times) / np.array(base))


def spread(values: Sequence[float] | NDArray[np.float64]) -> dict[str, float]:
    """The median, and the middle half."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return {"median": round(float(middle), 3), "p25": round(float(low), 3), "p75": round(float(high), 3)}
