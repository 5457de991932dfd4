"""Query Weighting against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from asag_training.losses.query_weighting import negative_share, negative_weight, norm, positive_weight

GAMMA1, GAMMA2 = 0.4, 0.6


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_norm_ends_and_centre() -> None:
    found = norm(torch.tensor([0.0, 1 / 3, 1.0]))
    expected = [sigmoid(-1.5) / sigmoid(3), 0.5 / sigmoid(3), 1.0]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_norm_rises() -> None:
    assert (norm(torch.linspace(0, 1, 50)).diff() > 0).all()


def test_negative_share() -> None:
    found = negative_share(torch.tensor([0.0, 0.49, 0.5, 0.75, 1.0]))
    torch.testing.assert_close(found, torch.tensor([1.0, 1.0, 1.0, (1 - 0.5625) / 0.75, 0.0]))


def test_positive_weight_takes_powers_before_the_product() -> None:
    found = positive_weight(torch.tensor(0.3), torch.tensor(0.7), GAMMA1, GAMMA2)
    x = 0.3**0.4 * 0.7**0.6
    assert float(found) == pytest.approx(sigmoid((x - 1 / 3) * 4.5) / sigmoid(3))


def test_negative_weight_of_a_confident_but_loose_query() -> None:
    x = 0.9**0.4  # the IoU, 0.2^0.6, is below 0.5, so it takes nothing off
    found = negative_weight(torch.tensor(0.9), torch.tensor(0.2), GAMMA1, GAMMA2)
    expected = (sigmoid((x - 1 / 3) * 4.5) - sigmoid(-1.5)) / sigmoid(3)
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_negative_weight_of_a_well_placed_query() -> None:
    y = 0.8**0.6
    x = 0.5**0.4 * (1 - y * y) / 0.75
    found = negative_weight(torch.tensor(0.5), torch.tensor(0.8), GAMMA1, GAMMA2)
    expected = (sigmoid((x - 1 / 3) * 4.5) - sigmoid(-1.5)) / sigmoid(3)
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_a_perfect_query_is_all_positive() -> None:
    one = torch.tensor(1.0)
    assert float(positive_weight(one, one, GAMMA1, GAMMA2)) == pytest.approx(1.0)
    assert float(negative_weight(one, one, GAMMA1, GAMMA2)) == pytest.approx(0.0, abs=1e-6)


def test_ranges() -> None:
    score, iou = torch.rand(2, 1000)
    positive = positive_weight(score, iou, GAMMA1, GAMMA2)
    negative = negative_weight(score, iou, GAMMA1, GAMMA2)
    assert positive.min() > 0.19
    assert positive.max() <= 1
    assert negative.min() > -1e-6
    assert negative.max() < 0.81


def test_weights_carry_no_gradient() -> None:
    score = torch.tensor([0.5], requires_grad=True)
    assert not positive_weight(score, score, GAMMA1, GAMMA2).requires_grad
    assert not negative_weight(score, score, GAMMA1, GAMMA2).requires_grad
