"""Losses, gradients and updates of training mode are those of the public implementation.

Every file in `reference/training_cases` is run; each is computed once for all its tests.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from asag_training.data.loading import Batch
from asag_training.losses import targets as target_module
from asag_training.losses.config import LossConfig
from asag_training.losses.criterion import Criterion, Losses
from asag_training.losses.network_output import NetworkOutput
from asag_training.network.config import default_categories
from asag_training.recipes import recipe
from asag_training.run import patch_selection
from asag_training.run.optimizer import build_optimizer
from asag_training.run.state import Position
from asag_training.run.trainer import Trainer
from asag_training.run.training_pass import training_pass
from asag_training.settings import Optimisation, TrainingSettings
from training_cases import (
    PATCHES,
    STEPS,
    TrainingCase,
    gradient_summary,
    load_training_case,
    public_names,
    training_cases,
)

pytestmark = pytest.mark.slow

PARTS, GRADIENT = 1e-5, 5e-4
TENSOR, SMALL_TENSOR, SMALL = 4e-3, 2e-2, 1e-3
"""How far the gradient of one parameter may be off, and that of one whose share of all is under SMALL."""
OFFSETS = "sampling_offset_generator"
"""Its gradient jumps where a point passes the centre of a cell, on which side rounding decides."""
UPDATES = (1e-6, 1e-4, 1e-3, 1e-2)
"""How far the loss may be off in each update; the gradient's norm, ten times that."""


class Computed(NamedTuple):
    """A case as we compute it."""

    case: TrainingCase
    output: NetworkOutput
    losses: Losses
    names: Mapping[str, str]
    """What the public code calls our losses."""
    norms: NDArray[np.float64]
    products: NDArray[np.float64]


@pytest.fixture(scope="module", params=training_cases())
def computed(request: pytest.FixtureRequest) -> Computed:
    case = load_training_case(request.param)
    model, batch = case.model().train(), case.batch()
    build_optimizer(model, Optimisation())  # which stops the stem from training
    with pytest.MonkeyPatch.context() as patched:
        if case.patches:
            recorded = RecordedPatches(case.patches)
            patched.setattr(patch_selection, "shifted_origins", recorded.shifted_origins)
            patched.setattr(patch_selection, "random_origins", recorded.random_origins)
        output = training_pass(
            model,
            batch.image,
            batch.image_size,
            targets=batch.targets,
            settings=TrainingSettings(
                denoising_queries=case.denoising_queries, box_noise=0.0, all_target_patches=True
            ),
            epoch=case.epoch,
            generator=None,
        )
    losses = Criterion(LossConfig(), model.config.patch_size)(output, batch.targets)
    losses.total.backward()  # type: ignore[no-untyped-call]
    summary = gradient_summary(model, case.arrays["grad_names"].tolist())
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == set(case.arrays["grad_names"].tolist())
    return Computed(case, output, losses, public_names(losses, model.config.head_names), *summary)


class RecordedPatches:
    """Draws the patches that the public code drew, for as many groups of objects as it found."""

    def __init__(self, patches: Mapping[int, NDArray[np.int64]]) -> None:
        self._rows, self._images, self._random = patches, Counter[int](), Counter[int]()

    def shifted_origins(
        self, boxes: Tensor, image_size: object, stride: int, side: int, rng: object
    ) -> Tensor:
        drawn = self._of_image(stride, self._images, sent_on=1)
        assert len(drawn) == len(boxes)
        # Its patches begin up to one cell before what holds the object.
        begin, low, high = drawn * stride, boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2
        assert ((begin <= low + 1e-3) & (begin + (side + 1) * stride >= high - 1e-3)).all()
        return drawn

    def random_origins(self, count: int, image_size: object, stride: int, side: int, rng: object) -> Tensor:
        drawn = self._of_image(stride, self._random, sent_on=0)
        return torch.cat([drawn, torch.zeros((count - len(drawn), 2), dtype=torch.int64)])

    def _of_image(self, stride: int, images: Counter[int], sent_on: int) -> Tensor:
        """The patches of the next image, of those whose anchors are sent on or of the others."""
        image, _, _, sent = (rows := self._rows[stride]).T
        drawn = rows[(image == images[stride]) & (sent == sent_on), 1:3]
        images[stride] += 1
        return torch.from_numpy(drawn)


def test_cases_were_recorded_of_both_decoders() -> None:
    assert {"a100", "a100_dn", "a100_dn_empty", "a300", "s100"} <= set(training_cases())
    assert {"first_epoch_a100", "first_epoch_s100"} <= set(training_cases(PATCHES[16]))
    assert "steps" in training_cases(STEPS)


def test_anchors_and_patches(computed: Computed) -> None:
    arrays, output = computed.case.arrays, computed.output
    assert output.valid.sum(dim=1).tolist() == arrays["anchor_count"].tolist()
    counts = {level.level: level.real.sum(dim=1).tolist() for level in output.levels}
    assert [counts["P4"], counts["P3"]] == arrays["patches_p4_p3"].tolist()


def test_every_part(computed: Computed) -> None:
    recorded = computed.case.recorded("loss")
    expected = {name: value for name, value in recorded.items() if "loss_" in name}
    found = {computed.names[name]: value.item() for name, value in computed.losses.items()}
    assert found == pytest.approx(expected, rel=PARTS)
    assert len(found) == (33 if computed.case.denoising_queries else 18)


def test_weights_and_total(computed: Computed) -> None:
    weights = {computed.names[name]: weight for name, weight in computed.losses.weights.items()}
    assert weights == computed.case.recorded("weight")
    assert computed.losses.total.item() == pytest.approx(float(computed.case.arrays["total"]), rel=PARTS)


def test_the_whole_gradient(computed: Computed) -> None:
    norms, products = (computed.case.arrays[f"grad_{name}"] for name in ("norms", "products"))
    whole = np.linalg.norm(norms)
    assert np.linalg.norm(computed.norms) == pytest.approx(whole, rel=GRADIENT)
    # Products with random numbers are as far off as the gradients themselves.
    assert np.linalg.norm(computed.products - products) < GRADIENT * whole


def test_the_gradient_of_every_parameter(computed: Computed) -> None:
    norms, products = (computed.case.arrays[f"grad_{name}"] for name in ("norms", "products"))
    whole = np.linalg.norm(norms)
    names = computed.case.arrays["grad_names"]
    loose = (norms < SMALL * whole) | (np.char.find(names, OFFSETS) >= 0)
    bound = np.where(loose, SMALL_TENSOR, TENSOR) * norms + 1e-9 * whole
    for found, expected in ((computed.norms, norms), (computed.products, products)):
        off = np.abs(found - expected) > bound
        assert not off.any(), names[off].tolist()


def test_the_public_losses_differ_in_the_mirrored_patches_only(
    computed: Computed, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = computed.case
    expected = {name: value for name, value in case.recorded("public_loss").items() if "loss_" in name}
    with torch.no_grad():
        monkeypatch.setattr(target_module, "_flip", mirrored_as_corners)
        batch = case.batch()
        criterion = Criterion(LossConfig(), case.config.patch_size)
        losses = criterion(computed.output, batch.targets)
    found = {computed.names[name]: value.item() for name, value in losses.items()}
    assert found == pytest.approx(expected, rel=PARTS)
    ours = case.recorded("loss")
    differing = {name for name, value in expected.items() if ours[name] != value}
    assert differing <= {"loss_ce_anchor", "loss_bbox_anchor", "loss_giou_anchor"}
    assert "loss_bbox_anchor" in differing


def mirrored_as_corners(boxes: Tensor, flips: tuple[tuple[bool, bool], ...]) -> Tensor:
    """Mirror cx, cy, w, h as if these were x1, y1, x2, y2, as the public code does."""
    patches = []
    for patch, (horizontally, vertically) in zip(boxes.unbind(1), flips, strict=True):
        cx, cy, w, h = patch.unbind(-1)
        if horizontally:
            cx, w = 1 - w, 1 - cx
        if vertically:
            cy, h = 1 - h, 1 - cy
        patches.append(torch.stack([cx, cy, w, h], dim=-1))
    return torch.stack(patches, dim=1)


class RecordedBatches:
    """The batches of the recorded updates, as a trainer takes them."""

    def __init__(self, case: TrainingCase) -> None:
        self.case, self.batches_per_epoch = case, len(case.arrays[STEPS])

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        for k in range(start, self.batches_per_epoch):
            yield self.case.batch(k, f"step{k}_")


@pytest.mark.parametrize("name", training_cases(STEPS))
def test_the_first_updates(name: str, tmp_path: Path) -> None:
    case = load_training_case(name)
    chosen = recipe(
        "asag-a-r50-100-dn-1x",
        [
            f"patches.denoising_queries={case.denoising_queries}",
            "patches.box_noise=0",
            "optimisation.compute=fp32",
            f"loss.patch_images={len(case.sizes)}",
        ],
    )
    chosen = dataclasses.replace(chosen, network=case.config)
    trainer = Trainer(chosen, case.model(), default_categories(case.config), tmp_path, seed=0)
    trainer.position = Position(epoch=case.epoch)
    rows: list[Mapping[str, float]] = []
    batches: Any = RecordedBatches(case)
    trainer.train_epoch(batches, rows.append)
    recorded = case.arrays[STEPS]
    assert len(rows) == len(recorded)
    for k, (row, (total, norm, rate, slow)) in enumerate(zip(rows, recorded, strict=True)):
        tolerance = UPDATES[min(k, len(UPDATES) - 1)]
        assert row["loss"] == pytest.approx(total, rel=tolerance)
        assert row["gradient_norm"] == pytest.approx(norm, rel=10 * tolerance)
        assert (row["lr_network"], row["lr_backbone"]) == pytest.approx((rate, slow), rel=1e-9)
