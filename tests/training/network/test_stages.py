"""The stages one by one, and the loop over them run by PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from asag_deploy.bundle.manifest import Preprocessing
from asag_deploy.loop.probing import Probed, detect
from asag_deploy.loop.stopping import StopRule
from asag_deploy.loop.trace import StopReason
from asag_evaluation.data.doodles import draw_doodles
from asag_training.network.config import MANUAL_STOPS
from asag_training.network.model import Asag, build
from asag_training.network.stage_plan import build_stages, probing_plan
from asag_training.network.stages import DecoderStage, NormalizeStage, TorchNetwork, best_detections
from support.small_network import small_checkpoint


@pytest.fixture(scope="module")
def model() -> Asag:
    checkpoint = small_checkpoint()
    return build(checkpoint.config, checkpoint.state)


def run(
    model: Asag,
    sizes: Sequence[tuple[int, int]],
    *,
    padded: tuple[int, int] | None = None,
    rule: StopRule | None = None,
    levels: str = "p3-p6",
    first: int = 0,
) -> tuple[dict[str, Tensor], Probed]:
    """Probe a batch of scenes of these heights and widths; scene i is drawn from seed `first` + i."""
    height, width = padded or tuple(max(side) for side in zip(*sizes, strict=True))
    pixels = np.zeros((len(sizes), height, width, 3), dtype=np.uint8)
    for i, (h, w) in enumerate(sizes):
        pixels[i, :h, :w] = draw_doodles(h, w, seed=first + i)
    probing = probing_plan(model.config, levels)
    network = TorchNetwork(build_stages(model, probing))
    size = torch.tensor(sizes)
    inputs = {"pixels": torch.from_numpy(pixels), "image_size": size}
    image = network.stage("normalize")(inputs)["image"]
    probed = detect(network, probing, rule or StopRule(), image, size.numpy())
    return probed.outputs, probed


def assert_same_image(outputs: dict[str, Tensor], i: int, others: dict[str, Tensor], j: int) -> None:
    """Image i of one batch and image j of another have the same real queries and detections."""
    count = int(outputs["anchor_count"][i])
    assert int(others["anchor_count"][j]) == count
    for name in ("logits", "boxes", "anchors"):
        torch.testing.assert_close(
            others[name][j, :count], outputs[name][i, :count], atol=1e-3, rtol=1e-4, msg=name
        )
    torch.testing.assert_close(others["det_scores"][j], outputs["det_scores"][i], atol=1e-5, rtol=1e-4)


def test_normalize() -> None:
    preprocessing = Preprocessing(mean=(10.0, 20.0, 30.0), std=(2.0, 4.0, 8.0))
    pixels = torch.randint(0, 256, (2, 6, 7, 3), dtype=torch.uint8)
    (image,) = NormalizeStage(preprocessing)(pixels, torch.tensor([[6, 7], [4, 2]]))
    assert image.shape == (2, 3, 6, 7)
    assert image.dtype == torch.float32
    expected = (pixels.double() - torch.tensor([10, 20, 30])) / torch.tensor([2, 4, 8])
    torch.testing.assert_close(image[0].double(), expected[0].permute(2, 0, 1))
    torch.testing.assert_close(image[1, :, :4, :2].double(), expected[1, :4, :2].permute(2, 0, 1))
    assert not image[1, :, 4:].any()
    assert not image[1, :, :, 2:].any()


def test_best_detections() -> None:
    logits = torch.tensor([[[0.1, 3.0], [2.0, -1.0], [9.0, 9.0]], [[1.0, 0.0], [5.0, 4.0], [8.0, 8.0]]])
    boxes = torch.rand(2, 3, 4)
    valid = torch.tensor([[True, True, False], [True, False, False]])
    scores, labels, corners = best_detections(logits, boxes, valid, 3)
    expected = torch.tensor([[3.0, 2.0, 0.1], [1.0, 0.0, -torch.inf]]).sigmoid()
    torch.testing.assert_close(scores, expected)
    assert labels.tolist()[0] == [1, 0, 0]
    assert labels.tolist()[1][:2] == [0, 1]
    assert labels.dtype == torch.int64
    for image, query in ((0, [0, 1, 0]), (1, [0, 0])):
        cx, cy, w, h = boxes[image, query].unbind(-1)
        xyxy = torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], dim=-1)
        torch.testing.assert_close(corners[image, : len(query)], xyxy)


@pytest.mark.parametrize(("limit", "expected"), [(1, 1), (6, 6), (7, 6), (1000, 6)])
def test_fewer_pairs_than_the_limit(limit: int, expected: int) -> None:
    logits, boxes = torch.randn(2, 3, 2), torch.rand(2, 3, 4)
    scores, labels, corners = best_detections(logits, boxes, torch.ones(2, 3).bool(), limit)
    assert scores.shape == labels.shape == (2, expected)
    assert corners.shape == (2, expected, 4)
    assert (scores.diff(dim=1) <= 0).all()


def test_replaced_anchors_are_those_of_images_that_were_probed(model: Asag) -> None:
    stage = DecoderStage(model, "main", ["P4"])
    scores = torch.tensor([0.05, *[0.3] * 30, *[0.9] * 20])
    p5 = torch.cat([torch.rand(51, 4) * 50 + 20, scores[:, None]], dim=1)
    p5 = torch.cat([p5, torch.zeros(199, 5)]).expand(2, 250, 5)
    p4 = torch.cat([torch.rand(2, 40, 4), torch.full((2, 40, 1), 0.2)], dim=-1)
    p4[1] = 0
    named = {
        "anchors_p5": p5,
        "selected_p5": (p5[..., 4] > 0.1) & (p5[..., 4] < 0.7),
        "anchors_p4": p4,
        "probed": torch.tensor([[True], [False]]),
        "image_size": torch.tensor([[100, 100], [100, 100]]),
        "query_slots": torch.arange(70),
    }
    queries, count = stage.queries(named)
    assert count.tolist() == [20 + 40, 30 + 20]
    torch.testing.assert_close(queries[0, :20], p5[0, 31:51, :4])
    torch.testing.assert_close(queries[0, 20:60], p4[0, :, :4])
    torch.testing.assert_close(queries[1, :50], p5[1, 1:51, :4])


def test_images_that_stop_early_are_as_they_are_alone(model: Asag) -> None:
    sizes = [(320, 416), (2, 2), (300, 200)]  # nothing in an image of two pixels is worth a look
    outputs, probed = run(model, sizes)
    assert probed.probed[:, 0].tolist() == [True, False, True]
    assert probed.stop[1] == StopReason.NOTHING_SELECTED
    assert [int(level.patches[1]) for level in probed.levels] == [5, *[0] * (len(probed.levels) - 1)]
    for i, size in enumerate(sizes):
        alone, alone_probed = run(model, [size], padded=(320, 416), first=i)
        assert alone_probed.stop == [probed.stop[i]]
        assert_same_image(alone, 0, outputs, i)


@pytest.mark.parametrize("levels", MANUAL_STOPS)
def test_batch_is_its_images(model: Asag, levels: str) -> None:
    outputs, probed = run(model, [(240, 320)] * 3, levels=levels)
    assert len(probed.levels) == 1 + len(MANUAL_STOPS[levels])
    for i in range(3):
        alone, alone_probed = run(model, [(240, 320)], levels=levels, first=i)
        assert alone_probed.stop == [probed.stop[i]]
        assert_same_image(alone, 0, outputs, i)


@pytest.mark.parametrize(("max_level", "levels"), [("P5", "p5-p6"), ("P4", "p4-p6")])
def test_a_manual_stop_is_a_network_that_ends_there(model: Asag, max_level: Any, levels: str) -> None:
    sizes = [(240, 320), (200, 150)]
    stopped, probed = run(model, sizes, rule=StopRule(max_level=max_level))
    shorter, _ = run(model, sizes, levels=levels)
    assert probed.levels[-1].level == max_level
    assert probed.stop == [StopReason.MAX_LEVEL] * 2
    for i in range(2):
        assert_same_image(shorter, i, stopped, i)


def test_no_more_patches_than_the_rule_allows(model: Asag) -> None:
    sizes = [(480, 640), (2, 2)]
    _, exact = run(model, sizes)
    asked = int(exact.levels[1].patches[0])
    assert asked > 1
    _, limited = run(model, sizes, rule=StopRule(max_patches=asked - 1))
    level, all_of_it = limited.levels[1], exact.levels[1]
    assert level.patches.tolist() == [asked - 1, 0]
    assert level.patches_dropped.tolist() == [1, 0]
    assert all_of_it.patches_dropped.tolist() == [0, 0]
    # What it does probe are the best of what it would have, and these predict what they would have.
    assert level.origins is not None
    assert all_of_it.origins is not None
    assert torch.equal(level.origins[0, : asked - 1], all_of_it.origins[0, : asked - 1])
    anchors = (asked - 1) * model.config.patch_anchors
    torch.testing.assert_close(level.anchors[0], all_of_it.anchors[0, :anchors], atol=1e-3, rtol=1e-4)


def test_stops_when_few_ask(model: Asag) -> None:
    selected = int(run(model, [(225, 190)])[1].levels[0].counts.selected[0])
    assert selected > 1
    _, enough = run(model, [(225, 190)], rule=StopRule(min_selected=selected))
    assert enough.probed[0, 0]
    _, few = run(model, [(225, 190)], rule=StopRule(min_selected=selected + 1))
    assert few.levels[-1].level == "P5"
    assert few.stop == [StopReason.FEW_SELECTED]


def test_counts_of_a_level(model: Asag) -> None:
    _, probed = run(model, [(240, 320), (2, 2)])
    first, second, third = probed.levels
    for level, following in ((first, "P4"), (second, "P3")):
        anchors, selected = level.anchors, level.selected
        assert selected is not None
        assert torch.equal(selected, model.anchor_generator.select(anchors, following))
        assert level.counts.selected.tolist() == selected.sum(1).tolist()
        passes = model.anchor_generator.passes(anchors)
        floor = model.config.anchor_floor if level is first else 0
        assert level.counts.passing.tolist() == passes.sum(1).clamp(min=floor).tolist()
        remaining = (passes & ~selected).sum(1).clamp(min=floor)
        assert level.counts.passing_if_probed.tolist() == remaining.tolist()
    assert third.selected is None
    assert third.counts.selected.tolist() == third.counts.patches.tolist() == [0, 0]
    assert first.counts.passing[1] == model.config.anchor_floor


def test_torch_network(model: Asag) -> None:
    network = TorchNetwork(build_stages(model, probing_plan(model.config)))
    array = np.arange(6)[::2]
    assert network.download(network.upload(array)).tolist() == [0, 2, 4]
    with pytest.raises(KeyError, match="probe_p2"):
        network.stage("probe_p2")
