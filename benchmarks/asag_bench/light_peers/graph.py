"""Peers as ONNX graphs: from the pixels of one canvas to scored boxes, ready for any backend of ours."""

from __future__ import annotations

import copy

import onnx
import torch
from torch import Tensor, nn

from asag_bench.light_peers.dense import Cells
from asag_bench.light_peers.detr import DetrDetector, check_cells
from asag_bench.light_peers.peer import TrainedPeer
from asag_bench.light_peers.six_layers import AdaMixerDetector
from asag_bench.runners.peer_networks import BoxesOfChosen, leave_unsorted, merge_branches, without_checks
from asag_bench.runners.peers import GRAPH, PIXELS, RESULTS
from asag_deploy.bundle.manifest import TensorSpec
from asag_export.stage_export import export_module, fold_batch_norm
from asag_training.network.boxes import cxcywh_to_xyxy, whwh
from asag_training.network.stages import NormalizeStage, best_detections

IMAGE_SIZE = "image_size"

Canvas = tuple[int, int]
"""Height and width in pixels."""


class PeerStage(nn.Module):
    """A peer from pixels to scored boxes, in the form that it is deployed in.

    pixels uint8 (1, H, W, 3) RGB and image_size int64 (1, 2), its valid height and width, in; scores (1, D),
    labels int64 (1, D) and boxes (1, D, 4) xyxy relative to the canvas out.  The dense peer's D are all its
    cells, each with its best class; those of the others are their best, as many as they have queries.
    """

    def __init__(self, peer: TrainedPeer, canvas: Canvas) -> None:
        """Take the peer and the canvas; raises ConfigError for one too small for the peer's queries."""
        super().__init__()
        if isinstance(peer.network, DetrDetector):
            check_cells(peer.network.queries, canvas)
        self.normalize = NormalizeStage(peer.said.recipe.preprocessing)
        self.network = copy.deepcopy(peer.network).eval().requires_grad_(False)
        self.canvas = canvas
        merge_branches(self.network)
        if isinstance(self.network, DetrDetector):
            model = self.network.network.model
            model.enc_bbox_head = BoxesOfChosen(model.enc_bbox_head)
        for module in list(self.network.modules()):
            fold_batch_norm(module)

    def forward(self, pixels: Tensor, image_size: Tensor) -> tuple[Tensor, ...]:
        (image,) = self.normalize(pixels, image_size)
        if isinstance(self.network, AdaMixerDetector):
            logits, boxes = self.network(image, image_size)
            return self._of_queries(logits, boxes * whwh(image_size) / self._sides())
        found = self.network(image)
        return self._of_cells(found) if isinstance(found, Cells) else self._of_queries(*found)

    def _of_cells(self, cells: Cells) -> tuple[Tensor, ...]:
        best, labels = cells.logits.max(dim=-1)
        boxes = cxcywh_to_xyxy(cells.boxes) / self._sides()
        return cells.objectness.sigmoid() * best.sigmoid(), labels, boxes

    def _sides(self) -> Tensor:
        """Return width, height, width, height of the canvas."""
        height, width = self.canvas
        return torch.tensor([width, height, width, height], dtype=torch.float32)

    def _of_queries(self, logits: Tensor, boxes: Tensor) -> tuple[Tensor, ...]:
        all_real = torch.ones(logits.shape[:2], dtype=torch.bool)
        return best_detections(logits, boxes, all_real, logits.shape[1])


def export_peer_graph(peer: TrainedPeer, canvas: Canvas, opset: int) -> onnx.ModelProto:
    """Export a trained peer for one picture on a canvas as `PeerStage`, every size fixed.

    Raises ExportError if PyTorch cannot export it, ConfigError if the canvas is too small for its queries.
    """
    stage = PeerStage(peer, canvas).eval()
    pixels = torch.zeros(1, *canvas, 3, dtype=torch.uint8)
    arguments = (pixels, torch.tensor([canvas]))
    given = tuple(_spec(name, each) for name, each in zip((PIXELS, IMAGE_SIZE), arguments, strict=True))
    with without_checks():
        with torch.no_grad():
            results = stage(*arguments)
        outputs = tuple(_spec(name, result) for name, result in zip(RESULTS, results, strict=True))
        model = export_module(stage, GRAPH, arguments, given, outputs, opset=opset)
    if isinstance(peer.network, DetrDetector):
        leave_unsorted(model, queries=True)
    return model


def _spec(name: str, tensor: Tensor) -> TensorSpec:
    return TensorSpec(name=name, dtype=str(tensor.dtype).removeprefix("torch."), shape=tuple(tensor.shape))
