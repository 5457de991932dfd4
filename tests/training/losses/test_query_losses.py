"""The losses of relation block, decoders and denoising, worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from asag_training.losses.network_output import Denoising, NetworkOutput
from asag_training.network.model import HeadOutput
from support.loss_samples import (
    KINDS,
    LOW,
    SUFFIXES,
    head,
    losses_of,
    network_output,
    norm,
    objects,
    one_query,
    softplus,
)


def test_query_losses_by_hand() -> None:
    logit, w, h = 0.5, 0.2, 0.4
    output = network_output(heads=one_query(logit, (0.5, 0.5, w, h)))
    found = losses_of(output, [objects((0.5, 0.5, 0.4, 0.4))])

    score, iou = 1 / (1 + math.exp(-logit)), 0.5
    area = 4 - 3 * 0.4
    w_pos = norm(score**0.4 * iou**0.6)
    x = iou**0.6
    w_neg = norm(score**0.4 * (1 - x * x) / 0.75) - norm(0)
    for suffix in SUFFIXES.values():
        assert float(found[f"loss_ce{suffix}"]) == pytest.approx(
            area * (w_pos * softplus(-logit) + w_neg * softplus(logit)), rel=1e-4
        )
        assert float(found[f"loss_bbox{suffix}"]) == pytest.approx(area * w_pos * 0.2, rel=1e-4)
        assert float(found[f"loss_giou{suffix}"]) == pytest.approx(area * w_pos * 0.5, rel=1e-4)
    assert found.statistics["avg_pos_weight"].item() == pytest.approx(w_pos, rel=1e-4)
    assert found.statistics["avg_neg_weight_rpn"].item() == pytest.approx(w_neg, rel=1e-4)
    assert found.statistics["class_error"].item() == 0


def test_without_query_weighting_queries_have_focal_loss() -> None:
    logit = 0.5
    output = network_output(heads=one_query(logit, (0.5, 0.5, 0.2, 0.4)))
    found = losses_of(output, [objects((0.5, 0.5, 0.4, 0.4))], query_weighting=False)
    area, p = 4 - 3 * 0.4, 1 / (1 + math.exp(-logit))
    assert float(found["loss_ce"]) == pytest.approx(area * 0.25 * (1 - p) ** 2 * softplus(-logit), rel=1e-4)
    assert float(found["loss_bbox"]) == pytest.approx(area * 0.2, rel=1e-4)
    nothing = losses_of(output, [objects()], query_weighting=False)
    assert float(nothing["loss_ce"]) == pytest.approx(0.75 * p**2 * softplus(logit), rel=1e-4)


def test_negatives_count_by_their_squared_score() -> None:
    logit = -1.0
    found = losses_of(network_output(heads=one_query(logit, (0.5, 0.5, 0.2, 0.4))), [objects()])
    p = 1 / (1 + math.exp(-logit))
    assert float(found["loss_ce"]) == pytest.approx(p * p * softplus(logit), rel=1e-4)
    assert found.statistics["class_error"].item() == 100


def test_padding_queries_count_for_nothing() -> None:
    valid = torch.tensor([[True, True, False]])
    target = [objects((0.3, 0.3, 0.2, 0.2))]
    plain = losses_of(network_output(valid=valid), target)
    tempting = head()
    tempting.logits[0, 2] = 9.0
    tempting.boxes[0, 2] = torch.tensor([0.3, 0.3, 0.2, 0.2])
    assert dict(losses_of(network_output(heads=tempting, valid=valid), target)) == dict(plain)
    assert losses_of(network_output(heads=tempting), target)["loss_bbox"] < plain["loss_bbox"]


def test_class_error_of_a_query_that_prefers_another_class() -> None:
    predictions = head(queries=2)
    predictions.logits[0, :] = torch.tensor([[1.0, 2.0], [1.0, -1.0]])
    predictions.boxes[0] = torch.tensor([[0.2, 0.2, 0.1, 0.1], [0.7, 0.7, 0.1, 0.1]])
    target = [objects((0.2, 0.2, 0.1, 0.1), (0.7, 0.7, 0.1, 0.1), labels=[0, 0])]
    assert losses_of(network_output(heads=predictions), target).statistics["class_error"].item() == 50


def test_divided_by_the_number_of_objects() -> None:
    once = losses_of(network_output(heads=head(batch=1)), [objects((0.3, 0.3, 0.2, 0.2))])
    alone = losses_of(network_output(heads=head(batch=2)), [objects((0.3, 0.3, 0.2, 0.2)), objects()])
    twice = losses_of(network_output(heads=head(batch=2)), [objects((0.3, 0.3, 0.2, 0.2))] * 2)
    for name in ("loss_bbox", "loss_giou", "loss_bbox_anchor"):
        torch.testing.assert_close(alone[name], once[name])
        torch.testing.assert_close(twice[name], once[name])


def denoised(boxes: list[list[float]], target: list[int], logit: float = 0.5) -> NetworkOutput:
    """Denoising queries before two that were made from anchors."""
    anchors = head(queries=2)
    count = len(boxes)
    logits = torch.full((1, count, 2), LOW)
    logits[0, :, 0] = logit
    heads = HeadOutput(
        torch.cat([logits, anchors.logits], dim=1), torch.cat([torch.tensor([boxes]), anchors.boxes], dim=1)
    )
    return network_output(heads=heads, denoising=Denoising(count, torch.tensor([target])))


def test_denoising_queries_answer_for_their_own_objects() -> None:
    target = [objects((0.5, 0.5, 0.4, 0.4), (0.2, 0.2, 0.1, 0.1))]
    boxes = [[0.2, 0.2, 0.1, 0.1], [0.5, 0.5, 0.2, 0.4]]
    crossed = losses_of(denoised(boxes, [0, 1]), target)
    own = losses_of(denoised(boxes, [1, 0]), target)
    score, area = 1 / (1 + math.exp(-0.5)), 4 - 3 * 0.4
    w_pos = norm(score**0.4 * 0.5**0.6)
    for suffix in SUFFIXES.values():
        # The first query is where its object is; sums are divided by the number of queries.
        assert float(own[f"dn_loss_bbox{suffix}"]) == pytest.approx(area * w_pos * 0.2 / 2, rel=1e-4)
        assert crossed[f"dn_loss_bbox{suffix}"] > own[f"dn_loss_bbox{suffix}"]
        assert crossed[f"loss_bbox{suffix}"] == own[f"loss_bbox{suffix}"]


def test_the_matching_does_not_see_denoising_queries() -> None:
    target = [objects((0.3, 0.3, 0.2, 0.2))]
    without = losses_of(network_output(heads=head(queries=2)), target)
    found = losses_of(denoised([[0.3, 0.3, 0.2, 0.2]] * 3, [0, 0, 0]), target)
    for name, value in without.items():
        torch.testing.assert_close(found[name], value)
    assert len(found) == len(without) + 9
    assert found.weights["dn_loss_ce_rpn"] == 2


def test_denoising_queries_that_fill_up_count_for_nothing() -> None:
    target = [objects((0.3, 0.3, 0.2, 0.2))]
    boxes = [[0.3, 0.3, 0.2, 0.3], [0.5, 0.5, 1.0, 1.0]]
    found = losses_of(denoised(boxes, [0, -1]), target)
    alone = losses_of(denoised(boxes[:1], [0]), target)
    for kind in KINDS:
        torch.testing.assert_close(found[f"dn_{kind}"], alone[f"dn_{kind}"] / 2)


def test_denoising_of_an_image_without_objects() -> None:
    found = losses_of(denoised([[0.5, 0.5, 1.0, 1.0]] * 2, [-1, -1]), [objects()])
    assert all(found[f"dn_{kind}"] == 0 for kind in KINDS)
