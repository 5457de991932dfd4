"""Evaluation-mode losses are those of the public implementation on the same weights, images and targets."""

from __future__ import annotations

import math

import pytest
import torch

from asag_training.losses import Criterion, LossConfig, Losses
from asag_training.losses.targets import Targets
from asag_training.network.model import build
from asag_training.run.training_pass import training_pass
from reference_cases import NAMES, ReferenceCase, load_case

pytestmark = pytest.mark.slow

TOLERANCE = 1e-4
STATISTICS = {"avg_patch_level_2": "avg_patch_P4", "avg_patch_level_3": "avg_patch_P3"}
"""What has another name here."""
UNCOMPARED = {"avg_patch_level_0", "avg_patch_level_1"}
"""Calls of the first level, which is always 1."""


@pytest.fixture(scope="module", params=NAMES)
def case(request: pytest.FixtureRequest) -> ReferenceCase:
    return load_case(request.param)


@pytest.fixture(scope="module")
def losses(case: ReferenceCase) -> Losses:
    targets = [
        Targets(
            torch.from_numpy(case.arrays[f"target{i}_boxes"]),
            torch.from_numpy(case.arrays[f"target{i}_labels"]),
        )
        for i in range(len(case.sizes))
    ]
    model = build(case.config, case.state())
    with torch.no_grad():
        output = training_pass(
            model,
            torch.from_numpy(case.images()),
            torch.from_numpy(case.sizes),
            settings=None,
            epoch=0,
            generator=None,
            levels=case.levels,
        )
    return Criterion(LossConfig(), model.config.patch_size)(output, targets, training=False)


def recorded(case: ReferenceCase, kind: str) -> dict[str, float]:
    prefix = f"{kind}/"
    return {
        name.removeprefix(prefix): float(value)
        for name, value in case.arrays.items()
        if name.startswith(prefix)
    }


def test_every_part(case: ReferenceCase, losses: Losses) -> None:
    expected = {name: value for name, value in recorded(case, "loss").items() if name.startswith("loss_")}
    assert set(losses) == set(expected)
    assert len(expected) == 18
    for name, value in expected.items():
        assert float(losses[name]) == pytest.approx(value, rel=TOLERANCE), name


def test_weights_and_total(case: ReferenceCase, losses: Losses) -> None:
    weights = recorded(case, "weight")
    assert losses.weights == weights
    parts = recorded(case, "loss")
    total = math.fsum(weights[name] * parts[name] for name in weights)
    assert float(losses.total) == pytest.approx(total, rel=TOLERANCE)


def test_statistics(case: ReferenceCase, losses: Losses) -> None:
    expected = {name: value for name, value in recorded(case, "loss").items() if not name.startswith("loss_")}
    found = losses.to_host()
    for name in expected.keys() - UNCOMPARED:
        ours = found[STATISTICS.get(name, name)]
        assert ours == pytest.approx(expected[name], rel=TOLERANCE, abs=1e-6), name
