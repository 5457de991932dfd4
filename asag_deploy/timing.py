"""Wall times in milliseconds."""

from __future__ import annotations

import time


def since(start: float) -> float:
    """Return the milliseconds since a `time.perf_counter()` value."""
    return (time.perf_counter() - start) * 1000


class Stopwatch:
    """Milliseconds between laps, summed by name."""

    def __init__(self) -> None:
        self.times_ms: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Add what has passed since the last lap, or the beginning, to the time of `name`."""
        now = time.perf_counter()
        self.times_ms[name] = self.times_ms.get(name, 0.0) + (now - self._last) * 1000
        self._last = now
