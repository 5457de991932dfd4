"""What a run is to measure, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from asag_bench.measuring.machine import WARM
from asag_bench.result import Options
from asag_deploy.atomic import real_path
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.bundle.manifest import Preprocessing
from asag_deploy.detector_options import DetectorOptions
from asag_deploy.errors import ConfigError
from asag_deploy.processing.preprocess import resized_shape
from asag_evaluation.data.orientation import OrientationRule
from asag_training.settings import WeightsChoice

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
    orientation: OrientationRule = "auto"
    """How images of `data` are read that say how they are to be turned."""
    limit: int | None = None
    baseline: str | None = None
    checkpoint: Path | None = None
    weights: WeightsChoice = "model"
    """Which of those in the checkpoint."""
    options: Options = field(default_factory=Options)
    quiet: bool = False

    def __post_init__(self) -> None:
        options = self.options
        options.detector()
        places = [real_path(bundle) for bundle in self.bundles]
        for bundle, place in zip(self.bundles, places, strict=True):
            if places.count(place) > 1:
                raise ConfigError(f"the bundle '{bundle}' is given twice: name each once")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"--limit is {self.limit}; it must be at least 1")
        if min(options.batches) < 1:
            raise ConfigError(f"--batch is {min(options.batches)}; it must be at least 1")
        if options.warmup < 0:
            raise ConfigError(f"--warmup is {options.warmup}; it must be at least 0")
        if not 0 < options.duration_s < float("inf"):
            raise ConfigError(f"--duration is {options.duration_s:g} seconds; it must be more than 0")
        if options.memory_images and options.memory_images <= WARM:
            raise ConfigError(
                f"--memory-images is {options.memory_images}; give more than the first {WARM}, "
                "which do not count"
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
    options = plan.options
    backends = list(options.backends)
    if BFLOAT16 in options.precisions and BFLOAT16_BACKEND not in backends:
        backends.append(BFLOAT16_BACKEND)
    found = [
        BundleOnBackend(
            name=" ".join(filter(None, (backend, label))),
            bundle=bundle,
            precision=_precision(bundle, backend),
            options=options.detector(backend),
        )
        for bundle, label in zip(bundles, _labels(bundles), strict=True)
        for backend in backends
    ]
    present = list(dict.fromkeys(each.precision for each in found))
    for wanted in options.precisions:
        if wanted not in present:
            raise ConfigError(
                f"--precision is '{wanted}', but what was given computes in {', '.join(present)}; "
                "name a bundle of that precision as well"
            )
    return [each for each in found if each.precision in (options.precisions or present)]


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
    by_folder = [real_path(bundle.path).name for bundle in bundles]
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
                    f"'{bundles[0].shown}' and '{bundle.shown}' differ in their {what}{said}; "
                    "compare bundles of one network in one run"
                )
