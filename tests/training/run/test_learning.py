"""A small network learns to find large, plain objects, and what it learned survives the export."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from asag_evaluation.data.coco import CocoDataset
from asag_evaluation.evaluate import Evaluation, evaluate
from asag_evaluation.predictor import Predictor, bundle_predictor
from asag_evaluation.report import table
from asag_export.bundle_export import export_bundle
from asag_training.checkpoints import load_checkpoint
from asag_training.evaluation.checkpoint_predictor import checkpoint_predictor
from asag_training.losses import Criterion, LossConfig
from asag_training.run.state import LAST
from asag_training.run.trainer import Trainer
from asag_training.run.training_pass import training_pass
from support.training_runs import make_loader, make_trainer, tiny_recipe, write_pictures

RECIPE = tiny_recipe(
    "schedule.epochs=13",
    "schedule.drops=[11]",
    "schedule.warmup_steps=10",
    "optimisation.lr=0.003",
    "optimisation.batch_size=8",
)
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


def evaluate_with_proposals(predictor: Predictor, data: Path) -> Evaluation:
    dataset = CocoDataset.open(data, "val2017", categories=predictor.detector.manifest.categories)
    return evaluate(predictor.detector, dataset, proposals=predictor.proposals, batch=2)


@pytest.mark.slow
def test_the_bundle_detects_and_proposes_what_the_checkpoint_does(learned: Learned, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(learned.run / LAST)
    exported = export_bundle(checkpoint, tmp_path / "bundle")
    assert exported.parity.passed
    assert exported.bundle.manifest.preprocessing == RECIPE.preprocessing
    of_bundle = evaluate_with_proposals(bundle_predictor(exported.bundle), learned.data)
    of_checkpoint = learned.after.evaluation
    assert of_bundle.coco.ap == pytest.approx(of_checkpoint.coco.ap, abs=1e-6)
    assert of_bundle.anchors == of_checkpoint.anchors
    proposed = evaluate_with_proposals(checkpoint_predictor(learned.run / LAST), learned.data)
    assert proposed.proposal_recall is not None
    assert (proposed.proposal_recall[100] or 0) > 0.25
    assert of_bundle.proposal_recall == pytest.approx(proposed.proposal_recall, abs=0.02)
    assert of_bundle.anchor_recall == pytest.approx(proposed.anchor_recall, abs=0.02)
    assert "AR of proposals: " in table(of_bundle)
