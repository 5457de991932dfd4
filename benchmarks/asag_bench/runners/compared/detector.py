"""What the compared detectors have in common: maps of a backbone or a pyramid in, the best detections out.

B images, Q queries, C channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from asag_deploy.errors import ConfigError
from asag_training.network.backbone import Backbone
from asag_training.network.config import DEFORMABLE, AsagConfig
from asag_training.network.relation_block import Proposals
from asag_training.network.stages import StageModule, best_detections, feature_maps

RESULTS = ("det_scores", "det_labels", "det_boxes")


def backbone_names(finest: int) -> tuple[str, ...]:
    """Name the backbone's maps from this level on: `c2` to `c5`, or `c3` to `c5`."""
    return tuple(f"c{level}" for level in range(finest, 6))


def pyramid_names(config: AsagConfig) -> tuple[str, ...]:
    """Name the maps of a network's feature pyramid.  Raises ConfigError if it has none."""
    if config.decoder == DEFORMABLE:
        raise ConfigError(
            f"'{config.variant}' has no feature pyramid, which this detector reads: take it beside ASAG-A or "
            "ASAG-S"
        )
    return feature_maps(config)


class ComparedDetector(StageModule, ABC):
    """Everything of a detector after the maps that it reads.

    It takes the place of a bundle's `decoder`: maps of the pyramid, each (B, h, w, C), or of the backbone,
    each (B, C_i, h, w), and image_size (B, 2) in; logits (B, Q, classes), boxes (B, Q, 4) cxcywh relative to
    the valid image, and the best detections, as `asag_deploy.loop.stages` has them, out.
    """

    name = "decoder"
    outputs = ("logits", "boxes", *RESULTS)

    def __init__(self, config: AsagConfig, maps: Sequence[str]) -> None:
        """Take the detector's own settings, and the names of the maps that it reads."""
        super().__init__()
        self.config, self.maps = config, tuple(maps)
        self.inputs = (*self.maps, "image_size")

    @abstractmethod
    def detect(self, maps: list[Tensor], image_size: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and boxes of the last layer."""
        ...

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        *maps, image_size = tensors
        logits, boxes = self.detect(maps, image_size)
        all_real = torch.ones(logits.shape[:2], dtype=torch.bool, device=boxes.device)
        detections = best_detections(logits, boxes, all_real, self.config.detection_limit)
        return logits, boxes, *detections


def backbone_channels(config: AsagConfig, maps: Sequence[str]) -> tuple[int, ...]:
    """Return the channels of the backbone's maps of these names."""
    with torch.device("meta"):
        channels = Backbone(config).body.channels
    return tuple(channels[int(name[1:]) - 2] for name in maps)


def nobody_blocked(proposals: Proposals) -> Tensor:
    """Let every query see every other: bool (B, Q, Q)."""
    batch, queries = proposals.boxes.shape[:2]
    return torch.zeros(batch, queries, queries, dtype=torch.bool, device=proposals.boxes.device)


def channels_last(maps: Sequence[Tensor]) -> list[Tensor]:
    """Turn maps (B, C, h, w) into (B, h, w, C), as decoders read them."""
    return [x.permute(0, 2, 3, 1) for x in maps]


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Take the rows `index` (B, Q) of x (B, N, C)."""
    return torch.gather(x, 1, index[..., None].expand(-1, -1, x.shape[-1]))
