"""What was measured of the front: per contender its accuracy and its time on every picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median

import numpy as np

from asag_bench.result import Machine
from asag_deploy.bundle.manifest import Level

ADAPTIVE, ALWAYS = "adaptive", "always P3"
"""Probing stops by itself, or goes to the last level in every picture."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a network was trained with, as its run's log tells."""

    updates: int
    images: int
    cpu_minutes: float
    """The processor's time of all updates, data included."""
    seed: int
    unfinished: str | None = None
    """How far the run had come, such as `3 of 11 epochs`, if that was not its end."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A network on a backend, with one way to stop."""

    name: str
    network: str
    """What it is, whatever its seed."""
    weights: str
    """The name of the folder that they come from."""
    backend: str
    stop: str | None
    """Of ASAG: P5 or P4, no deeper than which is probed, adaptive, or always P3; None for peers."""
    ap: float | None
    """Average precision of 300 detections a picture, from 0 to 1."""
    ap50: float | None
    ap75: float | None
    ms: tuple[float, ...]
    """Per picture, the median of all rounds."""
    exits: tuple[Level, ...] | None
    """Per picture, the level at which probing stopped; None for peers."""
    training: Training | None

    @property
    def median_ms(self) -> float:
        """Over all pictures."""
        return median(self.ms)

    @property
    def mean_ms(self) -> float:
        """Over all pictures: what a picture costs where all of them are to be got through."""
        return fmean(self.ms)


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """The pictures that all contenders were measured on."""

    data: str
    ids: tuple[int, ...]
    objects: tuple[int, ...]
    """Per picture."""
    kinds: tuple[str | None, ...]
    """Per picture, of generated scenes."""


@dataclass(frozen=True, kw_only=True)
class Adaptivity:
    """What deciding by picture gained a network on a backend; a share of None is one of no pictures."""

    weights: str
    backend: str
    probing_costs: float | None
    """How much longer the pictures that go to P3 take than stopped at P5, as a share; the median."""
    saved: float | None
    """How much less time the pictures take that stop before P3 than going there all the same, likewise."""
    stopped: float
    """The share of pictures that stop before P3."""


@dataclass(frozen=True, kw_only=True)
class Front:
    """A whole measurement."""

    command: str
    machine: Machine
    threads: int | None
    rounds: int
    pictures: Pictures
    contenders: tuple[Contender, ...]

    def adaptivity(self) -> tuple[Adaptivity, ...]:
        """Return what deciding gained, for each ASAG network on each backend."""
        found = []
        for adaptive in self.contenders:
            if adaptive.stop == ADAPTIVE:
                same = {
                    c.stop: c
                    for c in self.contenders
                    if (c.weights, c.backend) == (adaptive.weights, adaptive.backend)
                }
                found.append(_adaptivity(adaptive, same["P5"], same[ALWAYS]))
        return tuple(found)


def _adaptivity(adaptive: Contender, at_p5: Contender, always: Contender) -> Adaptivity:
    assert adaptive.exits is not None
    deep = np.array([level == "P3" for level in adaptive.exits])
    ms, first, last = (np.array(each.ms) for each in (adaptive, at_p5, always))
    return Adaptivity(
        weights=adaptive.weights,
        backend=adaptive.backend,
        probing_costs=_median((ms / first)[deep] - 1),
        saved=_median(1 - (ms / last)[~deep]),
        stopped=float((~deep).mean()),
    )


def _median(values: Sequence[float] | np.ndarray[tuple[int], np.dtype[np.float64]]) -> float | None:
    return float(np.median(values)) if len(values) else None
