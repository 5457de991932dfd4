"""Which cells of the dense peer learn which object."""

from __future__ import annotations

import torch
from torch import Tensor

from asag_bench.light_peers.dense import Cells, DenseDetector
from asag_bench.light_peers.dense_losses import assign, dense_losses
from asag_training.losses.targets import Targets
from asag_training.network.boxes import cxcywh_to_xyxy, iou
from support.small_network import small_config

SIDE = 64


def cells(seed: int = 0) -> Cells:
    """An untrained network's, of one picture, with boxes moved about so that some fit."""
    torch.manual_seed(seed)
    network = DenseDetector(small_config("asag-a-lite-s", num_classes=3)).eval()
    with torch.no_grad():
        found: Cells = network(torch.randn(1, 3, SIDE, SIDE))
    boxes = found.boxes[0] + torch.randn_like(found.boxes[0]) * 3
    boxes[:, 2:] = boxes[:, 2:].abs() + 6
    logits = torch.randn_like(found.logits[0])
    return found._replace(
        logits=logits, objectness=torch.randn(len(logits)), boxes=boxes, offsets=found.offsets[0]
    )


def _batch_of(found: Cells) -> Cells:
    """The same as a batch of one picture."""
    each = (found.logits[None], found.objectness[None], found.boxes[None], found.offsets[None])
    return Cells(*each, found.centres, found.strides)


def naive(found: Cells, objects: Tensor, labels: Tensor) -> dict[int, int]:
    """The same as `assign`, cell by cell, as the paper puts it: which cell learns which object."""
    candidates = []
    for a in range(len(found.centres)):
        x, y = found.centres[a].tolist()
        reach = 2.5 * float(found.strides[a])
        for x1, y1, x2, y2 in objects.tolist():
            inside = x1 < x < x2 and y1 < y < y2
            near = abs(x - (x1 + x2) / 2) < reach and abs(y - (y1 + y2) / 2) < reach
            if inside or near:
                candidates.append(a)
                break
    costs: dict[tuple[int, int], float] = {}
    chosen: dict[int, list[int]] = {}
    for t, (x1, y1, x2, y2) in enumerate(objects.tolist()):
        overlaps = {}
        for a in candidates:
            x, y = found.centres[a].tolist()
            reach = 2.5 * float(found.strides[a])
            inside = x1 < x < x2 and y1 < y < y2
            near = abs(x - (x1 + x2) / 2) < reach and abs(y - (y1 + y2) / 2) < reach
            quality = float(iou(cxcywh_to_xyxy(found.boxes[a : a + 1]), objects[t : t + 1]))
            score = (found.logits[a].sigmoid() * found.objectness[a].sigmoid()).sqrt()
            wanted = torch.nn.functional.one_hot(labels[t], len(score)).float()
            entropy = float(torch.nn.functional.binary_cross_entropy(score, wanted, reduction="sum"))
            overlaps[a] = quality
            costs[a, t] = entropy - 3 * float(torch.log(torch.tensor(quality + 1e-8)))
            costs[a, t] += 0 if inside and near else 1e5
        count = max(1, int(sum(sorted(overlaps.values())[-10:])))
        for a in sorted(candidates, key=lambda a, t=t: costs[a, t])[:count]:  # type: ignore[misc]
            chosen.setdefault(a, []).append(t)
    return {a: min(several, key=lambda t, a=a: costs[a, t]) for a, several in chosen.items()}  # type: ignore[misc]


def test_cells_are_chosen_as_the_paper_says() -> None:
    objects = torch.tensor([[4.0, 4, 30, 28], [10, 8, 34, 40], [40, 40, 47, 46], [2, 2, 62, 62]])
    labels = torch.tensor([0, 2, 1, 1])
    for seed in range(5):
        found = cells(seed)
        chosen, of, quality = assign(found, objects, labels)
        expected = naive(found, objects, labels)
        learns = chosen.nonzero()[:, 0].tolist()
        assert dict(zip(learns, of.tolist(), strict=True)) == expected
        assert set(of.tolist()) == {0, 1, 2, 3}, "every object is learned by some cell"
        boxes = cxcywh_to_xyxy(found.boxes[chosen])
        assert torch.allclose(quality, iou(boxes, objects).gather(1, of[:, None])[:, 0], atol=1e-6)


def test_a_picture_without_objects_teaches_that_there_are_none() -> None:
    found = cells()
    batch = _batch_of(found)
    nothing = Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    losses = dense_losses(batch, [nothing], torch.tensor([[SIDE, SIDE]]))
    assert float(losses["objectness"]) > 0
    assert {name: float(loss) for name, loss in losses.items() if name != "objectness"} == {
        "box": 0.0,
        "box_l1": 0.0,
        "class": 0.0,
    }


def test_what_cells_should_predict_decodes_to_the_objects() -> None:
    """With the offsets that the L1 loss asks for, boxes are the objects and the losses of boxes vanish."""
    from asag_bench.light_peers.dense_losses import _offsets

    found = cells()
    objects = torch.tensor([[20.0, 30, 16, 12]]).expand(len(found.centres), 4)
    offsets = _offsets(objects, found.centres, found.strides)
    scale = found.strides[:, None]
    boxes = torch.cat([found.centres + offsets[:, :2] * scale, offsets[:, 2:].exp() * scale], dim=1)
    assert torch.allclose(boxes, objects, atol=1e-4)
    perfect = _batch_of(found._replace(boxes=boxes, offsets=offsets))
    target = Targets(objects[:1] / SIDE, torch.tensor([1]))
    losses = dense_losses(perfect, [target], torch.tensor([[SIDE, SIDE]]))
    assert float(losses["box"]) < 1e-4
    assert float(losses["box_l1"]) < 1e-4
    assert float(losses["class"]) > 0.01
