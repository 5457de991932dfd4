"""Figures 3, 7 and C-3: discriminability scores, the l2 norm of what each cell of a feature map holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from asag_bench.light_peers.peer import TrainedPeer
from asag_bench.light_peers.six_layers import AdaMixerDetector
from asag_bench.paper.figures.canvas import Picture, enlarged, write_grid
from asag_deploy.bundle.manifest import Preprocessing
from asag_deploy.errors import ConfigError
from asag_deploy.images.reading import RgbImage
from asag_deploy.processing.preprocess import make_batch
from asag_evaluation.data.coco import Sample
from asag_training.checkpoints import Checkpoint
from asag_training.network.model import build
from asag_training.network.pyramid import pyramid_strides
from asag_training.network.stages import NormalizeStage, feature_maps

Scores = Mapping[str, NDArray[np.float32]]
"""By the name of a map, P2 to P6: the norm of each cell (h, w), of the part that the picture covers."""

ScoreSource = Callable[[RgbImage], Scores]
"""Scores of an RGB picture."""

_OVERVIEW = "P3"
_LEAST, _MOST = 1.0, 99.0
"""Percentiles of a map that are black and white in it: a few cells do not decide how all look."""
_HEADING = "norm of each cell: blue is the least of a map, yellow the most"
_VEIL = 0.45
"""How much of the picture shows through."""


def scores_of_network(checkpoint: Checkpoint) -> ScoreSource:
    """Return what computes the scores of a checkpoint's network: behind neck and encoder."""
    model, config = build(checkpoint.config, checkpoint.state), checkpoint.config
    names = [name.upper() for name in feature_maps(config)]

    def maps(image: Tensor, image_size: Tensor) -> list[Tensor]:
        return model.features(image, image_size)

    return _source(checkpoint.preprocessing or Preprocessing(), names, pyramid_strides(config), maps)


def scores_of_peer(peer: TrainedPeer) -> ScoreSource:
    """Return what computes the scores of AdaMixer of six layers, behind its neck.

    Raises ConfigError for another peer, which has no such maps.
    """
    network = peer.network
    if not isinstance(network, AdaMixerDetector):
        raise ConfigError(f"maps are drawn of ASAG and of adamixer-6, not of {peer.said.recipe.peer}")
    detector = network.detector
    names = [name.upper() for name in feature_maps(detector.config)]

    def maps(image: Tensor, image_size: Tensor) -> list[Tensor]:
        of_backbone = network.backbone(image)[-len(detector.maps) :]
        return [x.permute(0, 2, 3, 1) for x in detector.neck(of_backbone)]

    return _source(peer.said.recipe.preprocessing, names, pyramid_strides(detector.config), maps)


def _source(
    preprocessing: Preprocessing,
    names: Sequence[str],
    strides: Sequence[int],
    maps: Callable[[Tensor, Tensor], Sequence[Tensor]],
) -> ScoreSource:
    normalize = NormalizeStage(preprocessing)

    @torch.no_grad()
    def scores(picture: RgbImage) -> Scores:
        pixels, sizes = make_batch([picture], preprocessing)
        image_size = torch.from_numpy(sizes)
        (image,) = normalize(torch.from_numpy(pixels), image_size)
        height, width = (int(side) for side in sizes[0])
        return {
            name: of_map[0, : -(-height // stride), : -(-width // stride)].norm(dim=-1).numpy()
            for name, stride, of_map in zip(names, strides, maps(image, image_size), strict=True)
        }

    return scores


def write_maps(path: Path, sources: Mapping[str, ScoreSource], sample: Sample) -> Path:
    """Draw figure C-3 of one picture: a row for each network, a column for each of its maps."""
    found = {name: source(sample.image) for name, source in sources.items()}
    levels = sorted({level for scores in found.values() for level in scores})
    picture, _ = enlarged(sample.image)
    rows = [
        [picture, *(heat_map(picture, scores[level]) if level in scores else None for level in levels)]
        for scores in found.values()
    ]
    return write_grid(path, rows, ["picture", *levels], list(found), heading=_HEADING)


def write_overview(path: Path, sources: Mapping[str, ScoreSource], samples: Sequence[Sample]) -> Path:
    """Draw figures 3 and 7: a row for each picture, a column for each network's map P3."""
    rows = []
    for sample in samples:
        picture, _ = enlarged(sample.image)
        rows.append(
            [picture, *(heat_map(picture, source(sample.image)[_OVERVIEW]) for source in sources.values())]
        )
    return write_grid(
        path, rows, ["picture", *(f"{name}, {_OVERVIEW}" for name in sources)], heading=_HEADING
    )


def heat_map(picture: Picture, scores: NDArray[np.float32]) -> Picture:
    """Lay the scores (h, w) over a picture (H, W, 3), from dark blue, the least, over green to yellow."""
    least, most = np.percentile(scores, (_LEAST, _MOST))
    shown = np.clip((scores - least) / max(most - least, 1e-6), 0, 1)
    height, width = picture.shape[:2]
    grey = (255 * shown).astype(np.uint8)
    # Nearest, so that cells stay cells.
    cells = cv2.resize(grey, (width, height), interpolation=cv2.INTER_NEAREST)
    colours = cv2.cvtColor(cv2.applyColorMap(cells, cv2.COLORMAP_VIRIDIS), cv2.COLOR_BGR2RGB)
    luminance = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)[..., None].astype(np.float32)
    mixed = (1 - _VEIL) * colours.astype(np.float32) + _VEIL * luminance
    return np.asarray(mixed, dtype=np.uint8)
