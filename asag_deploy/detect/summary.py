"""The summary of a run of `asag-detect`: counts and times over many images."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import mean, median

from asag_deploy.detections import Detections
from asag_deploy.errors import plural

_TIMES_KEPT = 10_000
"""Times a phase that the summary is made of, the latest ones: a camera may run for days."""


@dataclass(kw_only=True)
class Summary:
    """Counts and times over many images."""

    images: int = 0
    seconds: float = 0.0
    """From the first image read to the last one written."""
    classes: Counter[str] = field(default_factory=Counter)
    exits: Counter[str] = field(default_factory=Counter)
    times_ms: dict[str, deque[float]] = field(default_factory=dict)
    """Per phase, one time for each image that went through it."""

    def add(self, detections: Detections) -> None:
        """Count one image."""
        self.images += 1
        self.classes.update(detections.names)
        self.exits[detections.trace.exit_level] += 1
        if not detections.times_ms.keys() <= self.times_ms.keys():
            self._make_room(list(detections.times_ms))
        for phase, taken in detections.times_ms.items():
            self.times_ms[phase].append(taken)

    def text(self, *, threshold: float, batch: int) -> str:
        """Write the summary in a few lines, with mean and median times.

        threshold: the least confidence of what was counted; batch: images a batch, which the times are of.
        """
        found = f": {counted(self.classes)}" if self.classes else ""
        count = f"{plural(self.images, 'image')}, {plural(self.classes.total(), 'detection')}"
        lines = [
            f"{count} of confidence {threshold:g} or more{found}",
            f"exit levels: {', '.join(f'{level} {self.exits[level]}' for level in ('P5', 'P4', 'P3'))}",
        ]
        if self.seconds > 0:
            rate = f"{self.images / self.seconds:.3g} images/s"
            lines.append(f"{rate}, from reading to writing, in {self.seconds:.1f} s")
        if self.times_ms:
            width = max(len(phase) for phase in (*self.times_ms, "ms a batch"))
            unit = "ms" if batch == 1 else "ms a batch"
            lines.append(f"{unit:<{width}}  {'mean':>9}  {'p50':>9}  images")
            lines += [
                f"{phase:<{width}}  {mean(times):9.1f}  {median(times):9.1f}  {len(times):6}"
                for phase, times in self.times_ms.items()
            ]
        return "\n".join(lines)

    def _make_room(self, phases: Sequence[str]) -> None:
        """Give a phase that is new its place behind the one before it: not every image sees every level."""
        order = list(self.times_ms)
        for number, phase in enumerate(phases):
            if phase not in order:
                order.insert(order.index(phases[number - 1]) + 1 if number else 0, phase)
        self.times_ms = {phase: self.times_ms.get(phase, deque(maxlen=_TIMES_KEPT)) for phase in order}


def counted(counts: Counter[str]) -> str:
    """Write counts of names, the most common first: '3 cow, 1 car'."""
    return ", ".join(f"{count} {name}" for name, count in counts.most_common())
