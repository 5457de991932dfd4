"""Measure the front: every contender on every picture, in turn, round by round."""

from __future__ import annotations

import csv
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from asag_bench.front.result import ADAPTIVE, ALWAYS, Contender, Front, Pictures, Training
from asag_bench.light_peers.evaluation import DETECTIONS
from asag_bench.light_peers.peer import RECIPE, TrainedPeer, load_peer, unfinished
from asag_bench.light_peers.runner import PeerDetector
from asag_bench.measuring.machine import describe_machine
from asag_bench.measuring.timing import nothing_old_collected
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.bundle.manifest import Category, Level, Manifest
from asag_deploy.command_line import progress
from asag_deploy.detector import Detector
from asag_deploy.detector_options import DetectorOptions
from asag_deploy.errors import ConfigError, OutputError
from asag_deploy.images.reading import RgbImage
from asag_deploy.loop.stopping import StopRule, stop_rule
from asag_deploy.processing.postprocess import Found
from asag_deploy.timing import since
from asag_evaluation.data.coco import VAL_SPLIT, CocoDataset, Sample
from asag_evaluation.data.orientation import OrientationRule
from asag_evaluation.evaluate import coco_results
from asag_evaluation.metrics.coco import coco_metrics
from asag_training.run.log import STEPS
from asag_training.run.state import is_of_train_peer

_STOPS: dict[str, Level | None] = {"P5": "P5", "P4": "P4", ADAPTIVE: None, ALWAYS: None}
"""Each way to stop, and the manual stop that it is."""
_DRAWS = 100
"""Of an order, until it goes with the step before; of two contenders one always fits."""

Detect = Callable[[RgbImage], tuple[Found, Level | None]]


@dataclass(frozen=True, kw_only=True)
class FrontPlan:
    """What to measure.  Raises ConfigError where it makes no sense."""

    command: str
    data: Path
    bundles: tuple[Path, ...]
    runs: tuple[Path, ...]
    """The training runs of the bundles, in their order, for what they cost; or none."""
    peers: tuple[Path, ...]
    """Folders of `asag-bench train-peer`."""
    backends: tuple[str, ...]
    threads: int | None
    rounds: int
    limit: int | None = None
    orientation: OrientationRule = "auto"
    quiet: bool = False

    def __post_init__(self) -> None:
        if self.runs and len(self.runs) != len(self.bundles):
            raise ConfigError(
                f"--run is given {len(self.runs)} times for {len(self.bundles)} bundles: give one for each, "
                "in their order, or none"
            )
        names = [folder.resolve().name for folder in (*self.bundles, *self.peers)]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"two folders are called '{name}': results tell networks apart by it")


@dataclass(kw_only=True)
class _Running:
    """A contender, and what it has done so far."""

    contender: Contender
    detect: Detect
    results: list[dict[str, Any]] = field(default_factory=list)
    ms: list[list[float]] = field(default_factory=list)
    exits: list[Level | None] = field(default_factory=list)
    """Of each picture."""

    def prepare(self, pictures: int) -> None:
        """Make room for so many pictures."""
        self.ms, self.exits = [[] for _ in range(pictures)], [None] * pictures


def measure_front(plan: FrontPlan) -> Front:
    """Measure accuracy and times of all contenders.

    All of them are called in turn, so that what slows the machine slows all.  The first round is not timed:
    it is that of the accuracy.
    Raises ConfigError, DataError, BundleError, CheckpointError and BackendError for what cannot be measured.
    """
    bundles = [Bundle.open(path) for path in plan.bundles]
    categories = bundles[0].manifest.categories
    given: dict[str, Any] = {"categories": categories, "orientation": plan.orientation}
    dataset = CocoDataset.open(plan.data, VAL_SPLIT, **given).first(plan.limit)
    running = _open(plan, bundles, categories)
    samples = [dataset[i] for i in range(len(dataset))]
    for each in running:
        each.prepare(len(samples))
    total = (1 + plan.rounds) * len(samples) * len(running)
    with progress(total=total, unit="call", quiet=plan.quiet) as bar:
        for k, i, found, level, _ in _round(running, samples, 0):
            running[k].results += coco_results(samples[i].image_id, found, categories)
            running[k].exits[i] = level
            bar.update()
        with nothing_old_collected():
            for number in range(1, 1 + plan.rounds):
                for k, i, _, _, taken in _round(running, samples, number):
                    running[k].ms[i].append(taken)
                    bar.update()
    truth = dataset.ground_truth()
    return Front(
        command=plan.command,
        machine=describe_machine(),
        threads=plan.threads,
        rounds=plan.rounds,
        pictures=Pictures(
            data=plan.data.resolve().name,
            ids=tuple(record.image_id for record in dataset.records),
            objects=tuple(len(record.boxes) for record in dataset.records),
            kinds=tuple(record.kind for record in dataset.records),
        ),
        contenders=tuple(_finished(each, truth) for each in running),
    )


def _round(
    running: Sequence[_Running], samples: Sequence[Sample], number: int
) -> Iterator[tuple[int, int, Found, Level | None, float]]:
    """Yield who was called with which picture, what it found, where it stopped, and its milliseconds."""
    for k, i in turns(len(running), len(samples), number):
        began = time.perf_counter()
        found, level = running[k].detect(samples[i].image)
        yield k, i, found, level, since(began)


def turns(contenders: int, pictures: int, round_: int) -> Iterator[tuple[int, int]]:
    """Yield who is called with which picture in a round: each contender with every picture.

    In each step of it all are called once, in an order that is drawn anew, so that none is always called
    after the same one.  Each begins elsewhere in the data set, so that none gets the picture of the one
    before it (given as many pictures as contenders), whose sizes the graphs that they share would be ready
    for: another stop of the same network, say.
    """
    apart = max(1, pictures // contenders)
    draw = np.random.default_rng(round_)
    last: tuple[int, int] | None = None
    for step in range(pictures):
        for _ in range(_DRAWS):
            order = draw.permutation(contenders).tolist()
            calls = [(contender, (step + contender * apart) % pictures) for contender in order]
            if last is None or (calls[0][0] != last[0] and calls[0][1] != last[1]):
                break
        yield from calls
        last = calls[-1]


def _finished(running: _Running, truth: dict[str, Any]) -> Contender:
    found = coco_metrics(truth, running.results, most=DETECTIONS)
    exits = tuple(level for level in running.exits if level is not None)
    return dataclasses.replace(
        running.contender,
        ap=found.ap,
        ap50=found.ap50,
        ap75=found.ap75,
        ms=tuple(round(median(each), 3) for each in running.ms),
        exits=exits or None,
    )


def _open(plan: FrontPlan, bundles: Sequence[Bundle], categories: tuple[Category, ...]) -> list[_Running]:
    runs = [_run_of(folder, bundle) for folder, bundle in zip(plan.runs, bundles, strict=False)]
    peers = [(folder, _peer(folder, categories), _training(folder)) for folder in plan.peers]
    found = []
    for backend in plan.backends:
        options = DetectorOptions(backend=backend, threads=plan.threads)
        for i, bundle in enumerate(bundles):
            if bundle.manifest.categories != categories:
                raise ConfigError(f"the bundle '{plan.bundles[i]}' has other classes than the first one")
            training = runs[i] if runs else None
            network = options.open_network(bundle)
            for stop in _STOPS:
                detector = Detector(
                    bundle.manifest, network, _rule(bundle.manifest, stop), loop=network.loop("auto", None)
                )
                of = (plan.bundles[i], bundle.manifest.variant, backend, stop)
                found.append(_contender(*of, training, _detect_with(detector)))
        for folder, peer, training in peers:
            runner = PeerDetector(peer, bundles[0], options)
            of_peer = (folder, peer.said.recipe.peer, backend, None)
            found.append(_contender(*of_peer, training, _peer_detects(runner)))
    return found


def _contender(
    folder: Path, network: str, backend: str, stop: str | None, training: Training | None, detect: Detect
) -> _Running:
    weights = folder.resolve().name
    contender = Contender(
        name=", ".join(filter(None, (weights, backend, stop))),
        network=network,
        weights=weights,
        backend=backend,
        stop=stop,
        ap=None,
        ap50=None,
        ap75=None,
        ms=(),
        exits=None,
        training=training,
    )
    return _Running(contender=contender, detect=detect)


def _rule(manifest: Manifest, stop: str) -> StopRule:
    """Return when to stop: where nothing asks for more, at a level at the latest, or there in any case."""
    if stop == ALWAYS:
        return dataclasses.replace(stop_rule(manifest, None, "P3"), min_selected=0)
    return stop_rule(manifest, None, _STOPS[stop])


def _detect_with(detector: Detector) -> Detect:
    def detect(image: RgbImage) -> tuple[Found, Level | None]:
        found = detector(image, channel_order="rgb")
        return Found(found.xyxy, found.confidence, found.class_id), found.trace.exit_level

    return detect


def _peer_detects(runner: PeerDetector) -> Detect:
    return lambda image: (runner(image), None)


def _peer(folder: Path, categories: tuple[Category, ...]) -> TrainedPeer:
    peer = load_peer(folder)
    if peer.said.categories != categories:
        raise ConfigError(f"the peer in '{folder}' was trained on other classes than the bundles")
    return peer


def _run_of(folder: Path, bundle: Bundle) -> Training:
    """Read what the run of a bundle has cost so far (ConfigError if it is a peer's, or another network's)."""
    training = _training(folder)
    said = json.loads((folder / RECIPE).read_bytes())
    if is_of_train_peer(said):
        raise ConfigError(
            f"'{folder}' is a run of `asag-bench train-peer`: give it with --peer, and with --run the run of "
            f"asag-train that the bundle '{bundle.shown}' is of"
        )
    manifest, network = bundle.manifest, said["network"]
    of_bundle = {
        "variant": manifest.variant,
        "num_classes": len(manifest.categories),
        "patch_size": manifest.probing.patch_size,
    }
    for name, value in of_bundle.items():
        if network.get(name, value) != value:
            raise ConfigError(
                f"the run in '{folder}' is of another network than the bundle '{bundle.shown}' (its {name} "
                f"is {network[name]}, not {value}): give with --run the run of each bundle, in their order"
            )
    return training


def _training(folder: Path) -> Training:
    """Read what a run has cost so far, of `asag-train` or of `asag-bench train-peer`."""
    try:
        said = json.loads((folder / RECIPE).read_bytes())
        with (folder / STEPS).open(newline="", encoding="utf-8") as file:
            spent = [float(row["ms_cpu"]) for row in csv.DictReader(file)]
        of_peer = is_of_train_peer(said)
        recipe = said["recipe"] if of_peer else said
        batch = (recipe if of_peer else recipe["optimisation"])["batch_size"]
        epochs, seed, _ = recipe["schedule"]["epochs"], said["seed"], recipe["network"]["variant"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputError(
            f"'{folder}' holds no log of a training run with the processor's time ({error}): give the "
            "--output-dir of asag-train or `asag-bench train-peer`"
        ) from error
    return Training(
        updates=len(spent),
        images=len(spent) * batch,
        cpu_minutes=round(sum(spent) / 60_000, 3),
        seed=seed,
        unfinished=unfinished(folder, epochs),
    )
