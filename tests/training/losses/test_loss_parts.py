"""No part of the loss can go missing: each is asked for alone, by name, weight and whom it teaches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from asag_training.losses.config import LossConfig
from support.loss_samples import losses_of, random_output, several
from support.training_runs import make_loader, make_trainer, tiny_recipe, write_pictures

COPIES = 4
QUERY_KINDS = {"ce": "loss_ce", "l1": "loss_bbox", "giou": "loss_giou"}
OWNERS = {"main": "", "aux_0": "_0", "rpn": "_rpn"}
WEIGHTS = {
    "loss_ce": 2.0,
    "loss_bbox": 5.0,
    "loss_giou": 2.0,
    "loss_ce_anchor": 8.0,
    "loss_bbox_anchor": 4.0,
    "loss_giou_anchor": 2.0,
}
"""As published; `dn_` parts and those of every head weigh what the main decoder's do."""
ALL_OFF = dict.fromkeys(("ce", "l1", "giou", "anchor_ce", "anchor_l1", "anchor_giou"), 0.0)


def weight_of(part: str) -> float:
    name = part.removeprefix("dn_")
    for suffix in OWNERS.values():
        name = name.removesuffix(suffix) if suffix else name
    return WEIGHTS[name]


def expected_parts(denoising: bool) -> set[str]:
    queries = {f"{kind}{suffix}" for kind in QUERY_KINDS.values() for suffix in OWNERS.values()}
    anchors = {f"{kind}_anchor" for kind in QUERY_KINDS.values()}
    return queries | anchors | ({f"dn_{name}" for name in queries} if denoising else set())


def total_gradients(**weights: float) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """The total under these weights (all others 0), the parts, and the gradients by leaf."""
    torch.manual_seed(0)
    output, leaves = random_output(copies=COPIES)
    found = losses_of(output, several(), **{**ALL_OFF, **weights})
    torch.autograd.backward(found.total)
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return found.total.detach(), {name: part.detach() for name, part in found.items()}, gradients


@pytest.mark.parametrize("owner", list(OWNERS))
@pytest.mark.parametrize("kind", list(QUERY_KINDS))
@pytest.mark.parametrize("denoising", [False, True])
def test_each_part_of_each_head_is_in_the_total(owner: str, kind: str, denoising: bool) -> None:
    """The total's own gradient at a head's denoising queries, or at the others, comes from one part alone."""
    _, parts, gradients = total_gradients(**{kind: 3.0})
    rows = slice(0, COPIES) if denoising else slice(COPIES, None)
    leaf = f"{owner} {'logits' if kind == 'ce' else 'boxes'}"
    other = f"{owner} {'boxes' if kind == 'ce' else 'logits'}"
    found = gradients[leaf][:, rows]
    assert found.any()
    assert not gradients[other].any()

    name = f"{'dn_' if denoising else ''}{QUERY_KINDS[kind]}{OWNERS[owner]}"
    torch.manual_seed(0)
    output, leaves = random_output(copies=COPIES)
    alone = losses_of(output, several())[name]
    (gradient,) = torch.autograd.grad(alone, leaves[leaf])
    torch.testing.assert_close(found, 3 * gradient[:, rows])
    assert parts[name] > 0


@pytest.mark.parametrize(("kind", "taught"), [("ce", slice(4, 5)), ("l1", slice(4)), ("giou", slice(4))])
def test_each_part_of_the_anchors_is_in_the_total(kind: str, taught: slice) -> None:
    total, parts, gradients = total_gradients(**{f"anchor_{kind}": 3.0})
    part = parts[f"{QUERY_KINDS[kind]}_anchor"]
    assert part > 0
    torch.testing.assert_close(total, 3 * part)
    for level in ("P6", "P5", "P4", "P3"):
        assert gradients[level][..., taught].any(), level
    assert not any(gradient.any() for name, gradient in gradients.items() if " " in name)


@pytest.mark.parametrize("denoising", [False, True])
def test_the_total_is_the_weighted_sum_of_all_parts(denoising: bool) -> None:
    output, _ = random_output(copies=COPIES if denoising else 0)
    found = losses_of(output, several())
    assert set(found) == expected_parts(denoising)
    contributions = {name: weight_of(name) * part.item() for name, part in found.items()}
    assert found.total.item() == pytest.approx(sum(contributions.values()), rel=1e-5)
    # Were one left out, the sums above could not agree.
    assert min(contributions.values()) > 1e-3 * found.total.item()


def test_the_weights_are_the_published_ones() -> None:
    config = LossConfig()
    assert {
        "loss_ce": config.ce,
        "loss_bbox": config.l1,
        "loss_giou": config.giou,
        "loss_ce_anchor": config.anchor_ce,
        "loss_bbox_anchor": config.anchor_l1,
        "loss_giou_anchor": config.anchor_giou,
    } == WEIGHTS


def test_what_an_update_minimises_is_the_weighted_sum_of_all_parts(tmp_path: Path) -> None:
    """In the training loop itself, with a whole network."""
    data = write_pictures(tmp_path / "data", count=4)
    trainer = make_trainer(data, tmp_path / "run", tiny_recipe())
    rows: list[Any] = []
    trainer.train_epoch(make_loader(data, trainer.recipe), rows.append)
    names = expected_parts(denoising=True)
    assert names <= set(rows[0])
    assert rows[0]["loss"] == pytest.approx(sum(weight_of(n) * rows[0][n] for n in names), rel=1e-4)


TEACHERS = {
    "loss.ce": {"rpn.fc_cls", "decoder.bbox_head.0.fc_cls", "decoder.bbox_head.1.fc_cls"},
    "loss.l1": {"rpn.fc_reg", "decoder.bbox_head.0.fc_reg", "decoder.bbox_head.1.fc_reg"},
    "loss.giou": {"rpn.fc_reg", "decoder.bbox_head.0.fc_reg", "decoder.bbox_head.1.fc_reg"},
    "loss.anchor_ce": {"anchor_generator.proj_all.layers.2", "anchor_generator.proj_patch.layers.2"},
    "loss.anchor_l1": {"anchor_generator.proj_all.layers.2", "anchor_generator.proj_patch.layers.2"},
    "loss.anchor_giou": {"anchor_generator.proj_all.layers.2", "anchor_generator.proj_patch.layers.2"},
}
"""By the one loss that is left: the last layers that learn from it.  No other last layer does."""


@pytest.mark.parametrize("left", list(TEACHERS))
def test_each_loss_teaches_its_own_last_layers_in_the_training_loop(tmp_path: Path, left: str) -> None:
    data = write_pictures(tmp_path / "data", count=4)
    off = [f"{name}=0.0" for name in TEACHERS if name != left]
    trainer = make_trainer(data, tmp_path / "run", tiny_recipe(*off))
    learned: set[str] = set()

    def note(*_: Any) -> None:
        named = trainer.model.named_parameters()
        learned.update(n.rpartition(".")[0] for n, p in named if p.grad is not None and p.grad.any())

    trainer.optimizer.register_step_pre_hook(note)
    trainer.train_epoch(make_loader(data, trainer.recipe))
    last_layers = set().union(*TEACHERS.values())
    assert learned & last_layers == TEACHERS[left]
