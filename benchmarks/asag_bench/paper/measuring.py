"""Measure whatever the tables need of the networks that were given, each thing once."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from asag_bench.gmacs.count import count_asag, count_compared
from asag_bench.gmacs.published import PAPER_PATCHES
from asag_bench.light_peers.evaluation import TorchPeer, evaluate_peer
from asag_bench.light_peers.peer import Said, load_peer
from asag_bench.light_peers.recipe import PeerName
from asag_bench.measuring.machine import describe_machine
from asag_bench.measuring.timing import nothing_old_collected
from asag_bench.paper.roles import REFERENCE, ROLES, Role, base_recipe, check_role
from asag_bench.paper.store import Figures, Store, data_id, file_id
from asag_bench.runners.compared.map_stages import stage_of_maps
from asag_bench.runners.compared.published import COMPARED, PAPER_SHAPE
from asag_bench.runners.compared.runner import ComparedRunner, build_compared
from asag_deploy.bundle.manifest import Category, Level, Preprocessing
from asag_deploy.command_line import progress
from asag_deploy.detector_options import DetectorOptions
from asag_deploy.errors import ConfigError
from asag_deploy.images.reading import RgbImage
from asag_deploy.processing.preprocess import resized_shape
from asag_evaluation.data.coco import CocoDataset
from asag_evaluation.data.orientation import OrientationRule
from asag_training.checkpoints import Checkpoint
from asag_training.evaluation.checkpoint_predictor import evaluated_checkpoint, network_predictor
from asag_training.evaluation.device import check_device
from asag_training.evaluation.sweep import Way, evaluate_ways
from asag_training.evaluation.sweep_report import figures_of, percent, precision_figures
from asag_training.network.config import VARIANTS, AsagConfig
from asag_training.network.model import build
from asag_training.network.stages import NormalizeStage, StageModule, TorchNetwork
from asag_training.recipes import RECIPES

_PEER: PeerName = "adamixer-6"
_WARM_UP = 3
Shape = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Given:
    """What the user gives."""

    data: Path
    split: str
    networks: Mapping[str, Path]
    """Checkpoints by role."""
    peers: Mapping[str, Path]
    """Folders of `asag-bench train-peer` by role."""
    limit: int | None = None
    timed: int = 10
    """Images that are timed; 0: none."""
    orientation: OrientationRule = "auto"
    device: str = "cpu"
    """Where PyTorch runs ASAG for its accuracy; all times are the CPU's."""
    quiet: bool = False
    note: Callable[[str], object] = lambda sentence: None
    """Told in sentences what was taken and assumed of the networks."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """A checkpoint that was given for a role."""

    path: Path
    id: str
    config: AsagConfig
    categories: tuple[Category, ...]
    preprocessing: Preprocessing
    trained: bool


class Measurer:
    """The networks, the data, and the figures so far."""

    def __init__(self, given: Given, store: Store) -> None:
        """Read what was given, before anything is measured.

        Raises ConfigError for a role that does not exist or a network that cannot have it, for networks of
        different classes and for a device that is not there; CheckpointError and DataError for what cannot be
        read.
        """
        check_device(given.device)
        self.given, self.store = given, store
        self.networks = {role: _read_network(role, path, given) for role, path in given.networks.items()}
        self.peers = {role: _read_peer(role, path) for role, path in given.peers.items()}
        classes = [network.categories for network in self.networks.values()]
        classes += [said.categories for said in self.peers.values()]
        opened = CocoDataset.open(
            given.data, given.split, categories=next(iter(classes), None), orientation=given.orientation
        )
        self.dataset = opened.first(given.limit)
        if not len(self.dataset):
            raise ConfigError(f"there are no images in '{given.data}'")
        for role, of_role in zip((*self.networks, *self.peers), classes, strict=True):
            if of_role != self.dataset.categories:
                raise ConfigError(
                    f"the network for {role} has other classes than the data in '{given.data}', or than the "
                    "network before it: give networks that were trained on that data's classes"
                )
        self._data = data_id(self.dataset)
        self._images: list[RgbImage] = []
        machine = describe_machine()
        self.machine = machine
        self._speed_on = (machine.processor, machine.packages.get("torch"), torch.get_num_threads())

    @property
    def reference(self) -> tuple[str, Network] | None:
        """The network beside which others are timed: that of the ablation studies, or else the first."""
        names = [name for name in (REFERENCE, *self.networks) if name in self.networks]
        return (names[0], self.networks[names[0]]) if names else None

    @property
    def base(self) -> str:
        """The recipe that the ablations are to change."""
        reference = self.reference
        return base_recipe(None if reference is None else reference[1].config.variant)

    def who(self, role: str) -> str | None:
        """Return whose network is measured for a role: its own, that of one that stands in, or None."""
        there = {*self.networks, *self.peers}
        return next((name for name in (role, *ROLES[role].stand_in) if name in there), None)

    def measure(self, needed: Mapping[str, Sequence[Way]]) -> None:
        """Measure networks, by role, in all these ways; peers have one.  What is known is not measured."""
        for role, ways in needed.items():
            if role in self.peers:
                self._measure_peer(role)
                continue
            missing = [way for way in ways if self.figures(role, way) is None]
            if missing:
                self._measure_network(role, missing)

    def figures(self, role: str, way: Way) -> Figures | None:
        """Return what was measured of a network in one way."""
        if role in self.peers:
            return self.store.get("peer", self._peer_id(role), self._data)
        return self.store.get(*self._key(self.networks[role], way))

    def _key(self, network: Network, way: Way) -> tuple[Any, ...]:
        return "network", network.id, self._data, dict(way.changes), way.max_level

    def _peer_id(self, role: str) -> str:
        return file_id(self.given.peers[role] / "peer.safetensors")

    def _measure_network(self, role: str, ways: Sequence[Way]) -> None:
        network = self.networks[role]
        checkpoint = self.checkpoint(role)
        total = len(ways) * len(self.dataset)
        with progress(total=total, unit="image", description=role, quiet=self.given.quiet) as bar:
            found = evaluate_ways(
                checkpoint, ways, self.dataset, device=self.given.device, on_image=bar.update
            )
            for way, evaluation in found:
                figures: Figures = figures_of(evaluation)
                figures["AR anchors"] = percent(evaluation.anchor_recall[1000])
                figures["AR proposals"] = percent((evaluation.proposal_recall or {}).get(1000))
                figures["points"] = [list(point) for point in evaluation.anchors.points]
                figures["exits"] = evaluation.anchors.exit_levels
                figures["correlation"] = evaluation.anchors.correlation
                self.store.put(figures, *self._key(network, way))

    def _measure_peer(self, role: str) -> None:
        if self.figures(role, Way()) is not None:
            return
        given = self.given
        found = evaluate_peer(
            given.peers[role],
            given.data,
            limit=given.limit,
            orientation=given.orientation,
            quiet=given.quiet,
        )
        figures: Figures = dict(precision_figures(found))
        figures["#An"] = self.peers[role].recipe.queries
        self.store.put(figures, "peer", self._peer_id(role), self._data)

    def checkpoint(self, role: str) -> Checkpoint:
        """Load the checkpoint of a role, with its main decoder alone."""
        network = self.networks[role]
        return evaluated_checkpoint(network.path, classes=lambda: network.categories)

    def speed(self, role: str, max_level: Level | None) -> float | None:
        """Return the images a second of a network's fast mode, or of a peer; None: none are timed."""
        if not self.given.timed:
            return None
        if role in self.peers:
            of: tuple[Any, ...] = ("peer", self._peer_id(role))
            return self._timed(role, of, lambda: TorchPeer(load_peer(self.given.peers[role])))
        of = ("network", self.networks[role].id, max_level)
        return self._timed(role, of, lambda: self._fast(role, max_level))

    def compared_speed(self, name: str, queries: int) -> float | None:
        """Return the images a second of one of the paper's other detectors with random weights.

        It has backbone, width and classes of the reference network.  None: there is no reference, or none are
        timed.  Raises ConfigError where it cannot be built beside that network.
        """
        reference = self.reference
        if reference is None or not self.given.timed:
            return None
        of = ("compared", name, queries, reference[1].id)
        return self._timed(f"{name}, {queries} queries", of, lambda: self._compared(name, queries))

    def _timed(
        self, title: str, of: tuple[Any, ...], make: Callable[[], Callable[[RgbImage], object]]
    ) -> float:
        key = ("speed", *of, self._data, self.given.timed, *self._speed_on)
        known = self.store.get(*key)
        if known is None:
            detect, images, seconds = make(), self._to_time(), []
            total = len(images) + _WARM_UP
            with progress(total=total, unit="call", description=title, quiet=self.given.quiet) as bar:
                for _ in range(_WARM_UP):
                    detect(images[0])
                    bar.update()
                with nothing_old_collected():
                    for image in images:
                        begin = time.perf_counter()
                        detect(image)
                        seconds.append(time.perf_counter() - begin)
                        bar.update()
            known = {"FPS": round(1 / fmean(seconds), 3)}
            self.store.put(known, *key)
        return float(known["FPS"])

    def _to_time(self) -> list[RgbImage]:
        if not self._images:
            count = min(self.given.timed, len(self.dataset))
            self._images = [self.dataset[i].image for i in range(count)]
        return self._images

    def _fast(self, role: str, max_level: Level | None) -> Callable[[RgbImage], object]:
        checkpoint = self.checkpoint(role)
        predictor = network_predictor(
            build(checkpoint.config, checkpoint.state),
            checkpoint.categories,
            DetectorOptions(mode="fast", max_level=max_level),
            preprocessing=checkpoint.preprocessing,
        )
        return lambda image: predictor.detector(image, channel_order="rgb")

    def _compared(self, name: str, queries: int) -> Callable[[RgbImage], object]:
        assert self.reference is not None
        checkpoint = self.checkpoint(self.reference[0])
        preprocessing = checkpoint.preprocessing or Preprocessing()
        detector = build_compared(name, checkpoint.config, queries)
        model = build(checkpoint.config, checkpoint.state)
        stages: list[StageModule] = [
            NormalizeStage(preprocessing),
            stage_of_maps(detector.maps, model),
            detector,
        ]
        manifest = network_predictor(
            model, checkpoint.categories, preprocessing=preprocessing
        ).detector.manifest
        runner = ComparedRunner(name, manifest, TorchNetwork(stages))
        return lambda image: runner([image], None)

    def gmacs(self, role: str, figures: Figures) -> float:
        """Count the billions of multiply-accumulates of a network on the mean image of the data."""
        if role in self.peers:
            recipe = self.peers[role].recipe
            shape = self._mean_shape(recipe.preprocessing)
            return self._counted(_PEER, recipe.network, shape, recipe.queries)
        network = self.networks[role]
        shape = self._mean_shape(network.preprocessing)
        patches = round(figures["N_P4"]), round(figures["N_P3"])
        return self._counted(None, network.config, shape, round(figures["#An"]), patches)

    def compared_gmacs(self, name: str, queries: int) -> tuple[float, bool]:
        """Count those of another detector, and say whether it is the paper's own: there is no reference."""
        reference = self.reference
        if reference is None:
            of, shape = VARIANTS["asag-a-r50-100"], COMPARED[name].gmacs_of
        else:
            of, shape = reference[1].config, self._mean_shape(reference[1].preprocessing)
        return self._counted(name, of, shape, queries), reference is None

    def published_gmacs(self, role: Role, queries: float) -> float:
        """Count those of the paper's own network of a role, on the image that the paper counts."""
        config = RECIPES[role.recipe]().network
        return self._counted(None, config, PAPER_SHAPE, round(queries))

    def _counted(
        self, name: str | None, config: AsagConfig, shape: Shape, queries: int, patches: Shape = PAPER_PATCHES
    ) -> float:
        parts: dict[str, float]
        settings = {key: value for key, value in config.to_dict().items() if key != "variant"}
        key = ("gmacs", name, settings, shape, queries, patches)
        known = self.store.get(*key)
        if known is None:
            if name is None:
                parts = count_asag(config, shape, queries, patches)
            else:
                parts = count_compared(name, config, shape, queries)
            known = {"F": round(sum(parts.values()), 3)}
            self.store.put(known, *key)
        return float(known["F"])

    def _mean_shape(self, preprocessing: Preprocessing) -> Shape:
        """Return the mean height and width of the data's images as the network gets them."""
        shapes = [
            resized_shape(record.height, record.width, preprocessing) for record in self.dataset.records
        ]
        return round(fmean(height for height, _ in shapes)), round(fmean(width for _, width in shapes))


def _read_network(role: str, path: Path, given: Given) -> Network:
    expected = check_role(role, "network")
    checkpoint = evaluated_checkpoint(
        path,
        classes=lambda: CocoDataset.open(given.data, given.split).categories,
        note=lambda sentence: given.note(f"'{path}': {sentence}"),
    )
    wanted = dict(expected.settings)
    if expected.decoder is not None:
        wanted["decoder"] = expected.decoder
    for name, value in wanted.items():
        has = getattr(checkpoint.config, name)
        if has != value:
            raise ConfigError(
                f"the role {role} takes a network whose {name} is {value}; that of '{path}' is {has}"
            )
    return Network(
        path=path,
        id=file_id(path),
        config=checkpoint.config,
        categories=checkpoint.categories,
        preprocessing=checkpoint.preprocessing or Preprocessing(),
        trained=checkpoint.trained,
    )


def _read_peer(role: str, path: Path) -> Said:
    check_role(role, "peer")
    said = load_peer(path).said
    weighs = role.endswith("query-weighting")
    if said.recipe.peer != _PEER or said.recipe.query_weighting != weighs:
        how = "with --query-weighting" if weighs else "without --query-weighting"
        raise ConfigError(f"the role {role} takes {_PEER} trained {how}; the peer in '{path}' is another")
    return said
