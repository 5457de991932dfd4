"""Sparse R-CNN with six layers (Sun et al., CVPR 2021): what ASAG-S is compared with."""

from __future__ import annotations

from torch import Tensor

from asag_bench.runners.compared.detector import ComparedDetector, nobody_blocked, pyramid_names
from asag_training.network.config import AsagConfig
from asag_training.network.learned_queries import LearnedQueries
from asag_training.network.pyramid import pyramid_strides
from asag_training.network.sparse_rcnn import SparseRcnnDecoder

LAYERS = 6


class SparseRcnn(ComparedDetector):
    """Learned contents and boxes, and six layers in sequence over the feature pyramid."""

    def __init__(self, config: AsagConfig, queries: int) -> None:
        """Take the settings of the network that it is compared with, and the number of queries."""
        maps = pyramid_names(config)
        own = config.with_changes(decoder="sparse-rcnn", decoder_layers=LAYERS, heads=1, activation="relu")
        super().__init__(own, maps)
        stride = pyramid_strides(own)[0]
        self.queries = LearnedQueries(queries, own.hidden_dim, stride, learn_boxes=True, normalise=False)
        self.decoder = SparseRcnnDecoder(own)

    def detect(self, maps: list[Tensor], image_size: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and boxes of the sixth layer, of maps P2..P5."""
        proposals = self.queries(image_size)
        return self.decoder(0, maps, proposals, image_size, nobody_blocked(proposals))[-1]  # type: ignore[no-any-return]
