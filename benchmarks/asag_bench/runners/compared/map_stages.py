"""Stages that compute maps and nothing else: what comparisons begin with."""

from __future__ import annotations

from torch import Tensor

from asag_bench.runners.compared.detector import map_names
from asag_bench.runners.compared.published import Maps
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
        return tuple(self.model.features(image))


class BodyStage(StageModule):
    """The backbone of a network: the maps that its neck reads, each (B, C_i, h, w)."""

    name = "backbone"
    inputs = ("image", "image_size")

    def __init__(self, model: Asag) -> None:
        super().__init__()
        self.model = model
        self.outputs = map_names("backbone", model.config)

    def forward(self, image: Tensor, image_size: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.model.backbone(image)[-len(self.outputs) :])


def stage_of_maps(maps: Maps, model: Asag) -> StageModule:
    """Build the stage that computes what a compared detector reads."""
    return PyramidStage(model) if maps == "pyramid" else BodyStage(model)
