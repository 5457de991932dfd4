"""A whole run of the bench: load, sort the pictures, measure, and put what matters into a result."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from asag_bench.measuring.accuracy import measure_accuracy, measure_agreement, open_data, pictures_of
from asag_bench.measuring.headline import headline
from asag_bench.measuring.image_groups import (
    Samples,
    generated_pictures,
    read_pictures,
    resized_pictures,
    sort_pictures,
)
from asag_bench.measuring.machine import (
    clocks_mhz,
    describe_machine,
    measure_growth,
    peak_resident_mib,
    resident_mib,
)
from asag_bench.measuring.plan import (
    BFLOAT16,
    BFLOAT16_BACKEND,
    BundleOnBackend,
    Plan,
    bundles_on_backends,
    check_shape,
)
from asag_bench.measuring.timing import Pyramid, group_result, measure
from asag_bench.result import BundleResult, GroupResult, Input, Memory, Result, RunnerMemory
from asag_bench.runners.compared.published import is_compared
from asag_bench.runners.peer_runner import open_peer
from asag_bench.runners.peers import PEERS, Peer
from asag_bench.runners.references import check_references, open_reference, rule_of
from asag_bench.runners.runner import DetectorRunner, Runner, StoppedRunner
from asag_deploy.backends import check_runs_here
from asag_deploy.backends.network import Network
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.bundle.manifest import FIRST_LEVEL, Level
from asag_deploy.command_line import progress
from asag_deploy.errors import AsagError, BackendError, ConfigError
from asag_deploy.images.reading import RgbImage
from asag_deploy.loop.contract import check_stages
from asag_deploy.scratch import scratch_folder
from asag_deploy.timing import since

MOST_PICTURES = 100
"""Of a data set, to choose from."""
_MOST_OF_A_CAUSE = 320
"""Characters."""


@dataclass(kw_only=True)
class _Loaded:
    """The runners, and what is known about them."""

    detectors: list[DetectorRunner] = field(default_factory=list)
    references: list[Runner] = field(default_factory=list)
    memory: dict[str, RunnerMemory] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def run(plan: Plan) -> Result:
    """Measure what the plan says.

    Raises BundleError, BackendError, ConfigError, SourceError, DataError or CheckpointError if something that
    was asked for cannot be measured.
    """
    bundles, opening_s = _open_bundles(plan.bundles)
    chosen = bundles_on_backends(plan, bundles)
    bundle = chosen[0].bundle
    check_references(plan.options.references, plan.checkpoint, bundle.manifest)
    check_shape(plan.options.shape, bundle.manifest.preprocessing)
    baseline = _baseline(plan, chosen)
    for each in chosen:  # before the first is compiled
        check_runs_here(each.options.backend)
    clocks = clocks_mhz()
    loaded = _load_detectors(chosen, opening_s)
    data, why_not = open_data(plan, loaded.detectors[0]) if plan.data else (None, None)
    if why_not is not None:
        loaded.notes.append(why_not)
    if data is not None and plan.options.shape is not None:
        loaded.notes.append("pictures were resized to be timed; accuracy is of the pictures as they are")
    samples = _samples(plan, bundle, loaded.detectors[0], data)
    _load_references(plan, chosen, loaded, samples)
    groups = _measure_all(plan, bundle, loaded, samples, baseline, _pyramids(chosen, loaded))
    peak = peak_resident_mib()
    agreement = measure_agreement(plan, chosen, loaded.detectors, samples)
    measured = loaded.detectors if data is not None else []
    accuracy = {runner.name: measure_accuracy(runner, data, quiet=plan.quiet) for runner in measured}
    _measure_growth(plan, loaded)
    clocks += clocks_mhz()
    described = {each.name: _describe(each) for each in chosen}
    return Result(
        command=plan.command,
        machine=dataclasses.replace(
            describe_machine(), clock_mhz=(min(clocks), max(clocks)) if clocks else None
        ),
        bundle=described[chosen[0].name],
        bundles=described,
        baseline=baseline,
        options=plan.options,
        input=Input(
            origin=samples.origin,
            pictures=sum(samples.histogram.values()),
            exit_levels=samples.histogram,
            skipped=samples.skipped,
        ),
        groups=tuple(groups),
        memory=Memory(peak_mib=round(peak, 1), runners=loaded.memory),
        agreement=agreement,
        accuracy=accuracy,
        notes=(*loaded.notes, *_input_notes(samples, bundle)),
        headline=headline(groups, baseline=baseline, references=plan.options.references, accuracy=accuracy),
    )


def _open_bundles(paths: Sequence[Path]) -> tuple[list[Bundle], dict[Path, float]]:
    """Open the bundles; return the seconds it took to verify each, too."""
    bundles, seconds = [], {}
    for path in paths:
        start = time.perf_counter()
        bundles.append(Bundle.open(path))
        seconds[bundles[-1].path] = since(start) / 1000
    return bundles, seconds


def _baseline(plan: Plan, chosen: Sequence[BundleOnBackend]) -> str:
    """Return the runner to compare with: what was asked for, else PyTorch, else the first."""
    references = (each.name for each in _named_references(plan, chosen))
    names = [*(each.name for each in chosen), *references]
    if plan.baseline is None:
        return "torch" if "torch" in plan.options.references else names[0]
    if plan.baseline not in names:
        raise ConfigError(
            f"--baseline is '{plan.baseline}', which is not measured; choose one of {', '.join(names)}"
        )
    return plan.baseline


def _load_detectors(chosen: Sequence[BundleOnBackend], opening_s: Mapping[Path, float]) -> _Loaded:
    loaded = _Loaded()
    for each in chosen:
        before, start = resident_mib(), time.perf_counter()
        options, manifest = each.options, each.bundle.manifest
        check_stages(each.bundle)
        network = options.open_network(each.bundle)
        rule = rule_of(manifest, options)
        runner = DetectorRunner(each.name, manifest, network, rule, options.loop, options.deadline_ms)
        seconds = since(start) / 1000 + opening_s.get(each.bundle.path, 0.0)
        loaded.detectors.append(runner)
        loaded.memory[runner.name] = _memory(resident_mib() - before, seconds)
    return loaded


def _memory(added_mib: float, load_s: float) -> RunnerMemory:
    return RunnerMemory(added_mib=round(added_mib, 1), load_s=round(load_s, 2))


@dataclass(frozen=True, kw_only=True)
class _Reference:
    """A reference that is to be opened."""

    name: str
    """Of the runner."""
    reference: str
    beside: BundleOnBackend
    """The bundle and the backend that it goes by."""


def _named_references(plan: Plan, chosen: Sequence[BundleOnBackend]) -> list[_Reference]:
    """Return what each reference is opened as: beside the first bundle, but a peer once on every backend."""
    backends = {each.options.backend: each for each in reversed(chosen)}
    of_backends = list(reversed(backends.values()))
    found = []
    for name in plan.options.references:
        if name in PEERS and len(of_backends) > 1:
            found += [
                _Reference(name=f"{name} {each.options.backend}", reference=name, beside=each)
                for each in of_backends
            ]
        else:
            found.append(_Reference(name=name, reference=name, beside=chosen[0]))
    return found


def _load_references(
    plan: Plan, chosen: Sequence[BundleOnBackend], loaded: _Loaded, samples: Samples
) -> None:
    """Open the references.

    Each runner runs the worst image once, so that its memory is what it takes to work.
    """
    worst = samples.groups[-1].pictures[0].image
    for detector in loaded.detectors:
        before = resident_mib()
        detector([worst], None)
        found = loaded.memory[detector.name]
        added = round(found.added_mib + resident_mib() - before, 1)
        loaded.memory[detector.name] = dataclasses.replace(found, added_mib=added)
    for each in _named_references(plan, chosen):
        before, start = resident_mib(), time.perf_counter()
        runner = _open_reference(plan, each, loaded.detectors[0].network)
        seconds = since(start) / 1000
        _try_out(runner, worst)
        loaded.references.append(runner)
        if each.reference in PEERS:  # whose memory and time are those of PyTorch, which has just exported it
            loaded.notes.append(_note_on(each, PEERS[each.reference]))
            continue
        loaded.memory[runner.name] = _memory(resident_mib() - before, seconds)
        if is_compared(each.reference):
            loaded.notes.append(f"{runner.name} carries random weights: it is for speed and has no accuracy")


def _open_reference(plan: Plan, each: _Reference, network: Network) -> Runner:
    """Open a reference; `network` is the first bundle's."""
    bundle, options = each.beside.bundle, each.beside.options
    if each.reference in PEERS:
        return open_peer(each.reference, each.name, bundle, options)
    return open_reference(each.reference, bundle, network, options, plan.checkpoint, plan.weights)


def _note_on(each: _Reference, peer: Peer) -> str:
    """Say how a peer is to be read."""
    computed_in = BFLOAT16 if each.beside.options.backend == BFLOAT16_BACKEND else "fp32"
    return (
        f"{each.name} is {peer.title} with random weights, for speed alone: pictures stretched to "
        f"{peer.side}x{peer.side}, computed in {computed_in}; published AP {peer.ap} on COCO ({peer.source})"
    )


def _try_out(runner: Runner, image: RgbImage) -> None:
    """Raise BackendError if a runner does not run, such as torch.compile without a C++ compiler."""
    try:
        runner([image], None)
    except AsagError:
        raise
    except Exception as error:  # PyTorch's compiler raises nearly anything
        reason = _why(error)
        raise BackendError(f"the reference '{runner.name}' does not run on this machine: {reason}") from error


def _why(error: Exception) -> str:
    """Return the first two lines of an error, the second of which is where PyTorch's compiler says the cause.

    That may be a long call with its arguments: of it, the beginning and the end.
    """
    what, *rest = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    cause = rest[0] if rest else ""
    if len(cause) > _MOST_OF_A_CAUSE:
        cause = f"{cause[: _MOST_OF_A_CAUSE // 4]} ... {cause[-3 * _MOST_OF_A_CAUSE // 4 :]}"
    return f"{what.rstrip(':')}: {cause}" if cause else what


def _samples(plan: Plan, bundle: Bundle, runner: DetectorRunner, data: Any | None) -> Samples:
    skipped: Sequence[str] = ()
    if plan.images is not None:
        pictures, skipped = read_pictures(plan.images, plan.limit)
        origin = f"folder {plan.images.name}"
    elif data is not None:
        pictures, origin = pictures_of(data, MOST_PICTURES), "validation images of the data set"
    else:
        pictures, origin = generated_pictures(shape=plan.options.shape)[: plan.limit], "generated scenes"
    if plan.options.shape is not None:
        pictures = resized_pictures(pictures, plan.options.shape)
        origin += f" of {plan.options.shape[0]}x{plan.options.shape[1]}"
    levels: list[Level] = [FIRST_LEVEL, *(level.level for level in bundle.manifest.probing.levels)]
    if plan.options.max_level is not None:
        levels = levels[: levels.index(plan.options.max_level) + 1]
    detector = runner.detector()
    return sort_pictures(
        pictures,
        lambda image: detector(image, channel_order="rgb"),
        levels,
        origin=origin,
        skipped=skipped,
    )


def _pyramids(chosen: Sequence[BundleOnBackend], loaded: _Loaded) -> dict[str, Pyramid]:
    """Return, for each detector, a function that times its backbone and neck alone."""
    found = {}
    for each, detector in zip(chosen, loaded.detectors, strict=True):
        try:
            found[each.name] = _pyramid(each, detector.network)
        except BackendError as error:
            loaded.notes.append(f"{each.name}: backbone and neck alone were not timed: {error}")
    return found


def _pyramid(chosen: BundleOnBackend, network: Network) -> Pyramid:
    from asag_bench.runners.graphs import PYRAMID, pyramid_bundle

    processing, options = network.processing(chosen.bundle.manifest), chosen.options
    with scratch_folder() as folder:
        bundle = pyramid_bundle(chosen.bundle, folder)
        alone = options.open_network(bundle)
    wanted = {tensor.name for tensor in bundle.manifest.graph(PYRAMID).inputs}

    def time_pyramid(images: Sequence[RgbImage]) -> float:
        prepared = processing.prepare(images, "rgb")
        given = {"image": prepared.image, "image_size": alone.upload(prepared.sizes)}
        given = {name: array for name, array in given.items() if name in wanted}
        start = time.perf_counter()
        alone.stage(PYRAMID)(given)
        return since(start)

    return time_pyramid


def _measure_all(
    plan: Plan,
    bundle: Bundle,
    loaded: _Loaded,
    samples: Samples,
    baseline: str,
    pyramids: Mapping[str, Pyramid],
) -> list[GroupResult]:
    """Time all image groups at all batch sizes.

    On the deepest group each detector also runs stopped at P5, right after itself: they are compared.
    """
    blocks = [(group, batch) for batch in plan.options.batches for group in samples.groups]
    deepest = next(iter(reversed(samples.groups[:-1])), None)
    spec = bundle.manifest.preprocessing
    results = []
    with progress(total=len(blocks), unit="block", quiet=plan.quiet) as bar:
        for group, batch in blocks:
            bar.set_description(f"{group.name}, batch {batch}")
            stopped: dict[str, StoppedRunner] = {}
            if group is deepest and group.name != FIRST_LEVEL:
                stopped = {each.name: StoppedRunner(each, FIRST_LEVEL) for each in loaded.detectors}
            pairs = [(detector, stopped.get(detector.name)) for detector in loaded.detectors]
            side_by_side = [runner for pair in pairs for runner in pair if runner is not None]
            timings = measure(
                group,
                [*side_by_side, *loaded.references],
                batch=batch,
                spec=spec,
                warmup=plan.options.warmup,
                duration=plan.options.duration_s,
                pyramids=pyramids,
                on_round=bar.refresh,
            )
            results.append(
                group_result(
                    group,
                    timings,
                    batch=batch,
                    spec=spec,
                    percentiles=plan.options.percentile,
                    baseline=baseline,
                    compared={name: other.name for name, other in stopped.items()},
                )
            )
            bar.update()
    return results


def _measure_growth(plan: Plan, loaded: _Loaded) -> None:
    for runner in loaded.detectors if plan.options.memory_images else []:
        growth = round(measure_growth(runner, plan.options.memory_images, quiet=plan.quiet), 1)
        found = loaded.memory[runner.name]
        loaded.memory[runner.name] = dataclasses.replace(found, growth_mib=growth)


def _describe(chosen: BundleOnBackend) -> BundleResult:
    manifest = chosen.bundle.manifest
    passed = manifest.parity.get("passed")
    return BundleResult(
        variant=manifest.variant,
        head=manifest.head,
        precision=manifest.precision,
        computed_in=chosen.precision,
        trained=manifest.trained,
        parity_passed=passed if isinstance(passed, bool) else None,
        mode=chosen.options.mode or manifest.probing.mode,
        deepest_level=manifest.probing.levels[-1].level if manifest.probing.levels else FIRST_LEVEL,
        shorter_side=manifest.preprocessing.shorter_side,
        longer_side=manifest.preprocessing.longer_side,
        graphs={graph.name: graph.sha256 for graph in manifest.graphs},
    )


def _input_notes(samples: Samples, bundle: Bundle) -> list[str]:
    forced = [group.name for group in samples.groups if group.forced]
    notes = []
    if forced:
        notes.append(f"no picture stops by itself at {' or '.join(forced)}: these rows are of a manual stop")
    if samples.missing:
        notes.append(f"no picture reaches {' or '.join(samples.missing)}: that is not measured")
    if samples.skipped:
        count = len(samples.skipped)
        notes.append(f"pictures that could not be read: {count}, beginning with: {samples.skipped[0]}")
    worst = samples.groups[-1].pictures[0]
    trace = worst.found.trace
    notes.append(
        f"worst is the picture with the most patches, '{worst.name}': it stops at {worst.exit_level} with "
        f"{worst.patches} patches and {trace.anchor_count} anchors"
    )
    if not bundle.manifest.trained:
        shape = next((t.shape for t in bundle.manifest.graph("backbone").outputs if t.name == "anchors"), ())
        cap = bundle.manifest.probing.anchor_cap
        of_first_level = str(shape[1]) if len(shape) > 1 else "unknown number of"  # (B, N, 5)
        notes.append(
            "UNTRAINED weights: where probing stops and how much it looks at mean nothing; in the worst "
            f"picture {trace.levels[0].selected} of the first level's {of_first_level} anchors ask for a "
            f"closer look, and {trace.anchor_count} of at most {cap} reach the decoder"
        )
    return notes
