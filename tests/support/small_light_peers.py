"""Light peers in small: the same networks, a few channels wide, on the pictures of `training_runs`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from asag_bench.light_peers.peer import Said
from asag_bench.light_peers.recipe import PeerName, peer_recipe
from asag_bench.light_peers.training import PeerTraining
from asag_deploy.bundle.manifest import Preprocessing
from asag_evaluation.data.coco import CocoDataset
from asag_training.data.transforms import Augmentation
from asag_training.settings import Schedule
from support.training_runs import SIDE


def small_said(peer: PeerName, data: Path, *, epochs: int = 2, lr: float = 2e-3, seed: int = 0) -> Said:
    """For pictures of `write_pictures`, or others of some 96 pixels."""
    recipe = peer_recipe(peer, "scenes-lite")
    categories = CocoDataset.open(data).categories
    network = recipe.network.with_changes(
        backbone_width=8, hidden_dim=32, ffn_dim=64, num_classes=len(categories)
    )
    return Said(
        recipe=dataclasses.replace(
            recipe,
            network=network,
            augmentation=Augmentation(shorter_sides=(SIDE,), longer_side=SIDE),
            preprocessing=Preprocessing(shorter_side=SIDE, longer_side=SIDE),
            schedule=Schedule(epochs=epochs, drops=(epochs - 1,) if epochs > 1 else (), warmup_steps=10),
            batch_size=4,
            lr=lr,
            queries=60,
        ),
        categories=categories,
        seed=seed,
    )


def training(said: Said, data: Path, output_dir: Path) -> PeerTraining:
    """A run in that folder, or what there is of it."""
    output_dir.mkdir(exist_ok=True)
    return PeerTraining(said, CocoDataset.open(data).for_training(), output_dir)
