"""What a run is to measure, checked before anything is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from asag_bench.measuring.machine import WARM
from asag_bench.result import Options
from asag_deploy.backends import DEFAULT_BACKEND
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.bundle.manifest import Preprocessing
from asag_deploy.detector_options import DetectorOptions
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
    backends: tuple[str, ...] = (DEFAULT_BACKEND,)
    detector: DetectorOptions = field(default_factory=DetectorOptions)
    """How to load each of them; its backend is none of its own."""
    precisions: tuple[str, ...] = ()
    """Empty for all that bundles and backends give."""
    batches: tuple[int, ...] = (1,)
    references: tuple[str, ...] = ()
    baseline: str | None = None
    checkpoint: Path | None = None
    duration: float = 60.0
    warmup: int = 3
    percentiles: tuple[float, ...] = (50, 90, 95, 99)
    memory_images: int = 0
    """Pictures of many sizes that show whether memory stays flat; 0 for none."""
    quiet: bool = False

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"--limit is {self.limit}; it must be at least 1")
        if min(self.batches) < 1:
            raise ConfigError(f"--batch is {min(self.batches)}; it must be at least 1")
        if self.warmup < 0:
            raise ConfigError(f"--warmup is {self.warmup}; it must be at least 0")
        if not 0 < self.duration < float("inf"):
            raise ConfigError(f"--duration is {self.duration:g} seconds; it must be more than 0")
        if self.memory_images and self.memory_images <= WARM:
            raise ConfigError(
                f"--memory-images is {self.memory_images}; give more than the first {WARM}, "
                "which do not count"
            )

    def options(self) -> Options:
        """Return what of the plan bears on the figures."""
        return Options(
            backends=self.backends,
            precisions=self.precisions,
            batches=self.batches,
            references=self.references,
            mode=self.detector.mode,
            threads=self.detector.threads,
            shape=self.shape,
            duration_s=self.duration,
            warmup=self.warmup,
            percentile=self.percentiles,
            max_level=self.detector.max_level,
            deadline_ms=self.detector.deadline_ms,
            loop=self.detector.loop,
            requests=self.detector.requests,
            memory_images=self.memory_images,
        )


@dataclass(frozen=True, kw_only=True)
class BundleOnBackend:
    """A bundle and the backend that is to run it."""

    name: str
    bundle: Bundle
    precision: str
    options: DetectorOptions
    """With the backend."""


def bundles_on_backends(plan: Plan, bundles: Sequence[Bundle]) -> list[BundleOnBackend]:
    """Return every bundle on every backend, in the precisions that were asked for.

    They are called by their backend, and where there are several bundles by the bundle's precision, or folder
    where that does not tell them apart.  Raises ConfigError for bundles that cannot be compared, or a
    precision that none has.
    """
    _check_comparable(bundles)
    backends = list(plan.backends)
    if BFLOAT16 in plan.precisions and BFLOAT16_BACKEND not in backends:
        backends.append(BFLOAT16_BACKEND)
    found = [
        BundleOnBackend(
            name=" ".join(filter(None, (backend, label))),
            bundle=bundle,
            precision=_precision(bundle, backend),
            options=dataclasses.replace(plan.detector, backend=backend),
        )
        for bundle, label in zip(bundles, _labels(bundles), strict=True)
        for backend in backends
    ]
    present = list(dict.fromkeys(each.precision for each in found))
    for wanted in plan.precisions:
        if wanted not in present:
            raise ConfigError(
                f"--precision is '{wanted}', but what was given computes in {', '.join(present)}; "
                "name a bundle of that precision as well"
            )
    return [each for each in found if each.precision in (plan.precisions or present)]


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
    """Return the precision that most of a bundle is computed in."""
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
