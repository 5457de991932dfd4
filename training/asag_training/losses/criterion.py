"""The whole loss of a training step, from what the network gave out.

To add a loss term, compute its sum in `asag_training.losses.queries` or `asag_training.losses.anchors`, give
it a weight in `LossConfig`, and list it in `QUERY_TERMS` or `ANCHOR_TERMS` here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from asag_training.losses.anchors import AnchorLosses, Patches, anchor_cost, anchor_losses, gather_patches
from asag_training.losses.config import LossConfig
from asag_training.losses.matching import solve
from asag_training.losses.network_output import NetworkOutput
from asag_training.losses.queries import (
    Predictions,
    QueryLosses,
    denoising_targets,
    query_cost,
    query_losses,
)
from asag_training.losses.targets import PaddedTargets, Targets, pad_targets
from asag_training.network.config import MAIN_HEAD
from asag_training.network.model import HeadOutput

QUERY_TERMS = {"loss_ce": ("ce", "ce"), "loss_bbox": ("l1", "l1"), "loss_giou": ("giou", "giou")}
"""Each part of the loss of relation block, decoders and denoising: its field in `QueryLosses`, and its weight
in `LossConfig`."""
ANCHOR_TERMS = {
    "loss_ce_anchor": ("ce", "anchor_ce"),
    "loss_bbox_anchor": ("l1", "anchor_l1"),
    "loss_giou_anchor": ("giou", "anchor_giou"),
}
"""Each part of the loss of the anchor generator: its field in `AnchorLosses`, its weight in `LossConfig`."""

RELATION = "rpn"
_FIRST_LEVEL = ("P6", "P5")
_PATCHES_PER_LEVEL = 4


class _Sizes(NamedTuple):
    """The divisors of the sums: scalars on the device, each the mean over ranks."""

    targets: Tensor
    """Objects, at least 1."""
    patches: Tensor
    """Patches of P4 and P3."""
    images: Tensor


class Losses(Mapping[str, Tensor]):
    """The parts of the loss by name, before their weights: a read-only mapping of scalars.

    `loss_ce`, `loss_bbox` (L1) and `loss_giou` of the main decoder; `*_0`, `*_1`, ... of the auxiliary ones,
    `*_rpn` of the relation block, `*_anchor` of the anchor generator; `dn_loss_*` likewise of denoising.
    Where decoders have several layers, `*_layer_0`, ... and `*_0_layer_0`, ... of those before the last.
    """

    def __init__(
        self, parts: Mapping[str, Tensor], weights: Mapping[str, float], statistics: Mapping[str, Tensor]
    ) -> None:
        """Take the parts, each of which needs a weight."""
        self.parts = dict(parts)
        self.weights = {name: weights[name] for name in parts}
        """What each part is multiplied by in `total`."""
        self.statistics = dict(statistics)
        """Scalars worth watching, detached and on the device: `avg_anchor`, `avg_patch`, `iou_anchor`, ..."""
        self.total = torch.stack([self.weights[name] * part for name, part in self.parts.items()]).sum()
        """The scalar to minimise."""

    def __getitem__(self, name: str) -> Tensor:
        return self.parts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)

    def to_host(self) -> dict[str, float]:
        """Return total, parts and statistics as numbers, in one copy from the device."""
        named = {"loss": self.total, **self.parts, **self.statistics}
        values = torch.stack([value.detach().float() for value in named.values()]).tolist()
        return dict(zip(named, values, strict=True))

    def not_finite(self) -> list[str]:
        """Return the names of the parts that are infinite or not a number (one copy from the device)."""
        finite = torch.isfinite(torch.stack([part.detach() for part in self.parts.values()])).tolist()
        return [name for name, fine in zip(self.parts, finite, strict=True) if not fine]


class Criterion:
    """Matches predictions with objects and weighs how far they are from them."""

    def __init__(self, config: LossConfig, patch_size: int) -> None:
        """Take the settings; patch_size is the side of a patch in feature cells, as the network has it."""
        self.config, self.patch_size = config, patch_size

    def __call__(self, output: NetworkOutput, targets: Sequence[Targets], training: bool = True) -> Losses:
        """Compute the losses of a batch, with one copy from the device to the host.

        `training` says that every rank computes losses at the same time, so that sums can be divided by the
        number of objects over all of them; without it a rank minds only its own.  Whether patches were
        flipped, and whether there are denoising queries, `output` says itself.
        """
        found = pad_targets(targets, output.anchors.device)
        first, probed = self._patches(output, found)
        heads = {RELATION: output.relation, **output.heads}
        queries = _stack(list(heads.values()), output)
        costs = [query_cost(queries, found, self.config)]
        costs += [anchor_cost(patches, self.config) for patches in (first, probed) if patches is not None]

        match, *anchor_matches = solve(costs)
        of_queries = query_losses(queries, found, match, self.config)
        of_first = anchor_losses(first, anchor_matches[0], self.config)
        of_probed = None if probed is None else anchor_losses(probed, anchor_matches[1], self.config)

        sizes = _sizes(found, probed, training)
        parts, weights = self._query_parts(list(heads), of_queries, sizes.targets, "")
        self._add_anchor_parts(parts, weights, of_first, of_probed, sizes)
        if output.denoising is not None and output.denoising.count > 0:
            of_noised = self._denoising(output, list(heads.values()), found)
            queries_in_all = output.denoising.count * sizes.images
            noised = self._query_parts(list(heads), of_noised, queries_in_all, "dn_")
            parts.update(noised[0])
            weights.update(noised[1])

        statistics = _query_statistics(list(heads), of_queries)
        statistics["iou_anchor"] = _mean_iou(output, of_first, of_probed)
        statistics.update(_counts(output))
        return Losses(parts, weights, statistics)

    def _patches(self, output: NetworkOutput, found: PaddedTargets) -> tuple[Patches, Patches | None]:
        """Gather the patches of the first level, and those of the probed ones if any was run."""
        first = [level for level in output.levels if level.level in _FIRST_LEVEL]
        probed = [level for level in output.levels if level.level not in _FIRST_LEVEL]
        given = (found, output.image_size.to(found.boxes.device), self.patch_size, self.config.area_weight)
        return gather_patches(first, *given), gather_patches(probed, *given) if probed else None

    def _query_parts(
        self, heads: list[str], losses: QueryLosses, divisor: Tensor, prefix: str
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return parts and weights by name, head by head."""
        parts, weights = {}, {}
        for term, (field, weight) in QUERY_TERMS.items():
            sums: Tensor = getattr(losses, field)
            for head, value in zip(heads, (sums / divisor).unbind(), strict=True):
                name = f"{prefix}{term}{_suffix(head)}"
                parts[name], weights[name] = value, getattr(self.config, weight)
        return parts, weights

    def _add_anchor_parts(
        self,
        parts: dict[str, Tensor],
        weights: dict[str, float],
        first: AnchorLosses,
        probed: AnchorLosses | None,
        sizes: _Sizes,
    ) -> None:
        config = self.config
        # A level of few patches counts as much as one of many.
        images = sizes.images if config.patch_images is None else config.patch_images
        patches = sizes.patches / sizes.images * images
        scale = _PATCHES_PER_LEVEL / torch.where(patches > 0, patches, 1.0)
        for term, (field, weight) in ANCHOR_TERMS.items():
            total: Tensor = getattr(first, field)
            if probed is not None:
                total = total + scale * getattr(probed, field)
            parts[term], weights[term] = total / sizes.targets, getattr(config, weight)

    def _denoising(self, output: NetworkOutput, heads: list[HeadOutput], found: PaddedTargets) -> QueryLosses:
        """Compute the losses of the denoising queries, each with the object it is a noised copy of."""
        assert output.denoising is not None
        own, match = denoising_targets(output.denoising, found, len(heads))
        count = output.denoising.count
        noised = Predictions(
            logits=torch.stack([head.logits[:, :count].float() for head in heads]),
            boxes=torch.stack([head.boxes[:, :count].float() for head in heads]),
            valid=own.present,
        )
        return query_losses(noised, own, match, self.config)


def _stack(heads: list[HeadOutput], output: NetworkOutput) -> Predictions:
    """Stack all heads' predictions for the anchors, without the denoising queries before them."""
    begin = 0 if output.denoising is None else output.denoising.count
    return Predictions(
        logits=torch.stack([head.logits[:, begin:].float() for head in heads]),
        boxes=torch.stack([head.boxes[:, begin:].float() for head in heads]),
        valid=output.valid,
    )


def _sizes(found: PaddedTargets, probed: Patches | None, across_ranks: bool) -> _Sizes:
    targets = found.present.sum()
    patches = torch.zeros_like(targets) if probed is None else probed.real.sum()
    images = torch.full_like(targets, len(found.present))
    sizes = torch.stack([targets, patches, images]).float()
    if across_ranks and dist.is_available() and dist.is_initialized():
        dist.all_reduce(sizes)
        sizes /= dist.get_world_size()
    return _Sizes(sizes[0].clamp(min=1), sizes[1], sizes[2])


def _suffix(head: str) -> str:
    """Return what a head's parts end with: `main` -> '', `aux_0` -> '_0', `rpn` -> '_rpn', `main_layer_0` ->
    '_layer_0', `aux_0_layer_0` -> '_0_layer_0'."""
    return "" if head == MAIN_HEAD else f"_{head.removeprefix('aux_').removeprefix(f'{MAIN_HEAD}_')}"


def _query_statistics(heads: list[str], losses: QueryLosses) -> dict[str, Tensor]:
    """Return the statistics of the relation block and the main decoder."""
    statistics = {}
    for i, head in enumerate(heads):
        if head in (MAIN_HEAD, RELATION):
            statistics[f"class_error{_suffix(head)}"] = losses.class_error[i]
            statistics[f"avg_pos_weight{_suffix(head)}"] = losses.positive_weight[i]
            statistics[f"avg_neg_weight{_suffix(head)}"] = losses.negative_weight[i]
    return statistics


def _mean_iou(output: NetworkOutput, first: AnchorLosses, probed: AnchorLosses | None) -> Tensor:
    """Average the IoU of matched anchors with their objects: the mean over P6, P5 and the probed patches of
    each one's mean, leaving out those in which nothing was matched; 0 if that is all of them."""
    widths = [level.raw.shape[1] for level in output.levels if level.level in _FIRST_LEVEL]
    split = (torch.split(values, widths, dim=1) for values in (first.iou, first.matched))
    groups = list(zip(*split, strict=True))
    if probed is not None:
        groups.append((probed.iou, probed.matched))
    sums = torch.stack([iou.sum() for iou, _ in groups])
    counts = torch.stack([matched.sum() for _, matched in groups])
    return (sums / counts.clamp(min=1)).sum() / (counts > 0).sum().clamp(min=1)


def _counts(output: NetworkOutput) -> dict[str, Tensor]:
    """Count anchors and patches per image; `avg_patch` are those of P5, P4 and P3."""
    images = len(output.valid)
    per_level = {level.level: level.real.sum() / images for level in output.levels}
    none = torch.zeros((), device=output.valid.device)
    named = {name: per_level.get(name, none) for name in ("P5", "P4", "P3")}
    return {
        "avg_anchor": output.valid.sum() / images,
        "avg_patch": torch.stack(list(named.values())).sum(),
        "avg_patch_P4": named["P4"],
        "avg_patch_P3": named["P3"],
    }
