"""Network outputs small enough to work their losses out by hand."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from asag_training.losses.config import LossConfig
from asag_training.losses.criterion import Criterion, Losses
from asag_training.losses.network_output import Denoising, LevelOutput, NetworkOutput
from asag_training.losses.targets import Targets
from asag_training.network.model import HeadOutput

KINDS = ("loss_ce", "loss_bbox", "loss_giou")
HEADS = ("aux_0", "main")
SUFFIXES = {"rpn": "_rpn", "aux_0": "_0", "main": ""}
LOW = -20.0
"""A logit that is right about nothing being there."""
SIDE = 480
PATCH_SIZE = 15
"""Images are square, so that a patch is half of one on P4 and a quarter on P3."""


def norm(x: float) -> float:
    return (1 / (1 + math.exp(-(x - 1 / 3) * 4.5))) / (1 / (1 + math.exp(-3)))


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def objects(*boxes: tuple[float, ...], labels: list[int] | None = None) -> Targets:
    return Targets(
        torch.tensor(boxes).reshape(-1, 4), torch.tensor(labels or [0] * len(boxes), dtype=torch.int64)
    )


def level(name: str, raw: Tensor, origins: Tensor | None = None, **more: Any) -> LevelOutput:
    more.setdefault("real", torch.ones(raw.shape[:2], dtype=torch.bool))
    return LevelOutput(name, raw, origins, **more)


def idle(patches: int, anchors: int = 2, batch: int = 1) -> Tensor:
    """Anchors (batch, patches, anchors, 5) in a far corner that claim nothing."""
    raw = torch.tensor([0.02, 0.02, 0.01, 0.01, LOW])
    return raw.repeat(batch, patches, anchors, 1)


def anchor(*values: float) -> Tensor:
    """One patch of one anchor."""
    return torch.tensor(values).view(1, 1, 1, 5)


def head(queries: int = 3, classes: int = 2, batch: int = 1) -> HeadOutput:
    boxes = torch.tensor([0.5, 0.5, 0.2, 0.2]).repeat(batch, queries, 1)
    return HeadOutput(torch.full((batch, queries, classes), LOW), boxes)


def network_output(
    probed: tuple[LevelOutput, ...] = (),
    heads: HeadOutput | None = None,
    valid: Tensor | None = None,
    denoising: Denoising | None = None,
) -> NetworkOutput:
    heads = head() if heads is None else heads
    batch, queries = heads.boxes.shape[:2]
    queries -= denoising.count if denoising else 0
    return NetworkOutput(
        image_size=torch.full((batch, 2), SIDE),
        levels=(
            level("P6", idle(1, batch=batch)),
            level("P5", idle(4, batch=batch)),
            *probed,
        ),
        anchors=torch.full((batch, queries, 4), 100.0),
        valid=torch.ones(batch, queries, dtype=torch.bool) if valid is None else valid,
        relation=heads,
        heads=dict.fromkeys(HEADS, heads),
        denoising=denoising,
    )


def random_output(batch: int = 2, copies: int = 0) -> tuple[NetworkOutput, dict[str, Tensor]]:
    """One of every part, and its leaves by the part they belong to."""

    def leaf(*shape: int, low: float = 0.2, high: float = 0.6) -> Tensor:
        return torch.empty(shape).uniform_(low, high).requires_grad_()

    leaves = {"P6": leaf(batch, 2, 4, 5), "P5": leaf(batch, 4, 4, 5)}
    leaves |= {"P4": leaf(batch, 3, 2, 5), "P3": leaf(batch, 2, 2, 5)}
    for name in SUFFIXES:
        leaves[f"{name} logits"] = leaf(batch, copies + 6, 3, low=-2, high=2)
        leaves[f"{name} boxes"] = leaf(batch, copies + 6, 4)
    made = {name: HeadOutput(leaves[f"{name} logits"], leaves[f"{name} boxes"]) for name in SUFFIXES}
    relation = made.pop("rpn")
    target = torch.arange(copies).expand(batch, -1) % 2
    return NetworkOutput(
        image_size=torch.full((batch, 2), SIDE),
        levels=(
            level("P6", leaves["P6"], flips=((False, False), (True, False))),
            level("P5", leaves["P5"]),
            level("P4", leaves["P4"], torch.randint(0, 15, (batch, 3, 2))),
            level("P3", leaves["P3"], torch.randint(20, 30, (batch, 2, 2))),
        ),
        anchors=torch.rand(batch, 6, 4) * SIDE,
        valid=torch.arange(6).expand(batch, -1) < 5,
        relation=relation,
        heads=made,
        denoising=Denoising(copies, target) if copies else None,
    ), leaves


def several() -> list[Targets]:
    return [
        objects((0.3, 0.3, 0.1, 0.2), (0.7, 0.6, 0.2, 0.1), labels=[2, 0]),
        objects((0.6, 0.6, 0.15, 0.15), (0.25, 0.4, 0.1, 0.1), labels=[1, 1]),
    ]


def losses_of(output: NetworkOutput, targets: list[Targets], **config: Any) -> Losses:
    return Criterion(LossConfig(**config), PATCH_SIZE)(output, targets)


def one_query(logit: float, box: tuple[float, ...]) -> HeadOutput:
    return HeadOutput(torch.tensor([[[logit, LOW]]]), torch.tensor([[box]]))
