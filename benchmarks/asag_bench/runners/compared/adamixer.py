"""AdaMixer with six layers and its own neck (Gao et al., CVPR 2022): what ASAG-A is compared with."""

from __future__ import annotations

from torch import Tensor

from asag_bench.runners.compared.detector import (
    ComparedDetector,
    backbone_channels,
    backbone_names,
    channels_last,
    nobody_blocked,
)
from asag_training.network.adamixer import AdaMixerDecoder
from asag_training.network.channel_mapping import ChannelMapping
from asag_training.network.config import DEFORMABLE, AsagConfig
from asag_training.network.learned_queries import LearnedQueries
from asag_training.network.pyramid import pyramid_strides

LAYERS = 6


class AdaMixer(ComparedDetector):
    """Learned contents, boxes that begin as the whole image, and six layers in sequence over 1x1 maps."""

    def __init__(self, config: AsagConfig, queries: int) -> None:
        """Take the settings of the network that it is compared with, and the number of queries."""
        own = config.with_changes(
            decoder="adamixer",
            decoder_layers=LAYERS,
            heads=1,
            activation="relu",
            box_layers=1,
            finest_map="P2" if config.decoder == DEFORMABLE else config.finest_map,
        )
        super().__init__(own, backbone_names(int(own.finest_map[1:])))
        strides = pyramid_strides(own)
        self.neck = ChannelMapping(backbone_channels(own, self.maps), own.hidden_dim, len(strides))
        self.queries = LearnedQueries(queries, own.hidden_dim, strides[0], learn_boxes=False, normalise=True)
        self.decoder = AdaMixerDecoder(own)

    def detect(self, maps: list[Tensor], image_size: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and boxes of the sixth layer, of maps C2..C5."""
        return self.detect_layers(maps, image_size)[-1]

    def detect_layers(self, maps: list[Tensor], image_size: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return logits and boxes of every layer, each trained for itself."""
        features = channels_last(self.neck(maps))
        proposals = self.queries(image_size)
        return self.decoder(0, features, proposals, image_size, nobody_blocked(proposals))  # type: ignore[no-any-return]
