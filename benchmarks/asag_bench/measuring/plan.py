"""What a run is asked to measure, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asag_deploy.backends import BACKENDS
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.bundle.manifest import Mode, Preprocessing
from asag_deploy.errors import ConfigError
from asag_deploy.processing.preprocess import resized_shape

BFLOAT16 = "bf16"
BFLOAT16_BACKEND = "openvino-bf16"
"""The backend that computes any bundle in bfloat16."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to measure.  Raises ConfigError where it makes no sense."""

    command: str
    bundles: tuple[Path, ...]
    images: Path | None = None
    data: Path | None = None
    limit: int | None = None
    shape: tuple[int, int] | None = None
    """Height and width of the pictures as the network sees them; None for what they have."""
    backends: tuple[str, ...]
    precisions: tuple[str, ...] = ()
    """Empty for all that bundles and backends give."""
    batches: tuple[int, ...] = (1,)
    peers: tuple[str, ...] = ()
    reference: str | None = None
    checkpoint: Path | None = None
    mode: Mode | None = None
    threads: int | None = None
    duration: float = 60.0
    warmup: int = 3
    percentiles: tuple[float, ...] = (50, 90, 95, 99)
    quiet: bool = False

    def __post_init__(self) -> None:
        for option, value in (("--limit", self.limit), ("--threads", self.threads)):
            if value is not None and value < 1:
                raise ConfigError(f"{option} is {value}; it must be at least 1")
        if min(self.batches) < 1:
            raise ConfigError(f"--batch is {min(self.batches)}; it must be at least 1")
        if self.warmup < 0:
            raise ConfigError(f"--warmup is {self.warmup}; it must be at least 0")
        if not 0 < self.duration < float("inf"):
            raise ConfigError(f"--duration is {self.duration:g} seconds; it must be more than 0")
        for backend in self.backends:
            if backend not in BACKENDS:
                raise ConfigError(f"unknown backend '{backend}'; the backends are {', '.join(BACKENDS)}")

    def options(self) -> dict[str, Any]:
        """What of it bears on the figures, as plain JSON values."""
        return {
            "backends": list(self.backends),
            "precisions": list(self.precisions),
            "batches": list(self.batches),
            "peers": list(self.peers),
            "mode": self.mode,
            "threads": self.threads,
            "shape": None if self.shape is None else list(self.shape),
            "duration_s": self.duration,
            "warmup": self.warmup,
            "percentile": list(self.percentiles),
        }


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A bundle and the backend that is to run it."""

    name: str
    bundle: Bundle
    backend: str
    precision: str


def candidates(plan: Plan, bundles: Sequence[Bundle]) -> list[Candidate]:
    """Every bundle on every backend, in the precisions that were asked for.

    They are called by their backend, and where there are several bundles by the bundle's precision, or folder
    where that does not tell them apart.  Raises ConfigError for bundles that cannot be compared, or a
    precision that none has.
    """
    _check_comparable(bundles)
    backends = list(plan.backends)
    if BFLOAT16 in plan.precisions and BFLOAT16_BACKEND not in backends:
        backends.append(BFLOAT16_BACKEND)
    labels = _labels(bundles)
    found = [
        Candidate(
            name=" ".join(filter(None, (backend, label))),
            bundle=bundle,
            backend=backend,
            precision=_precision(bundle, backend),
        )
        for bundle, label in zip(bundles, labels, strict=True)
        for backend in backends
    ]
    present = list(dict.fromkeys(candidate.precision for candidate in found))
    for wanted in plan.precisions:
        if wanted not in present:
            raise ConfigError(
                f"--precision is '{wanted}', but what was given computes in {', '.join(present)}; "
                "name a bundle of that precision as well"
            )
    return [candidate for candidate in found if candidate.precision in (plan.precisions or present)]


def check_shape(shape: tuple[int, int] | None, spec: Preprocessing) -> None:
    """Raise ConfigError unless pictures of this height and width reach the network as they are."""
    if shape is None:
        return
    seen = resized_shape(*shape, spec)
    if seen != shape:
        raise ConfigError(
            f"pictures of --shape {shape[0]}x{shape[1]} would be resized to {seen[0]}x{seen[1]}, for the "
            f"bundle takes a shorter side of {spec.shorter_side} and a longer of at most {spec.longer_side}; "
            "choose a shape that is like this"
        )


def _precision(bundle: Bundle, backend: str) -> str:
    """What most of a bundle is computed in."""
    full = bundle.manifest.precision == "fp32"
    return BFLOAT16 if full and backend == BFLOAT16_BACKEND else bundle.manifest.precision


def _labels(bundles: Sequence[Bundle]) -> list[str]:
    if len(bundles) == 1:
        return [""]
    by_precision: list[str] = [bundle.manifest.precision for bundle in bundles]
    if len(set(by_precision)) == len(bundles):
        return by_precision
    by_folder = [bundle.path.resolve().name for bundle in bundles]
    if len(set(by_folder)) == len(bundles):
        return by_folder
    return [str(bundle.path) for bundle in bundles]


def _check_comparable(bundles: Sequence[Bundle]) -> None:
    first = bundles[0].manifest
    for bundle in bundles[1:]:
        other = bundle.manifest
        for what, one, two in (
            ("networks", f"{first.variant}, head {first.head}", f"{other.variant}, head {other.head}"),
            ("classes", first.categories, other.categories),
            ("pre-processing", first.preprocessing, other.preprocessing),
            ("levels to probe", first.probing.levels, other.probing.levels),
        ):
            if one != two:
                said = f" ({one} and {two})" if isinstance(one, str) else ""
                raise ConfigError(
                    f"'{bundles[0].path}' and '{bundle.path}' differ in their {what}{said}; "
                    "compare bundles of one network in one run"
                )
