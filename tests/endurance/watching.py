"""Watch what a process holds while it works: memory, descriptors, threads; and whether it stays flat."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np

_PAGE_KIB = 4
_WARM_UP = 1 / 3
"""The part of a run in which caches and arenas may still grow."""
_MAY_GROW_KIB = 4096
"""Growth from the middle to the last third that is taken for noise of the allocator."""

_MAY_GROW = 2


class Sample(NamedTuple):
    """What a process held at one moment."""

    done: int
    """Pictures or requests until then."""
    resident_kib: int
    descriptors: int
    threads: int


@dataclass(frozen=True, kw_only=True)
class Watched:
    """What came of watching."""

    samples: int
    after_warm_up_kib: float
    """Resident memory in the middle third, the median."""
    at_the_end_kib: float
    """Resident memory in the last third, the median."""
    slope_kib_per_1000: float
    """Growth of memory after the warm-up, in KiB for every 1000 done."""
    most_kib: int
    descriptors: tuple[int, int]
    """Fewest and most after the warm-up."""
    threads: tuple[int, int]
    """Fewest and most after the warm-up."""
    descriptors_grown: float
    threads_grown: float
    """How many more in the last third than in the middle one, the medians."""

    @property
    def flat(self) -> bool:
        """Whether memory, descriptors and threads have stopped growing.

        How many there are changes from moment to moment, with the files that are being read and written.
        """
        memory = self.at_the_end_kib - self.after_warm_up_kib
        return memory < _MAY_GROW_KIB and max(self.descriptors_grown, self.threads_grown) <= _MAY_GROW

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {**asdict(self), "flat": self.flat}


class Watch:
    """Takes samples of a process in a thread, until the block ends."""

    def __init__(self, process: int, done: Callable[[], int], *, seconds: float = 0.1) -> None:
        self._process, self._done, self._seconds = process, done, seconds
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.samples: list[Sample] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(self._seconds):
            try:
                self.samples.append(sample(self._process, self._done()))
            except (OSError, ValueError):  # it has ended
                return

    def result(self) -> Watched:
        """Sum up what was seen."""
        return sum_up(self.samples)


def sample(process: int, done: int = 0) -> Sample:
    """Look at a process once.  Raises OSError if it has ended."""
    folder = Path("/proc") / str(process)
    resident = int((folder / "statm").read_text().split()[1]) * _PAGE_KIB
    if not resident:
        raise ProcessLookupError(process)
    descriptors = sum(1 for _ in (folder / "fd").iterdir())
    return Sample(done, resident, descriptors, sum(1 for _ in (folder / "task").iterdir()))


def sum_up(samples: Sequence[Sample]) -> Watched:
    """Sum up samples in the order they were taken."""
    assert len(samples) >= 6, f"only {len(samples)} samples: there was too little to do"
    total = samples[-1].done
    warm = [s for s in samples if s.done >= total * _WARM_UP]
    middle = [s for s in warm if s.done < total * 2 * _WARM_UP] or warm
    last = [s for s in warm if s.done >= total * 2 * _WARM_UP]
    done, memory = ([float(s[i]) for s in warm] for i in (0, 1))
    slope = float(np.polyfit(done, memory, 1)[0]) * 1000 if max(done) > min(done) else 0.0
    return Watched(
        samples=len(samples),
        after_warm_up_kib=statistics.median(s.resident_kib for s in middle),
        at_the_end_kib=statistics.median(s.resident_kib for s in last),
        slope_kib_per_1000=round(slope, 1),
        most_kib=max(s.resident_kib for s in samples),
        descriptors=_range([s.descriptors for s in warm]),
        threads=_range([s.threads for s in warm]),
        descriptors_grown=_grown([s.descriptors for s in middle], [s.descriptors for s in last]),
        threads_grown=_grown([s.threads for s in middle], [s.threads for s in last]),
    )


def until(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait for a condition; return whether it came true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def _grown(middle: Sequence[int], last: Sequence[int]) -> float:
    return statistics.median(last) - statistics.median(middle)


def _range(values: Sequence[int]) -> tuple[int, int]:
    return min(values), max(values)
