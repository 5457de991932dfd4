"""The backbone of a network, under the name the official checkpoints use."""

from __future__ import annotations

from torch import Tensor, nn

from asag_training.network.body import Body
from asag_training.network.config import RESNET, AsagConfig
from asag_training.network.mobilenet import MobileNet
from asag_training.network.resnet import ResNet


class Backbone(nn.Module):
    """Holds the ResNet or MobileNet under the name the official checkpoints use [backbone.0.body]."""

    def __init__(self, config: AsagConfig) -> None:
        super().__init__()
        self.body: Body
        if config.backbone == RESNET:
            self.body = ResNet(config.backbone_depth, config.backbone_width)
        else:
            self.body = MobileNet(config.backbone.rpartition("-")[2], config.backbone_width)

    def forward(self, image: Tensor) -> list[Tensor]:
        return self.body(image)  # type: ignore[no-any-return]
