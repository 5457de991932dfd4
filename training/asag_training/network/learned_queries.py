"""Queries that are the same for every image, which six-layer detectors begin with.

B images, Q queries, C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asag_training.network.relation_block import Proposals, relative_to_xyzr


class LearnedQueries(nn.Module):
    """Learned contents, each with a box that begins as the whole image.

    AdaMixer normalises contents and never changes the boxes (section 3.4); Sparse R-CNN learns them.
    """

    def __init__(self, count: int, channels: int, stride: int, *, learn_boxes: bool, normalise: bool) -> None:
        """Make `count` queries; stride: pixels per cell of the finest map, for xyzr boxes."""
        super().__init__()
        self.stride, self.normalise = stride, normalise
        self.content = nn.Embedding(count, channels)
        whole = torch.tensor([0.5, 0.5, 1.0, 1.0]).repeat(count, 1)
        self.boxes = nn.Parameter(whole, requires_grad=learn_boxes)

    def forward(self, image_size: Tensor) -> Proposals:
        """Return the queries of images of valid height and width image_size (B, 2)."""
        batch = image_size.shape[0]
        content = self.content.weight
        if self.normalise:
            content = F.layer_norm(content, content.shape[-1:])
        boxes = self.boxes.float().expand(batch, -1, -1)
        xyzr = relative_to_xyzr(boxes, self.stride, image_size)
        content = content.expand(batch, -1, -1)
        no_logits = content[..., :0]  # nobody has looked at an image yet
        return Proposals(no_logits, boxes, xyzr, content)
