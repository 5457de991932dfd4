"""Stages that compute maps and nothing else: what comparisons begin with."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from asag_training.network.model import Asag
from asag_training.network.stages import StageModule, feature_maps


class PyramidStage(StageModule):
    """Backbone and neck of a network, without the anchors of the first level."""

    name = "backbone"
    inputs = ("image", "image_size")

    def __init__(self, model: Asag) -> None:
        super().__init__()
        self.model = model
        self.outputs = feature_maps(model.config)

    def forward(self, image: Tensor, image_size: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.model.features(image, image_size))


class BodyStage(StageModule):
    """The backbone of a network: some of its maps, each (B, C_i, h, w)."""

    name = "backbone"
    inputs = ("image", "image_size")

    def __init__(self, model: Asag, names: Sequence[str]) -> None:
        """Take the names of the maps, from `c2` to `c5`."""
        super().__init__()
        self.model = model
        self.outputs = tuple(names)

    def forward(self, image: Tensor, image_size: Tensor) -> tuple[Tensor, ...]:
        maps = self.model.backbone(image)
        return tuple(maps[int(name[1:]) - 2] for name in self.outputs)


def stage_of_maps(names: Sequence[str], model: Asag) -> StageModule:
    """Build the stage that computes maps of the backbone, or those of the neck, by their names."""
    return BodyStage(model, names) if names[0].startswith("c") else PyramidStage(model)
