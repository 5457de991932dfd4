"""The losses of the anchor generator, and what each patch is to find, worked out by hand."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from asag_training.losses.network_output import LevelOutput, NetworkOutput
from asag_training.losses.targets import area_weight, pad_targets, patch_targets
from support.loss_samples import (
    KINDS,
    SIDE,
    anchor,
    idle,
    level,
    losses_of,
    network_output,
    norm,
    objects,
    softplus,
)


def test_area_weights() -> None:
    boxes = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.5, 0.5, 0.25, 1.0], [0.5, 0.5, 1.0, 1.0]])
    assert area_weight(boxes, 4).tolist() == [4.0, 2.5, 1.0]
    assert area_weight(boxes, 4, large_first=True).tolist() == [1.0, 2.5, 4.0]
    assert area_weight(boxes, 1).tolist() == [1.0, 1.0, 1.0]


def only_p6(raw: Tensor, flips: tuple[tuple[bool, bool], ...] | None = None) -> NetworkOutput:
    """The patches of P5 do not count."""
    idle_p5 = idle(4, anchors=raw.shape[2])
    missing = torch.zeros(1, 4, dtype=torch.bool)
    levels = (level("P6", raw, flips=flips), level("P5", idle_p5, real=missing))
    return dataclasses.replace(network_output(), levels=levels)


def test_p6_losses_by_hand() -> None:
    logit, other = 0.2, -0.7
    raw = torch.cat([anchor(0.5, 0.5, 0.2, 0.4, logit), anchor(0.1, 0.1, 0.1, 0.1, other)], dim=2)
    found = losses_of(only_p6(raw), [objects((0.5, 0.5, 0.4, 0.4))])

    score, iou, area = 1 / (1 + math.exp(-logit)), 0.5, 1 + 3 * 0.4
    w_pos = norm(score**0.4 * iou**0.6)
    matched = (iou * softplus(-logit) + (1 - iou) * softplus(logit)) * (iou - score) ** 2 * area
    unmatched = softplus(other) / (1 + math.exp(-other)) ** 2
    assert float(found["loss_ce_anchor"]) == pytest.approx(matched + unmatched, rel=1e-4)
    assert float(found["loss_bbox_anchor"]) == pytest.approx(area * w_pos * 0.2, rel=1e-4)
    assert float(found["loss_giou_anchor"]) == pytest.approx(area * w_pos * 0.5, rel=1e-4)
    assert found.statistics["iou_anchor"].item() == pytest.approx(0.5)

    flat = losses_of(only_p6(raw), [objects((0.5, 0.5, 0.4, 0.4))], query_weighting=False)
    assert float(flat["loss_bbox_anchor"]) == pytest.approx(area * 0.2, rel=1e-4)
    torch.testing.assert_close(flat["loss_ce_anchor"], found["loss_ce_anchor"])


def test_anchors_are_class_agnostic() -> None:
    boxes = ((0.3, 0.3, 0.1, 0.1), (0.7, 0.7, 0.2, 0.2))
    output = only_p6(torch.rand(1, 1, 4, 5))
    found, other = (losses_of(output, [objects(*boxes, labels=labels)]) for labels in ([0, 1], [1, 1]))
    for kind in KINDS:
        assert found[f"{kind}_anchor"] == other[f"{kind}_anchor"]


@pytest.mark.parametrize(("width", "taught"), [(0.21, True), (0.19, False)])
def test_unmatched_anchors_on_an_object_are_not_taught_to_score_low(width: float, taught: bool) -> None:
    """The object is 0.1 wide, so its IoU with the second anchor, matched to nothing, is 0.1 / width."""
    raw = torch.tensor([[0.7, 0.7, 0.1, 0.1, 2.0], [0.7, 0.7, width, 0.1, 0.0]]).view(1, 1, 2, 5)
    raw = raw.clone().requires_grad_()
    found = losses_of(only_p6(raw), [objects((0.7, 0.7, 0.1, 0.1))])
    torch.autograd.backward(found["loss_ce_anchor"])
    assert raw.grad is not None
    assert bool(raw.grad[0, 0, 1, 4] != 0) == taught
    assert raw.grad[0, 0, 0, 4] != 0


def test_patches_of_p5_have_the_objects_whose_centre_they_hold() -> None:
    targets = pad_targets([objects((0.25, 0.25, 0.1, 0.2), (0.9, 0.4, 0.4, 0.1))], torch.device("cpu"))
    found = patch_targets(level("P5", idle(4)), targets, torch.tensor([[SIDE, SIDE]]), 15, 4.0)
    assert found.present[0].tolist() == [[True, False], [False, True], [False, False], [False, False]]
    torch.testing.assert_close(found.boxes[0, 0, 0], torch.tensor([0.5, 0.5, 0.2, 0.4]))
    # Cut at 0.7 and 1, it is centred at 0.85: 0.7 of the top right patch.
    torch.testing.assert_close(found.boxes[0, 1, 1], torch.tensor([0.7, 0.8, 0.6, 0.2]))
    torch.testing.assert_close(found.weight[0, 0, 0], torch.tensor(4 - 3 * math.sqrt(0.08)))


def test_probed_patches_have_objects_no_larger_than_they_are() -> None:
    targets = pad_targets(
        [objects((0.6, 0.6, 0.1, 0.1), (0.6, 0.6, 0.3, 0.1), (0.2, 0.2, 0.1, 0.1))], torch.device("cpu")
    )
    origins = torch.tensor([[[30, 30], [30, 30], [0, 0]]])  # a patch of P3 is a quarter of the image
    real = torch.tensor([[True, False, True]])
    probed = level("P3", idle(3), origins, real=real)
    found = patch_targets(probed, targets, torch.tensor([[SIDE, SIDE]]), 15, 4.0)
    assert found.present[0].tolist() == [[True, False, False], [False] * 3, [False, False, True]]
    torch.testing.assert_close(found.boxes[0, 0, 0], torch.tensor([0.4, 0.4, 0.4, 0.4]))


def test_patches_of_wide_images() -> None:
    targets = pad_targets([objects((0.5, 0.5, 0.1, 0.1))], torch.device("cpu"))
    probed = level("P4", idle(1), torch.tensor([[[15, 0]]]))  # x from 240 to 480, y from 0 to 240
    found = patch_targets(probed, targets, torch.tensor([[320, 640]]), 15, 4.0)
    torch.testing.assert_close(found.boxes[0, 0, 0], torch.tensor([80 / 240, 160 / 240, 64 / 240, 32 / 240]))


def test_objects_flip_with_p6() -> None:
    boxes = ((0.2, 0.3, 0.1, 0.2), (0.6, 0.8, 0.3, 0.1))
    raw = torch.rand(1, 1, 6, 5) * 0.5
    flips = ((False, False), (True, False), (False, True), (True, True))
    plain = losses_of(only_p6(raw, None), [objects(*boxes)])
    for flip in flips:
        mirrored = raw.clone()
        for axis in range(2):
            if flip[axis]:
                mirrored[..., axis] = 1 - mirrored[..., axis]
        found = losses_of(only_p6(mirrored, (flip,)), [objects(*boxes)])
        for kind in KINDS:
            torch.testing.assert_close(found[f"{kind}_anchor"], plain[f"{kind}_anchor"])
        if any(flip):
            unflipped = losses_of(only_p6(raw, (flip,)), [objects(*boxes)])
            assert unflipped["loss_bbox_anchor"] != pytest.approx(float(plain["loss_bbox_anchor"]))


def probed(patches: int, real: int | None = None) -> LevelOutput:
    """Copies of one patch of P4, in the middle of the image."""
    raw = torch.tensor([[0.4, 0.5, 0.3, 0.3, 0.5], [0.8, 0.8, 0.1, 0.1, -0.5]]).expand(1, patches, 2, 5)
    exist = torch.arange(patches)[None] < (patches if real is None else real)
    return level("P4", raw, torch.full((1, patches, 2), 7), real=exist)


def test_probed_patches_count_as_four_however_many_there_are() -> None:
    target = [objects((0.5, 0.5, 0.2, 0.1))]
    without = losses_of(network_output(), target)
    one, three, padded = (
        losses_of(network_output(probed=(patches,)), target)
        for patches in (probed(1), probed(3), probed(5, 2))
    )
    for kind in KINDS:
        name = f"{kind}_anchor"
        assert one[name] > without[name]
        torch.testing.assert_close(three[name], one[name])
        torch.testing.assert_close(padded[name], one[name])
    assert padded.statistics["avg_patch_P4"].item() == 2
    assert padded.statistics["avg_patch_P3"].item() == 0
    assert padded.statistics["avg_patch"].item() == 6


def test_patch_images_says_how_many_images_the_patches_are_counted_over() -> None:
    target = [objects((0.5, 0.5, 0.2, 0.1))]
    none = losses_of(network_output(), target)["loss_giou_anchor"]
    one = losses_of(network_output(probed=(probed(3),)), target)["loss_giou_anchor"]
    two = losses_of(network_output(probed=(probed(3),)), target, patch_images=2)["loss_giou_anchor"]
    torch.testing.assert_close(two - none, (one - none) / 2)


def test_no_patch_exists() -> None:
    target = [objects((0.5, 0.5, 0.2, 0.1))]
    without = losses_of(network_output(), target)
    for empty in (
        probed(2, 0),
        level("P4", torch.zeros(1, 0, 2, 5), torch.zeros(1, 0, 2, dtype=torch.int64)),
    ):
        found = losses_of(network_output(probed=(empty,)), target)
        assert found.to_host() == without.to_host()
