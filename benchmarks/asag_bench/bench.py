"""A whole run: load, sort the pictures, measure, and put everything that matters into one JSON value."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from asag_bench.measuring.accuracy import Accuracy, measure_accuracy, open_data, pictures_of
from asag_bench.measuring.agreement import measure_agreement
from asag_bench.measuring.machine import clocks_mhz, describe_machine, peak_resident_mib, resident_mib
from asag_bench.measuring.measure import Pyramid, StratumResult, measure
from asag_bench.measuring.plan import Candidate, Plan, candidates, check_shape
from asag_bench.measuring.samples import (
    Samples,
    generated_pictures,
    read_pictures,
    resized_pictures,
    sort_pictures,
)
from asag_bench.reports.headline import headline
from asag_bench.runners.peers import check_peers, is_random, open_peer, rule_of
from asag_bench.runners.subjects import DetectorSubject, Stopped, Subject
from asag_deploy.backends import open_network
from asag_deploy.backends.network import Network
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.bundle.manifest import FIRST_LEVEL, Level
from asag_deploy.errors import BackendError, ConfigError
from asag_deploy.images.reading import RgbImage
from asag_export.gate.parity import LEAST_IN_COMMON

MOST_PICTURES = 100
"""Of a data set, to choose from."""


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
    chosen = candidates(plan, [Bundle.open(path) for path in plan.bundles])
    bundle = chosen[0].bundle
    check_peers(plan.peers, plan.checkpoint, bundle.manifest)
    check_shape(plan.shape, bundle.manifest.preprocessing)
    reference = _reference(plan, chosen)
    clocks = clocks_mhz()
    loaded = _load_detectors(plan, chosen)
    data, why_not = open_data(plan.data, loaded.detectors[0], plan.limit) if plan.data else (None, None)
    if why_not is not None:
        loaded.notes.append(why_not)
    if data is not None and plan.shape is not None:
        loaded.notes.append("pictures were resized to be timed; accuracy is of the pictures as they are")
    samples = _samples(plan, bundle, loaded.detectors[0], data)
    _load_peers(plan, chosen[0], loaded, samples)
    pyramids = _pyramids(plan, chosen, loaded)
    results = _measure_all(plan, bundle, loaded, samples, pyramids)
    peak = peak_resident_mib()
    compared_with, agreement = measure_agreement(plan, chosen, loaded.detectors, samples)
    accuracy = _accuracy(plan, loaded, data)
    clocks += clocks_mhz()
    descriptions = {candidate.name: _describe(candidate, plan) for candidate in chosen}
    result = {
        "command": plan.command,
        "machine": {**describe_machine(), "clock_mhz": [min(clocks), max(clocks)] if clocks else None},
        "bundle": descriptions[chosen[0].name],
        "bundles": descriptions,
        "reference": reference,
        "options": plan.options(),
        "input": {
            "origin": samples.origin,
            "pictures": sum(samples.histogram.values()),
            "exit_levels": samples.histogram,
            "skipped": list(samples.skipped),
        },
        "strata": [found.to_dict(plan.percentiles, reference) for found in results],
        "memory": {
            "peak_mib": round(peak, 1),
            "subjects": {name: {"added_mib": round(mib, 1)} for name, mib in loaded.added_mib.items()},
        },
        "agreement": {
            "with": compared_with,
            "least_in_float32": LEAST_IN_COMMON,
            "subjects": {name: found.to_dict() for name, found in agreement.items()},
        },
        "accuracy": {name: found.to_dict() for name, found in accuracy.items()},
        "notes": [*loaded.notes, *_input_notes(samples, bundle)],
    }
    return {**result, "headline": headline(result)}


def _reference(plan: Plan, chosen: Sequence[Candidate]) -> str:
    """The subject that the others are compared with: what was asked for, else PyTorch, else the first."""
    names = [*(candidate.name for candidate in chosen), *plan.peers]
    if plan.reference is None:
        return "torch" if "torch" in plan.peers else names[0]
    if plan.reference not in names:
        raise ConfigError(
            f"--reference is '{plan.reference}', which is not measured; choose one of {', '.join(names)}"
        )
    return plan.reference


def _load_detectors(plan: Plan, chosen: Sequence[Candidate]) -> _Loaded:
    loaded = _Loaded()
    for candidate in chosen:
        before = resident_mib()
        network = open_network(candidate.backend, candidate.bundle, plan.threads)
        rule = rule_of(candidate.bundle.manifest, plan.mode)
        subject = DetectorSubject(candidate.name, candidate.bundle.manifest, network, rule)
        loaded.detectors.append(subject)
        loaded.added_mib[subject.name] = resident_mib() - before
    return loaded


def _load_peers(plan: Plan, first: Candidate, loaded: _Loaded, samples: Samples) -> None:
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
            first.bundle,
            network=loaded.detectors[0].network,
            backend=first.backend,
            mode=plan.mode,
            threads=plan.threads,
            checkpoint=plan.checkpoint,
        )
        _try_out(subject, worst)
        loaded.peers.append(subject)
        loaded.added_mib[subject.name] = resident_mib() - before
        if is_random(peer):
            loaded.notes.append(f"{peer} carries random weights: it is for speed and has no accuracy")


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
        pictures, origin = generated_pictures(shape=plan.shape)[: plan.limit], "generated scenes"
    if plan.shape is not None:
        pictures = resized_pictures(pictures, plan.shape)
        origin += f" of {plan.shape[0]}x{plan.shape[1]}"
    levels: list[Level] = [FIRST_LEVEL, *(level.level for level in bundle.manifest.probing.levels)]
    detector = subject.detector()
    return sort_pictures(
        pictures,
        lambda image: detector(image, channel_order="rgb"),
        levels,
        origin=origin,
        skipped=skipped,
    )


def _pyramids(plan: Plan, chosen: Sequence[Candidate], loaded: _Loaded) -> dict[str, Pyramid]:
    """For each detector, a function that times its backbone and neck alone."""
    found = {}
    for candidate, detector in zip(chosen, loaded.detectors, strict=True):
        try:
            found[candidate.name] = _pyramid(candidate, detector.network, plan.threads)
        except BackendError as error:
            loaded.notes.append(f"{candidate.name}: backbone and neck alone were not timed: {error}")
    return found


def _pyramid(candidate: Candidate, network: Network, threads: int | None) -> Pyramid:
    from asag_bench.runners.graphs import PYRAMID, pyramid_bundle

    processing = network.processing(candidate.bundle.manifest)
    with tempfile.TemporaryDirectory() as folder:
        alone = open_network(candidate.backend, pyramid_bundle(candidate.bundle, Path(folder)), threads)

    def time_pyramid(images: Sequence[RgbImage]) -> float:
        image = processing.prepare(images, "rgb").image
        start = time.perf_counter()
        alone.stage(PYRAMID)({"image": image})
        return (time.perf_counter() - start) * 1000

    return time_pyramid


def _measure_all(
    plan: Plan, bundle: Bundle, loaded: _Loaded, samples: Samples, pyramids: Mapping[str, Pyramid]
) -> list[StratumResult]:
    blocks = [(stratum, batch) for batch in plan.batches for stratum in samples.strata]
    deepest = next((stratum for stratum in reversed(samples.strata[:-1])), None)
    off = True if plan.quiet else None
    results = []
    with tqdm(total=len(blocks), unit="block", file=sys.stderr, disable=off, leave=False) as bar:
        for stratum, batch in blocks:
            bar.set_description(f"{stratum.name}, batch {batch}")
            stopped: dict[str, Stopped] = {}
            if stratum is deepest and stratum.name != FIRST_LEVEL:
                stopped = {detector.name: Stopped(detector, FIRST_LEVEL) for detector in loaded.detectors}
            results.append(
                measure(
                    stratum,
                    [*_side_by_side(loaded.detectors, stopped), *loaded.peers],
                    batch=batch,
                    spec=bundle.manifest.preprocessing,
                    warmup=plan.warmup,
                    duration=plan.duration,
                    pyramids=pyramids,
                    compared={name: other.name for name, other in stopped.items()},
                    on_round=bar.refresh,
                )
            )
            bar.update()
    return results


def _side_by_side(detectors: Sequence[Subject], stopped: Mapping[str, Stopped]) -> list[Subject]:
    """Each detector, and right after it the one that is stopped, if there is one: they are compared."""
    pairs = ((detector, stopped.get(detector.name)) for detector in detectors)
    return [subject for pair in pairs for subject in pair if subject is not None]


def _accuracy(plan: Plan, loaded: _Loaded, data: Any | None) -> dict[str, Accuracy]:
    if data is None:
        return {}
    return {subject.name: measure_accuracy(subject, data, quiet=plan.quiet) for subject in loaded.detectors}


def _describe(candidate: Candidate, plan: Plan) -> dict[str, Any]:
    manifest = candidate.bundle.manifest
    return {
        "variant": manifest.variant,
        "head": manifest.head,
        "precision": manifest.precision,
        "computed_in": candidate.precision,
        "trained": manifest.trained,
        "parity_passed": manifest.parity.get("passed"),
        "mode": plan.mode or manifest.probing.mode,
        "deepest_level": manifest.probing.levels[-1].level if manifest.probing.levels else FIRST_LEVEL,
        "shorter_side": manifest.preprocessing.shorter_side,
        "longer_side": manifest.preprocessing.longer_side,
        "graphs": {graph.name: graph.sha256 for graph in manifest.graphs},
    }


def _input_notes(samples: Samples, bundle: Bundle) -> list[str]:
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
    if not bundle.manifest.trained:
        shape = next((t.shape for t in bundle.manifest.graph("backbone").outputs if t.name == "anchors"), ())
        first, cap = worst.found.trace.levels[0], bundle.manifest.probing.anchor_cap
        notes.append(
            "UNTRAINED weights: where probing stops and how much it looks at mean nothing; in the worst "
            f"picture {first.selected} of the first level's {_count(shape)} anchors ask for a closer look, "
            f"and {worst.found.trace.anchor_count} of at most {cap} reach the decoder"
        )
    return notes


def _count(shape: Sequence[int | str]) -> str:
    """The number of anchors in the first level's output (B, N, 5)."""
    return str(shape[1]) if len(shape) > 1 else "unknown number of"
