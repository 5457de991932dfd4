"""How the learning rate changes over a run: a linear warm-up, then drops between epochs.

Both are factors of the base rate and functions of where the run is, so that a resumed run needs no state.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from asag_deploy.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A run's length and its learning rate.

    Raises ConfigError when a value makes no sense.
    """

    epochs: int
    drops: tuple[int, ...] = ()
    """Epochs, counted from 0, from whose beginning on the rate is `drop_factor` of what it was."""
    drop_factor: float = 0.1
    warmup_steps: int = 500
    """Optimiser steps until the full rate is reached; 0 for no warm-up."""
    warmup_start: float = 1 / 3
    """Share of the rate that the warm-up begins with."""

    def __post_init__(self) -> None:
        self._require(self.epochs >= 1, "epochs", "at least 1")
        rising = all(a < b for a, b in itertools.pairwise(self.drops))
        inside = all(0 < drop < self.epochs for drop in self.drops)
        self._require(rising and inside, "drops", f"rising epochs between 0 and {self.epochs}")
        self._require(0 < self.drop_factor <= 1, "drop_factor", "above 0 and at most 1")
        self._require(self.warmup_steps >= 0, "warmup_steps", "0 or more")
        self._require(0 < self.warmup_start <= 1, "warmup_start", "above 0 and at most 1")

    def _require(self, condition: bool, name: str, expected: str) -> None:
        if not condition:
            value = getattr(self, name)
            raise ConfigError(f"schedule setting {name} {value} is not possible: expected {expected}")

    def factor(self, epoch: int, step: int) -> float:
        """Share of the base rate for step `step` of the whole run, which is in `epoch`; both count from 0."""
        warmup = warmup_factor(step, self.warmup_steps, self.warmup_start)
        return warmup * drop_factor(epoch, self.drops, self.drop_factor)


SCHEDULES: dict[str, Schedule] = {
    "1x": Schedule(epochs=12, drops=(8, 11)),
    "3x": Schedule(epochs=36, drops=(24, 33)),
    "crowdhuman": Schedule(epochs=50, drops=(40, 46)),
}
"""The published recipes by name."""


def warmup_factor(step: int, steps: int, start: float) -> float:
    """From `start` at step 0, in a straight line to 1 at step `steps` and after."""
    if step >= steps:
        return 1.0
    return start + (1 - start) * step / steps


def drop_factor(epoch: int, drops: tuple[int, ...], factor: float) -> float:
    """`factor` for each of `drops` that `epoch` has reached."""
    return float(factor ** sum(epoch >= drop for drop in drops))
