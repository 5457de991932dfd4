"""A small network learns to find large, plain objects."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from asag_evaluation.data.coco import CocoDataset
from asag_evaluation.evaluate import Evaluation, evaluate
from asag_training.evaluation.checkpoint_predictor import checkpoint_predictor
from asag_training.losses.config import LossConfig
from asag_training.losses.criterion import Criterion
from asag_training.recipes import Recipe
from asag_training.run.state import LAST
from asag_training.run.trainer import Trainer
from asag_training.run.training_pass import training_pass
from support.training_runs import TINY_D, TINY_S, make_loader, make_trainer, tiny_recipe, write_pictures

LEARNING = (
    "schedule.epochs=13",
    "schedule.drops=[11]",
    "schedule.warmup_steps=10",
    "optimisation.lr=0.003",
    "optimisation.batch_size=8",
)
RECIPE = tiny_recipe(*LEARNING)
HEADS = ("", "_0", "_rpn")
"""The main decoder, the auxiliary one, and the relation block."""
KINDS = ("loss_ce", "loss_bbox", "loss_giou")
PARTS = {f"{kind}{head}" for kind in KINDS for head in (*HEADS, "_anchor")} | {
    f"dn_{kind}{head}" for kind in KINDS for head in HEADS
}


class Measured(NamedTuple):
    """What a network is worth."""

    evaluation: Evaluation
    parts: dict[str, float]
    """Losses in which all boxes count alike, whatever their score."""
    weights: dict[str, float]
    """Of the parts in the loss that is minimised."""


class Learned(NamedTuple):
    before: Measured
    after: Measured
    data: Path
    run: Path


def measure(trainer: Trainer, data: Path) -> Measured:
    """On the validation pictures."""
    trainer.save()
    predictor = checkpoint_predictor(trainer.output_dir / LAST)
    dataset = CocoDataset.open(data, "val2017", categories=trainer.categories)
    batch = next(make_loader(data, RECIPE, seed=5).epoch(0))
    with torch.no_grad():
        output = training_pass(
            trainer.model,
            batch.image,
            batch.image_size,
            targets=batch.targets,
            settings=RECIPE.patches,
            epoch=1,
            generator=torch.Generator().manual_seed(0),
        )
        patch_size = RECIPE.network.patch_size
        unweighted = LossConfig(query_weighting=False, patch_images=2)
        plain = Criterion(unweighted, patch_size)(output, batch.targets)
        minimised = Criterion(RECIPE.loss, patch_size)(output, batch.targets)
    weighted = sum(minimised.weights[name] * float(value) for name, value in minimised.items())
    assert float(minimised.total) == pytest.approx(weighted, rel=1e-4)
    parts = {name: float(value) for name, value in plain.items()}
    return Measured(evaluate(predictor.detector, dataset), parts, minimised.weights)


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Learned:
    """Thirteen epochs of eight updates."""
    data, run = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("run")
    write_pictures(data, count=64)
    write_pictures(data, "val2017", count=16, seed=100)
    trainer = make_trainer(data, run, RECIPE)
    before = measure(trainer, data)
    loader = make_loader(data, RECIPE)
    while trainer.position.epoch < RECIPE.schedule.epochs:
        trainer.train_epoch(loader)
    return Learned(before, measure(trainer, data), data, run)


LIGHT = tiny_recipe(
    "network.backbone=mobilenetv4-conv-small",
    "network.separable_neck=true",
    "network.finest_map=P3",
    "network.activation=relu",
    "network.patch_size=8",
    "network.heads=1",
    "optimisation.batch_statistics=true",
    "optimisation.lr=0.003",
    "optimisation.batch_size=8",
    "schedule.epochs=14",
    "schedule.drops=[12]",
    "schedule.warmup_steps=10",
)


OTHERS = {
    "MobileNetV4, separable neck, statistics of batches": LIGHT,
    "ASAG-S": tiny_recipe(*LEARNING, *TINY_S),
    "ASAG-D": tiny_recipe(*LEARNING, *TINY_D),
}


@pytest.mark.slow
@pytest.mark.parametrize("chosen", OTHERS.values(), ids=OTHERS)
def test_other_networks_learn(chosen: Recipe, tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_pictures(data, count=64)
    write_pictures(data, "val2017", count=16, seed=100)
    trainer = make_trainer(data, tmp_path / "run", chosen)
    loader = make_loader(data, chosen)
    while trainer.position.epoch < chosen.schedule.epochs:
        trainer.train_epoch(loader)
    trainer.save()
    predictor = checkpoint_predictor(tmp_path / "run" / LAST)
    dataset = CocoDataset.open(data, "val2017", categories=trainer.categories)
    found = evaluate(predictor.detector, dataset)
    assert (found.anchor_recall[100] or 0) > 0.25
    assert (found.coco.ap50 or 0) > 0.25


@pytest.mark.slow
def test_it_detects(learned: Learned) -> None:
    before, after = (each.evaluation.coco for each in (learned.before, learned.after))
    assert before.ap50 is not None
    assert after.ap50 is not None
    assert before.ap50 < 0.05
    assert after.ap50 > 0.25
    assert all(ap is not None and ap > 0.05 for ap in after.ap_of_class.values())


@pytest.mark.slow
def test_its_anchors_find_the_objects(learned: Learned) -> None:
    before, after = (each.evaluation.anchor_recall[100] for each in (learned.before, learned.after))
    assert before is not None
    assert after is not None
    assert before < 0.15
    assert after > 0.25


@pytest.mark.slow
def test_every_part_of_the_loss_is_minimised(learned: Learned) -> None:
    assert set(learned.after.parts) == PARTS == set(learned.after.weights)
    assert min(learned.after.weights.values()) > 0
    ratios = {name: learned.after.parts[name] / learned.before.parts[name] for name in PARTS}
    # Denoising begins with boxes that are nearly right, so that there is less to gain.
    bounds = {name: 0.92 if name.startswith(("dn_loss_bbox", "dn_loss_giou")) else 0.7 for name in PARTS}
    assert {name: ratio for name, ratio in ratios.items() if not ratio < bounds[name]} == {}


@pytest.mark.slow
def test_its_proposals_find_the_objects(learned: Learned) -> None:
    predictor = checkpoint_predictor(learned.run / LAST)
    assert predictor.detector.manifest.preprocessing == RECIPE.preprocessing
    dataset = CocoDataset.open(learned.data, "val2017", categories=predictor.detector.manifest.categories)
    evaluated = evaluate(predictor.detector, dataset, proposals=predictor.proposals, batch=2)
    assert evaluated.proposal_recall is not None
    assert (evaluated.proposal_recall[100] or 0) > 0.25
    assert evaluated.coco.ap == pytest.approx(learned.after.evaluation.coco.ap, abs=1e-6)
