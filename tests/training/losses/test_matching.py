"""Bipartite matching: costs worked out by hand, and what becomes of pairs that do not exist."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch

from asag_deploy.errors import ConfigError
from asag_training.losses.config import MatchingCosts
from asag_training.losses.matching import NO_MATCH, focal_cost, matching_cost, solve, without
from asag_training.network.boxes import overlap, pairwise_overlap

INF = math.inf


def test_overlap_of_two_squares() -> None:
    a, b = torch.tensor([0.0, 0.0, 2.0, 2.0]), torch.tensor([1.0, 1.0, 3.0, 3.0])
    found = overlap(a, b)
    assert float(found.iou) == pytest.approx(1 / 7)
    assert float(found.giou) == pytest.approx(1 / 7 - 2 / 9)


def test_overlap_of_boxes_apart_and_of_boxes_without_area() -> None:
    a, b = torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.tensor([2.0, 0.0, 3.0, 1.0])
    assert overlap(a, b).iou == 0
    assert float(overlap(a, b).giou) == pytest.approx(-1 / 3)
    point = torch.zeros(4)
    assert overlap(point, point).iou == 0
    assert torch.isfinite(overlap(point, point).giou)


def test_pairwise_overlap_is_overlap_of_pairs() -> None:
    corner = torch.rand(2, 3, 2)
    boxes = torch.cat([corner, corner + torch.rand(2, 3, 2)], dim=-1)
    found = pairwise_overlap(boxes, boxes[:, :2])
    assert found.iou.shape == (2, 3, 2)
    torch.testing.assert_close(found.giou[1, 2, 0], overlap(boxes[1, 2], boxes[1, 0]).giou)


def test_focal_cost() -> None:
    p = 0.8
    expected = -0.25 * 0.2**2 * math.log(p) + 0.75 * p**2 * math.log(1 - p)
    assert float(focal_cost(torch.tensor(math.log(p / (1 - p))))) == pytest.approx(expected, rel=1e-4)


def test_cost_is_the_weighted_sum_of_its_parts() -> None:
    logits = torch.zeros(1, 1)
    box, target = torch.tensor([[0.5, 0.5, 0.2, 0.2]]), torch.tensor([[0.6, 0.5, 0.2, 0.4]])
    iou = 0.02 / (0.04 + 0.08 - 0.02)
    giou = iou - (0.12 - 0.10) / 0.12
    focal = (0.25 - 0.75) * 0.25 * math.log(2)
    weight = torch.tensor([3.0])

    found = matching_cost(logits, box, target, weight, MatchingCosts())
    assert float(found) == pytest.approx(3 * (2 * focal + 5 * (0.1 + 0.2) - 2 * giou), rel=1e-5)
    only_l1 = matching_cost(logits, box, target, weight, MatchingCosts(classes=0, l1=1, giou=0))
    assert float(only_l1) == pytest.approx(0.9)


def test_cost_that_is_no_number_stays_finite() -> None:
    box = torch.tensor([[math.nan, 0.5, 0.2, 0.2], [0.5, 0.5, 0.2, 0.2]])
    cost = matching_cost(torch.zeros(2, 1), box, box[1:], torch.ones(1), MatchingCosts())
    assert torch.isfinite(cost).all()
    assert solve([cost])[0].tolist() == [1]


def test_solve_finds_the_cheapest() -> None:
    cost = torch.tensor([[4.0, 1.0, 3.0], [2.0, 0.0, 5.0], [3.0, 2.0, 2.0], [9.0, 9.0, 9.0]])
    (match,) = solve([cost])
    total = sum(float(cost[p, t]) for t, p in enumerate(match.tolist()))
    assert match.dtype == torch.int64
    assert total == min(sum(float(cost[p, t]) for t, p in enumerate(ps)) for ps in permutations(range(4), 3))


def test_solve_leaves_out_what_does_not_exist() -> None:
    cost = without(
        torch.tensor([[0.0, 0.0, 0.0], [5.0, 1.0, 1.0], [1.0, 5.0, 1.0]]),
        predictions=torch.tensor([False, True, True]),
        targets=torch.tensor([True, True, False]),
    )
    assert cost.tolist() == [[INF, INF, INF], [5.0, 1.0, INF], [1.0, 5.0, INF]]
    assert solve([cost])[0].tolist() == [2, 1, NO_MATCH]


def test_more_objects_than_predictions() -> None:
    cost = torch.tensor([[3.0, 1.0, 2.0]])
    assert solve([cost])[0].tolist() == [NO_MATCH, 0, NO_MATCH]


def test_nothing_to_match() -> None:
    nothing = torch.full((2, 3, 4, 5), INF)
    (match,) = solve([nothing])
    assert match.shape == (2, 3, 5)
    assert (match == NO_MATCH).all()
    assert solve([]) == []
    assert solve([torch.zeros(2, 0, 4, 5)])[0].shape == (2, 0, 5)


def test_problems_of_different_shapes_are_solved_apart() -> None:
    a = torch.rand(2, 3, 6, 4)
    b = torch.rand(5, 2, 3)
    found_a, found_b = solve([a, b])
    assert found_a.shape == (2, 3, 4)
    assert found_b.shape == (5, 3)
    for i in range(2):
        for j in range(3):
            assert torch.equal(found_a[i, j], solve([a[i, j]])[0])
    for i in range(5):
        assert torch.equal(found_b[i], solve([b[i]])[0])
        assert sorted(found_b[i].tolist()) == [NO_MATCH, 0, 1]


def test_costs_leave_the_device_together(monkeypatch: pytest.MonkeyPatch) -> None:
    copies = []
    original = torch.Tensor.cpu

    def counted(tensor: torch.Tensor) -> torch.Tensor:
        copies.append(tensor.shape)
        return original(tensor)

    monkeypatch.setattr(torch.Tensor, "cpu", counted)
    solve([torch.rand(4, 6, 3), torch.rand(2, 8, 9, 5), torch.rand(1, 2, 2)])
    assert copies == [(4 * 6 * 3 + 2 * 8 * 9 * 5 + 4,)]


@pytest.mark.parametrize("parts", [(-1.0, 5.0, 2.0), (0.0, 0.0, 0.0)])
def test_impossible_costs_are_refused(parts: tuple[float, float, float]) -> None:
    with pytest.raises(ConfigError, match="matching setting classes"):
        MatchingCosts(classes=parts[0], l1=parts[1], giou=parts[2])
