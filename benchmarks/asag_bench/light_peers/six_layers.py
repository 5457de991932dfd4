"""AdaMixer with six layers and learned queries, trained with Query Weighting or without.

The paper's table 7 asks whether six layers gain by it.  Losses and matching are those of ASAG: what differs
between the two trainings is how matched queries are weighed.

B images, Q queries.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from asag_bench.runners.compared.adamixer import AdaMixer
from asag_training.losses.config import LossConfig
from asag_training.losses.matching import solve
from asag_training.losses.queries import Predictions, query_cost, query_losses
from asag_training.losses.targets import Targets, pad_targets
from asag_training.network.backbone import Backbone
from asag_training.network.config import AsagConfig

_TERMS = {"ce": "loss_ce", "l1": "loss_bbox", "giou": "loss_giou"}


class AdaMixerDetector(nn.Module):
    """image (B, 3, H, W), normalised, and image_size (B, 2), its valid height and width -> logits (B, Q,
    classes) and boxes (B, Q, 4) cxcywh relative to the valid part."""

    def __init__(self, config: AsagConfig, queries: int, *, query_weighting: bool) -> None:
        """Take the network whose backbone and width it has, and how its losses are weighed."""
        super().__init__()
        self.backbone = Backbone(config)
        self.backbone.body.learn_statistics()
        self.detector = AdaMixer(config, queries)
        # Objects of all sizes count alike, as they do in the public training of AdaMixer.
        self.loss = LossConfig(query_weighting=query_weighting, area_weight=1.0)

    def forward(self, image: Tensor, image_size: Tensor) -> tuple[Tensor, Tensor]:
        return self.layers(image, image_size)[-1]

    def layers(self, image: Tensor, image_size: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return logits and boxes of every layer."""
        maps = self.backbone(image)[-len(self.detector.maps) :]
        return self.detector.detect_layers(maps, image_size)

    def losses(self, image: Tensor, targets: list[Targets], image_size: Tensor) -> dict[str, Tensor]:
        """Return the losses of all layers by name, weighted, to be added up."""
        found = self.layers(image, image_size)
        objects = pad_targets(targets, image.device)
        logits, boxes = (torch.stack([layer[i].float() for layer in found]) for i in (0, 1))
        all_real = torch.ones(logits.shape[1:3], dtype=torch.bool, device=image.device)
        predictions = Predictions(logits, boxes, all_real)
        (match,) = solve([query_cost(predictions, objects, self.loss)])
        sums = query_losses(predictions, objects, match, self.loss)
        count = objects.present.sum().clamp(min=1)
        return {
            f"{name}_{layer}": getattr(self.loss, term) * of_layer / count
            for term, name in _TERMS.items()
            for layer, of_layer in enumerate(getattr(sums, term).unbind())
        }
