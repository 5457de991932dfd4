"""The criterion as a whole: its parts, whom they teach, and what odd batches get."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from asag_deploy.errors import ConfigError
from asag_training.losses.config import LossConfig
from asag_training.losses.criterion import Criterion
from asag_training.losses.network_output import Denoising, NetworkOutput
from asag_training.network.model import HeadOutput
from support.loss_samples import (
    KINDS,
    PATCH_SIZE,
    SUFFIXES,
    losses_of,
    network_output,
    objects,
    one_query,
    random_output,
    several,
)


def test_names_weights_and_total() -> None:
    output, _ = random_output()
    found = losses_of(output, several(), ce=3.0, anchor_l1=7.0)
    assert set(found) == {f"{kind}{suffix}" for kind in KINDS for suffix in ("", "_0", "_rpn", "_anchor")}
    assert found.weights["loss_ce_0"] == 3
    assert found.weights["loss_bbox_anchor"] == 7
    total = sum(found.weights[name] * part.item() for name, part in found.items())
    assert found.total.item() == pytest.approx(total, rel=1e-5)
    host = found.to_host()
    assert host["loss"] == pytest.approx(total, rel=1e-5)
    assert host["avg_anchor"] == 5
    assert 0 < host["iou_anchor"] < 1


def test_each_part_teaches_what_it_should_and_nothing_else() -> None:
    output, leaves = random_output(copies=4)
    found = losses_of(output, several())
    levels = {"P6", "P5", "P4", "P3"}
    for name, part in found.items():
        gradients = torch.autograd.grad(part, list(leaves.values()), retain_graph=True, allow_unused=True)
        reached = {
            leaf
            for leaf, gradient in zip(leaves, gradients, strict=True)
            if gradient is not None and gradient.any()
        }
        if name.endswith("_anchor"):
            assert reached == levels, name
            continue
        (owner,) = [
            owner
            for owner, suffix in SUFFIXES.items()
            if name.removeprefix("dn_") in {k + suffix for k in KINDS}
        ]
        assert reached == {f"{owner} {'logits' if 'loss_ce' in name else 'boxes'}"}, name
        gradient = dict(zip(leaves, gradients, strict=True))[reached.pop()]
        assert gradient is not None
        others = gradient[:, 4:] if name.startswith("dn_") else gradient[:, :4]
        assert not others.any(), name
        assert not gradient[:, -1].any(), "the padding query learns nothing"


def test_anchor_parts_teach_scores_or_boxes() -> None:
    output, leaves = random_output()
    found = losses_of(output, several())
    for kind, taught, spared in (
        ("ce", slice(4, 5), slice(0, 4)),
        ("bbox", slice(0, 4), slice(4, 5)),
        ("giou", slice(0, 4), slice(4, 5)),
    ):
        (gradient,) = torch.autograd.grad(found[f"loss_{kind}_anchor"], leaves["P5"], retain_graph=True)
        assert gradient[..., taught].any()
        assert not gradient[..., spared].any()


@pytest.mark.parametrize("copies", [0, 3])
def test_no_objects_at_all(copies: int) -> None:
    output, leaves = random_output(copies=copies)
    if copies:
        assert output.denoising is not None
        output.denoising.target.fill_(-1)
    found = losses_of(output, [objects(), objects()])
    for name, part in found.items():
        assert torch.isfinite(part)
        assert (part > 0) == ("ce" in name and not name.startswith("dn_")), name
    torch.autograd.backward(found.total)
    for leaf in leaves.values():
        assert leaf.grad is not None
        assert torch.isfinite(leaf.grad).all()
    assert math.isfinite(found.to_host()["iou_anchor"])


def test_a_batch_is_the_mean_of_its_images() -> None:
    """Per object: padding to the most objects, and to the most patches, changes nothing."""
    output, _ = random_output(copies=4)
    targets = [objects((0.3, 0.3, 0.1, 0.2), (0.7, 0.6, 0.2, 0.1), labels=[2, 0]), objects()]
    assert output.denoising is not None
    output.denoising.target[1] = -1
    both = losses_of(output, targets, patch_images=1)
    apart = [losses_of(_image(output, i), [targets[i]], patch_images=1) for i in range(2)]
    for name in both:
        objects_in = (2, 1)  # an image without any is divided by 1
        alone = [part[name] * count for part, count in zip(apart, objects_in, strict=True)]
        expected = (apart[0][name] + apart[1][name]) / 2 if name.startswith("dn_") else sum(alone) / 2
        torch.testing.assert_close(both[name], torch.as_tensor(expected), msg=name)


def _image(output: NetworkOutput, i: int) -> NetworkOutput:
    def cut(head: HeadOutput) -> HeadOutput:
        return HeadOutput(head.logits[i : i + 1], head.boxes[i : i + 1])

    assert output.denoising is not None
    return NetworkOutput(
        image_size=output.image_size[i : i + 1],
        levels=tuple(
            level._replace(
                raw=level.raw[i : i + 1],
                real=level.real[i : i + 1],
                origins=None if level.origins is None else level.origins[i : i + 1],
            )
            for level in output.levels
        ),
        anchors=output.anchors[i : i + 1],
        valid=output.valid[i : i + 1],
        relation=cut(output.relation),
        heads={name: cut(head) for name, head in output.heads.items()},
        denoising=Denoising(output.denoising.count, output.denoising.target[i : i + 1]),
    )


def test_more_objects_than_anchors_and_queries() -> None:
    crowd = objects(*[(0.1 + 0.08 * i, 0.3, 0.05, 0.05) for i in range(10)])
    output, leaves = random_output(batch=1)
    found = losses_of(output, [crowd])
    assert not found.not_finite()
    torch.autograd.backward(found.total)
    gradient = leaves["main boxes"].grad
    assert gradient is not None
    assert gradient[0].any(dim=-1).tolist() == [True] * 5 + [False]


def test_one_copy_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    output, _ = random_output(copies=2)
    copies: list[str] = []
    for method in ("cpu", "item", "tolist", "__bool__", "__int__", "__float__"):
        original = getattr(torch.Tensor, method)

        def counted(tensor: Tensor, *args: Any, _method: str = method, _original: Any = original) -> Any:
            copies.append(_method)
            return _original(tensor, *args)

        monkeypatch.setattr(torch.Tensor, method, counted)
    losses_of(output, several())
    assert copies == ["cpu"]


def test_half_precision_predictions_give_float32_losses() -> None:
    output, _ = random_output()
    half = {name: HeadOutput(h.logits.bfloat16(), h.boxes) for name, h in output.heads.items()}
    found = losses_of(
        NetworkOutput(
            image_size=output.image_size,
            levels=tuple(level._replace(raw=level.raw.bfloat16()) for level in output.levels),
            anchors=output.anchors,
            valid=output.valid,
            relation=output.relation,
            heads=half,
        ),
        several(),
    )
    exact = losses_of(output, several())
    for name, part in found.items():
        assert part.dtype == torch.float32
        assert part.item() == pytest.approx(exact[name].item(), rel=0.05)


def test_a_part_that_is_not_finite_is_named() -> None:
    output, _ = random_output()
    with torch.no_grad():
        output.heads["aux_0"].boxes[0, 1] = math.nan
        output.levels[1].raw[1, 2, 0, 4] = math.nan
    bad = losses_of(output, several()).not_finite()
    assert "loss_ce_anchor" in bad
    assert not {"loss_ce", "loss_bbox", "loss_giou", "loss_bbox_rpn"} & set(bad)


def test_ranks_share_the_number_of_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if another rank had 4 objects more, on an equal number of patches and images."""
    output, _ = random_output()
    alone = losses_of(output, several())

    def all_reduce(sizes: Tensor) -> None:
        sizes.copy_(torch.stack([2 * sizes[0] + 4, 2 * sizes[1], 2 * sizes[2]]))

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    together = losses_of(output, several())
    for name in alone:
        torch.testing.assert_close(together[name], alone[name] * 4 / 6)
    own = Criterion(LossConfig(), PATCH_SIZE)(output, several(), training=False)
    torch.testing.assert_close(own.total, alone.total)


def test_area_weight_can_be_turned_off() -> None:
    output = network_output(heads=one_query(0.5, (0.5, 0.5, 0.2, 0.4)))
    target = [objects((0.5, 0.5, 0.4, 0.4))]
    weighted, flat = losses_of(output, target), losses_of(output, target, area_weight=1.0)
    torch.testing.assert_close(weighted["loss_giou"], flat["loss_giou"] * (4 - 3 * 0.4))


@pytest.mark.parametrize(
    "bad",
    [
        {"ce": -1.0},
        {"gamma1": -0.1},
        {"area_weight": 0.5},
        {"ignore_iou": 0.0},
        {"patch_images": 0.0},
    ],
)
def test_settings_that_make_no_sense(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        LossConfig(**bad)


def test_changing_settings() -> None:
    assert LossConfig().with_changes(giou=3.0).giou == 3
    with pytest.raises(ConfigError, match="unknown loss setting 'gious'"):
        LossConfig().with_changes(gious=3.0)
