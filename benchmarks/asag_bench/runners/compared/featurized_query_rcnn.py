"""Featurized Query R-CNN, and its cascade (Zhang et al., arXiv 2206.06258): queries from a dense grid.

B images, Q queries, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asag_bench.runners.compared.detector import (
    ComparedDetector,
    nobody_blocked,
    pyramid_names,
    take_rows,
)
from asag_training.network import boxes as box_ops
from asag_training.network.config import AsagConfig
from asag_training.network.layers import BiasedSelfAttention, blocking_bias
from asag_training.network.pyramid import pyramid_strides
from asag_training.network.relation_block import Proposals
from asag_training.network.sparse_rcnn import SparseRcnnDecoder, SparseRcnnStage

_LEVELS = 5
"""Queries are looked for on as many maps, from P3 on."""


class RelatingStage(SparseRcnnStage):
    """A Sparse R-CNN layer in which queries see each other once more, after they have seen the image."""

    def __init__(self, config: AsagConfig) -> None:
        super().__init__(config)
        self.self_attn_after = BiasedSelfAttention(config.hidden_dim, config.attention_heads)
        self.norm_after = nn.LayerNorm(config.hidden_dim)

    def interact(self, content: Tensor, roi: Tensor, blocked: Tensor) -> Tensor:
        """Let queries (B, Q, C) see each other, what lies in their boxes (B, Q, 49, C), and each other."""
        content = super().interact(content, roi, blocked)
        return self.norm_after(content + self.self_attn_after(content, blocking_bias(blocked)))  # type: ignore[no-any-return]


class QueryGenerator(nn.Module):
    """A dense head: a score, a box and a content at every cell of five maps; the best cells are queries."""

    def __init__(self, channels: int, strides: Sequence[int], queries: int) -> None:
        """Take the pixels per cell of each map, and how many queries there are."""
        super().__init__()
        self.strides, self.queries = tuple(strides), queries
        self.hidden = nn.Conv2d(channels, channels, 3, padding=1)
        self.score = nn.Conv2d(channels, 1, 1)
        self.distances = nn.Conv2d(channels, 4, 1)
        self.content = nn.Conv2d(channels, channels, 1)
        self.scales = nn.Parameter(torch.ones(len(self.strides)))
        nn.init.constant_(self.score.bias, -math.log((1 - 0.01) / 0.01))  # type: ignore[arg-type]

    def forward(self, maps: Sequence[Tensor], image_size: Tensor) -> Proposals:
        """Find the queries of maps (B, C, h, w); image_size: (B, 2) valid height and width."""
        scores, boxes, contents = [], [], []
        for i, (x, stride) in enumerate(zip(maps, self.strides, strict=True)):
            hidden = F.relu(self.hidden(x))
            distance = F.relu(self.distances(hidden) * self.scales[i]) * stride
            scores.append(self.score(hidden).flatten(1))
            boxes.append(_around_cells(distance.float(), stride))
            contents.append(self.content(hidden).flatten(2).transpose(1, 2))
        score = torch.cat(scores, dim=1).float()
        count = torch.sym_min(self.queries, score.shape[1])  # type: ignore[no-untyped-call]
        _, best = torch.topk(score, count, dim=1)
        pixels = take_rows(torch.cat(boxes, dim=1), best)
        relative = box_ops.xyxy_to_cxcywh(pixels / box_ops.whwh(image_size))
        content = take_rows(torch.cat(contents, dim=1), best)
        return Proposals(content[..., :0], relative, relative, content)  # its decoder reads no xyzr


def _around_cells(distance: Tensor, stride: int) -> Tensor:
    """Turn distances (B, 4, h, w) to left, top, right and bottom into boxes (B, h w, 4) xyxy in pixels."""
    height, width = distance.shape[2:]
    y = (torch.arange(height, device=distance.device) * stride + stride // 2).float()[:, None]
    x = (torch.arange(width, device=distance.device) * stride + stride // 2).float()[None, :]
    left, top, right, bottom = distance.unbind(1)
    return torch.stack([x - left, y - top, x + right, y + bottom], dim=-1).flatten(1, 2)


class FeaturizedQueryRcnn(ComparedDetector):
    """The query generator, and one Sparse R-CNN layer after it, or two."""

    def __init__(self, config: AsagConfig, queries: int, layers: int = 1) -> None:
        """Take the settings of the network it is compared with, and the numbers of queries and layers."""
        maps = pyramid_names(config)
        own = config.with_changes(decoder="sparse-rcnn", decoder_layers=layers, heads=1, activation="relu")
        super().__init__(own, maps)
        self.from_p3 = [name for name in maps if name != "p2"]
        more = _LEVELS - len(self.from_p3)
        channels = own.hidden_dim
        self.neck = nn.ModuleList(nn.Conv2d(channels, channels, 3, 2, 1) for _ in range(more))
        first = pyramid_strides(own)[-len(self.from_p3)]
        self.generator = QueryGenerator(channels, [first << i for i in range(_LEVELS)], queries)
        self.decoder = SparseRcnnDecoder(own)
        self.decoder.head_series[-1] = RelatingStage(own)

    def detect(self, maps: list[Tensor], image_size: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and boxes of the last layer, of maps P2..P5."""
        finer = [x.permute(0, 3, 1, 2) for x in maps[-len(self.from_p3) :]]
        for convolution in self.neck:
            finer.append(convolution(finer[-1]))
        proposals = self.generator(finer, image_size)
        return self.decoder(0, maps, proposals, image_size, nobody_blocked(proposals))[-1]  # type: ignore[no-any-return]
