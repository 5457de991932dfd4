"""What the criterion returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor


class Losses(Mapping[str, Tensor]):
    """The parts of the loss by name, before their weights: a read-only mapping of scalars.

    `loss_ce`, `loss_bbox` (L1) and `loss_giou` of the main decoder; `*_0`, `*_1`, ... of the auxiliary ones,
    `*_rpn` of the relation block, `*_anchor` of the anchor generator; `dn_loss_*` likewise of denoising.
    Where decoders have several layers, `*_layer_0`, ... and `*_0_layer_0`, ... of those before the last.
    """

    def __init__(
        self, parts: Mapping[str, Tensor], weights: Mapping[str, float], statistics: Mapping[str, Tensor]
    ) -> None:
        """Every part needs a weight."""
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
        """Total, parts and statistics as numbers, in one copy from the device."""
        named = {"loss": self.total, **self.parts, **self.statistics}
        values = torch.stack([value.detach().float() for value in named.values()]).tolist()
        return dict(zip(named, values, strict=True))

    def not_finite(self) -> list[str]:
        """Names of the parts that are infinite or not a number (one copy from the device)."""
        finite = torch.isfinite(torch.stack([part.detach() for part in self.parts.values()])).tolist()
        return [name for name, fine in zip(self.parts, finite, strict=True) if not fine]
