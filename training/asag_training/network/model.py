"""ASAG as one PyTorch module.

Parameter names are those of the official checkpoints.  The module holds the parts; the stages in
`asag_training.network.stages` are the steps of inference over them, which `asag_deploy.loop.probing` strings
together and the exporter turns into graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from asag_deploy.errors import ConfigError
from asag_training.network.adamixer import AdaMixerDecoder
from asag_training.network.anchor_generator import AnchorGenerator
from asag_training.network.backbone import Backbone
from asag_training.network.config import DEFORMABLE, AsagConfig, DecoderType
from asag_training.network.deformable_decoder import DeformableDecoder
from asag_training.network.deformable_encoder import DeformableEncoder, MapProjections
from asag_training.network.layers import padding_blocked
from asag_training.network.pyramid import FeaturePyramid
from asag_training.network.relation_block import Proposals, RelationBlock
from asag_training.network.sparse_rcnn import SparseRcnnDecoder


class HeadOutput(NamedTuple):
    """The predictions of a decoder for each query."""

    logits: Tensor
    """(B, Q, classes)."""
    boxes: Tensor
    """(B, Q, 4) cxcywh relative to the valid image."""


DECODER_MODULES: dict[DecoderType, Callable[[AsagConfig], nn.Module]] = {
    "adamixer": AdaMixerDecoder,
    "sparse-rcnn": SparseRcnnDecoder,
    DEFORMABLE: DeformableDecoder,
}
"""The parallel decoders of each type."""


class Asag(nn.Module):
    """ASAG-A, ASAG-S or ASAG-D: backbone, neck, anchor generator, relation block and parallel decoders.

    ASAG-D has an encoder behind the neck.
    """

    encoder: DeformableEncoder | None

    def __init__(self, config: AsagConfig) -> None:
        super().__init__()
        self.config = config
        backbone = Backbone(config)
        self.backbone = nn.Sequential(backbone)
        neck = MapProjections if config.decoder == DEFORMABLE else FeaturePyramid
        self.neck = neck(backbone.body.channels, config)
        self.encoder = DeformableEncoder(config) if config.decoder == DEFORMABLE else None
        self.anchor_generator = AnchorGenerator(config)
        self.rpn = RelationBlock(config)
        self.decoder = DECODER_MODULES[config.decoder](config)

    def features(self, image: Tensor, image_size: Tensor) -> list[Tensor]:
        """Compute P2..P5, or P3..P6, each channels-last (B, h, w, C), of normalised RGB (B, 3, H, W).

        image_size: int (B, 2) valid heights and widths in pixels, which only an encoder looks at.  What comes
        out of it is E3..E6.
        """
        maps = [p.permute(0, 2, 3, 1) for p in self.neck(self.backbone(image))]
        if self.encoder is None:
            return maps
        encoded: list[Tensor] = self.encoder(maps, image_size, (image.shape[2], image.shape[3]))
        return encoded

    def relate(
        self, features: list[Tensor], anchors: Tensor, valid: Tensor, image_size: Tensor
    ) -> tuple[Proposals, Tensor]:
        """Turn anchors (B, Q, 4) cxcywh in pixels, of which `valid` (B, Q) are real, into proposals, and say
        who must not see whom (B, Q, Q)."""
        blocked = padding_blocked(valid)
        return self.rpn(features, anchors, image_size, blocked), blocked

    def decode(
        self, head: str, features: list[Tensor], proposals: Proposals, blocked: Tensor, image_size: Tensor
    ) -> HeadOutput:
        """Return the predictions of one of the parallel decoders (`main`, `aux_0`, ...): those of its last
        layer."""
        return self.decode_layers(head, features, proposals, blocked, image_size)[-1]

    def decode_layers(
        self, head: str, features: list[Tensor], proposals: Proposals, blocked: Tensor, image_size: Tensor
    ) -> list[HeadOutput]:
        """Return the predictions of every layer of one of the parallel decoders, in sequence."""
        index = self.head_index(head)
        predicted = self.decoder(index, features, proposals, image_size, blocked)
        return [HeadOutput(*of_layer) for of_layer in predicted]

    def head_index(self, head: str) -> int:
        """Return the position of a decoder among the parallel ones (ConfigError lists them)."""
        names = self.config.head_names
        if head not in names:
            raise ConfigError(f"no decoder head '{head}' in this network; its heads are {', '.join(names)}")
        return names.index(head)


def build(config: AsagConfig, state: Mapping[str, Tensor] | None = None) -> Asag:
    """Build a network in evaluation mode, with the given weights or freshly initialised ones."""
    if state is None:
        return Asag(config).eval()
    with torch.device("meta"):
        model = Asag(config)
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()
