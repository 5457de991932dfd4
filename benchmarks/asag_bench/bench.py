"""A whole run: load, sort the pictures, measure, and put everything that matters into one JSON value."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from asag_bench.accuracy import Accuracy, measure_accuracy, open_data, pictures_of
from asag_bench.machine import clocks_mhz, describe_machine, peak_resident_mib, resident_mib
from asag_bench.measure import StratumResult, measure
from asag_bench.peers import open_peer, rule_of
from asag_bench.samples import Samples, generated_pictures, read_pictures, sort_pictures
from asag_bench.subjects import DetectorSubject, Subject
from asag_deploy.backends import BACKENDS, open_network
from asag_deploy.bundle import Bundle
from asag_deploy.errors import BackendError, ConfigError
from asag_deploy.images import RgbImage
from asag_deploy.manifest import FIRST_LEVEL, Level, Mode
from asag_deploy.preprocess import make_batch
from asag_deploy.stages import Network

MOST_PICTURES = 100
"""Of a data set, to choose from."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to measure.  Raises ConfigError where it makes no sense."""

    command: str
    bundle: Path
    images: Path | None = None
    data: Path | None = None
    limit: int | None = None
    backends: tuple[str, ...]
    batches: tuple[int, ...] = (1,)
    peers: tuple[str, ...] = ()
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
            "batches": list(self.batches),
            "peers": list(self.peers),
            "mode": self.mode,
            "threads": self.threads,
            "duration_s": self.duration,
            "warmup": self.warmup,
            "percentile": list(self.percentiles),
        }


@dataclass(kw_only=True)
class _Loaded:
    """The subjects, and what is known about them."""

    detectors: list[DetectorSubject] = field(default_factory=list)
    peers: list[Subject] = field(default_factory=list)
    added_mib: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def run(plan: Plan) -> dict[str, Any]:
    """Measure, and return the result as plain JSON values.

    Raises BundleError, BackendError, ConfigError, SourceError, DataError or CheckpointError if something that
    was asked for cannot be measured.
    """
    bundle = Bundle.open(plan.bundle)
    clocks = clocks_mhz()
    loaded = _load_detectors(plan, bundle)
    data, why_not = open_data(plan.data, loaded.detectors[0], plan.limit) if plan.data else (None, None)
    if why_not is not None:
        loaded.notes.append(why_not)
    samples = _samples(plan, bundle, loaded.detectors[0], data)
    _load_peers(plan, bundle, loaded, samples)
    pyramid = _pyramid(plan, bundle, loaded)
    results = _measure_all(plan, bundle, loaded, samples, pyramid)
    accuracy = _accuracy(plan, loaded, data)
    clocks += clocks_mhz()
    return {
        "command": plan.command,
        "machine": {**describe_machine(), "clock_mhz": [min(clocks), max(clocks)] if clocks else None},
        "bundle": _describe(bundle, plan),
        "options": plan.options(),
        "input": {
            "origin": samples.origin,
            "pictures": sum(samples.histogram.values()),
            "exit_levels": samples.histogram,
            "skipped": list(samples.skipped),
        },
        "strata": [result.to_dict(plan.percentiles) for result in results],
        "memory": {
            "peak_mib": round(peak_resident_mib(), 1),
            "subjects": {name: {"added_mib": round(mib, 1)} for name, mib in loaded.added_mib.items()},
        },
        "accuracy": {name: found.to_dict() for name, found in accuracy.items()},
        "notes": [*loaded.notes, *_input_notes(samples)],
    }


def _load_detectors(plan: Plan, bundle: Bundle) -> _Loaded:
    loaded = _Loaded()
    for backend in plan.backends:
        before = resident_mib()
        network = open_network(backend, bundle, plan.threads)
        subject = DetectorSubject(backend, bundle, network, rule_of(bundle.manifest, plan.mode))
        loaded.detectors.append(subject)
        loaded.added_mib[subject.name] = resident_mib() - before
    return loaded


def _load_peers(plan: Plan, bundle: Bundle, loaded: _Loaded, samples: Samples) -> None:
    """Open the peers; each subject runs the worst image once, so that its memory is what it takes to work."""
    worst = samples.strata[-1].pictures[0].image
    for detector in loaded.detectors:
        before = resident_mib()
        detector([worst], None)
        loaded.added_mib[detector.name] += resident_mib() - before
    for peer in plan.peers:
        before = resident_mib()
        subject = open_peer(
            peer,
            bundle,
            network=loaded.detectors[0].network,
            backend=plan.backends[0],
            mode=plan.mode,
            threads=plan.threads,
            checkpoint=plan.checkpoint,
        )
        _try_out(subject, worst)
        loaded.peers.append(subject)
        loaded.added_mib[subject.name] = resident_mib() - before


def _try_out(subject: Subject, image: RgbImage) -> None:
    """Raises BackendError if it does not run, such as torch.compile without a C++ compiler."""
    try:
        subject([image], None)
    except BackendError:
        raise
    except Exception as error:  # PyTorch's compiler raises nearly anything
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise BackendError(f"the peer '{subject.name}' does not run on this machine: {reason}") from error


def _samples(plan: Plan, bundle: Bundle, subject: DetectorSubject, data: Any | None) -> Samples:
    skipped: Sequence[str] = ()
    if plan.images is not None:
        pictures, skipped = read_pictures(plan.images, plan.limit)
        origin = f"folder {plan.images.name}"
    elif data is not None:
        pictures, origin = pictures_of(data, MOST_PICTURES), "validation images of the data set"
    else:
        pictures, origin = generated_pictures(), "generated scenes"
        pictures = pictures[: plan.limit]
    levels: list[Level] = [FIRST_LEVEL, *(level.level for level in bundle.manifest.probing.levels)]
    detector = subject.detector()
    return sort_pictures(
        pictures,
        lambda image: detector(image, channel_order="rgb"),
        levels,
        origin=origin,
        skipped=skipped,
    )


def _pyramid(plan: Plan, bundle: Bundle, loaded: _Loaded) -> Callable[[Sequence[RgbImage]], float] | None:
    """A function that times backbone and neck alone, as the first backend runs them on a batch."""
    from asag_bench.graphs import PYRAMID, pyramid_bundle

    network: Network = loaded.detectors[0].network
    spec = bundle.manifest.preprocessing
    try:
        with tempfile.TemporaryDirectory() as folder:
            alone = open_network(plan.backends[0], pyramid_bundle(bundle, Path(folder)), plan.threads)
    except BackendError as error:
        loaded.notes.append(f"backbone and neck alone were not timed: {error}")
        return None

    def time_pyramid(images: Sequence[RgbImage]) -> float:
        pixels, sizes = make_batch(images, spec)
        given = {"pixels": network.upload(pixels), "image_size": network.upload(sizes)}
        image = network.stage("normalize")(given)["image"]
        start = time.perf_counter()
        alone.stage(PYRAMID)({"image": image})
        return (time.perf_counter() - start) * 1000

    return time_pyramid


def _measure_all(
    plan: Plan,
    bundle: Bundle,
    loaded: _Loaded,
    samples: Samples,
    pyramid: Callable[[Sequence[RgbImage]], float] | None,
) -> list[StratumResult]:
    subjects = [*loaded.detectors, *loaded.peers]
    blocks = [(stratum, batch) for batch in plan.batches for stratum in samples.strata]
    off = True if plan.quiet else None
    results = []
    with tqdm(total=len(blocks), unit="block", file=sys.stderr, disable=off, leave=False) as bar:
        for stratum, batch in blocks:
            bar.set_description(f"{stratum.name}, batch {batch}")
            results.append(
                measure(
                    stratum,
                    subjects,
                    batch=batch,
                    spec=bundle.manifest.preprocessing,
                    warmup=plan.warmup,
                    duration=plan.duration,
                    pyramid=pyramid,
                    on_round=bar.refresh,
                )
            )
            bar.update()
    return results


def _accuracy(plan: Plan, loaded: _Loaded, data: Any | None) -> dict[str, Accuracy]:
    if data is None:
        return {}
    return {subject.name: measure_accuracy(subject, data, quiet=plan.quiet) for subject in loaded.detectors}


def _describe(bundle: Bundle, plan: Plan) -> dict[str, Any]:
    manifest = bundle.manifest
    return {
        "variant": manifest.variant,
        "head": manifest.head,
        "precision": manifest.precision,
        "trained": manifest.trained,
        "parity_passed": manifest.parity.get("passed"),
        "mode": plan.mode or manifest.probing.mode,
        "deepest_level": manifest.probing.levels[-1].level if manifest.probing.levels else FIRST_LEVEL,
        "shorter_side": manifest.preprocessing.shorter_side,
        "longer_side": manifest.preprocessing.longer_side,
        "graphs": {graph.name: graph.sha256 for graph in manifest.graphs},
    }


def _input_notes(samples: Samples) -> list[str]:
    forced = [stratum.name for stratum in samples.strata if stratum.forced]
    notes = []
    if forced:
        notes.append(f"no picture stops by itself at {' or '.join(forced)}: these rows are of a manual stop")
    if samples.missing:
        notes.append(f"no picture reaches {' or '.join(samples.missing)}: that is not measured")
    if samples.skipped:
        count = len(samples.skipped)
        notes.append(f"pictures that could not be read: {count}, beginning with: {samples.skipped[0]}")
    worst = samples.strata[-1].pictures[0]
    notes.append(
        f"worst is the picture with the most patches, '{worst.name}': it stops at {worst.exit_level} with "
        f"{worst.patches} patches and {worst.found.trace.anchor_count} anchors"
    )
    return notes
