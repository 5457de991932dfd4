"""AP of a trained peer, by PyTorch: as it is deployed, picture by picture."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from asag_bench.light_peers.graph import Canvas, PeerStage
from asag_bench.light_peers.peer import TrainedPeer, load_peer
from asag_bench.light_peers.raw import Raw, deployed
from asag_deploy.command_line import progress
from asag_deploy.errors import ConfigError
from asag_deploy.images.reading import RgbImage
from asag_deploy.processing.postprocess import Found
from asag_deploy.processing.preprocess import make_batch
from asag_evaluation.data.coco import VAL_SPLIT, CocoDataset
from asag_evaluation.data.orientation import OrientationRule
from asag_evaluation.evaluate import coco_results
from asag_evaluation.metrics.coco import CocoMetrics, coco_metrics

DETECTIONS = 300
"""Of each picture, at most, beside a front: those with the most objects have 200."""


@dataclass
class TorchPeer:
    """A trained peer, run by PyTorch."""

    peer: TrainedPeer
    _stages: dict[Canvas, PeerStage] = field(default_factory=dict)

    def __call__(self, image: RgbImage) -> Found:
        """Detect in one RGB picture."""
        recipe = self.peer.said.recipe
        pixels, sizes = make_batch([image], recipe.preprocessing)
        canvas = (pixels.shape[1], pixels.shape[2])
        if canvas not in self._stages:
            self._stages[canvas] = PeerStage(self.peer, canvas).eval()
        with torch.no_grad():
            found = self._stages[canvas](torch.from_numpy(pixels), torch.from_numpy(sizes))
        raw = Raw(*(tensor[0].numpy() for tensor in found))
        return deployed(raw, recipe.peer, canvas, sizes[0], (image.shape[0], image.shape[1]))


def evaluate_peer(
    folder: Path,
    data: Path,
    *,
    limit: int | None = None,
    orientation: OrientationRule = "auto",
    most: int = 100,
    quiet: bool = False,
) -> CocoMetrics:
    """Measure the peer that `asag-bench train-peer` has left in a folder.

    limit: of the first pictures only; most: detections of an image that are measured.
    Raises CheckpointError for what is no peer, DataError for data that cannot be read, ConfigError for other
    classes.
    """
    peer = load_peer(folder)
    dataset = CocoDataset.open(data, VAL_SPLIT, orientation=orientation).first(limit)
    if dataset.categories != peer.said.categories:
        raise ConfigError(f"the peer in '{folder}' was trained on other classes than those of '{data}'")
    detect = TorchPeer(peer)
    results: list[dict[str, Any]] = []
    with progress(total=len(dataset), unit="image", quiet=quiet) as bar:
        for i in range(len(dataset)):
            sample = dataset[i]
            results += coco_results(sample.image_id, detect(sample.image), dataset.categories)
            bar.update()
    return coco_metrics(dataset.ground_truth(), results, most=most)
