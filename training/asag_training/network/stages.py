"""The stages of inference as PyTorch modules: what is exported, and what PyTorch itself runs.

Each takes and returns the named arrays that `asag_deploy.loop.stages` lists; `INPUTS` and `OUTPUTS` give
their order.  Nothing in them has a shape that depends on values, so every one becomes a static graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from asag_deploy.backends.network import Network
from asag_deploy.bundle.manifest import Level, Preprocessing, ProbeLevel, Probing
from asag_deploy.loop.stages import FEATURES, PATCHES_COLUMN, LevelOutputs
from asag_training.network import boxes as box_ops
from asag_training.network.anchor_generator import FIRST_LEVEL_PATCHES
from asag_training.network.config import AsagConfig
from asag_training.network.model import Asag
from asag_training.network.operators import pad_anchors, patch_nms
from asag_training.network.pyramid import map_of, pyramid_strides


def feature_maps(config: AsagConfig) -> tuple[str, ...]:
    """Name the maps that backbone, neck and encoder put out: `p2` to `p5`, or `p3` to `p6`."""
    first = FEATURES.index(config.finest_map.lower())
    return FEATURES[first : first + len(pyramid_strides(config))]


class StageModule(nn.Module):
    """A stage: tensors in the order of `inputs`, tensors out in the order of `outputs`."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class NormalizeStage(StageModule):
    """Pixels to network input."""

    name = "normalize"
    inputs = ("pixels", "image_size")
    outputs = ("image",)
    mean: Tensor
    std: Tensor

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(preprocessing.std).view(3, 1, 1), persistent=False)

    def forward(self, pixels: Tensor, image_size: Tensor) -> tuple[Tensor]:
        rows = torch.arange(pixels.shape[1], device=pixels.device) < image_size[:, 0:1]
        columns = torch.arange(pixels.shape[2], device=pixels.device) < image_size[:, 1:2]
        valid = rows[:, None, :, None] & columns[:, None, None, :]
        # Channels first while they are still bytes: an eighth of the time of turning floats around.
        normal = (pixels.permute(0, 3, 1, 2).contiguous().float() - self.mean) / self.std
        return (torch.where(valid, normal, 0.0),)


class SelectingStage(StageModule):
    """A stage that predicts anchors and finds out which of them ask for a closer look."""

    model: Asag
    next_level: Level | None
    floor: int = 0

    def choose(self, anchors: Tensor) -> tuple[Tensor, ...]:
        """Turn anchors (B, N, 5) into selected and counts; or counts alone where no level follows."""
        generator, floor = self.model.anchor_generator, self.floor
        passes = generator.passes(anchors)
        passing = passes.sum(dim=1).clamp(min=floor)
        nothing = torch.zeros_like(passing)
        if self.next_level is None:
            return (torch.stack([nothing, nothing, passing, passing], dim=1),)
        selected = generator.select(anchors, self.next_level)
        remaining = passing
        if self.model.config.replace_anchors:
            remaining = (passes & ~selected).sum(dim=1).clamp(min=floor)
        return selected, torch.stack([selected.sum(dim=1), nothing, passing, remaining], dim=1)


class BackboneStage(SelectingStage):
    """Backbone, neck, encoder if there is one, and the first level of the anchor generator."""

    name = "backbone"
    inputs = ("image", "image_size")

    def __init__(self, model: Asag, next_level: Level | None) -> None:
        super().__init__()
        self.model, self.next_level = model, next_level
        self.floor = model.config.anchor_floor
        choice = ("counts",) if next_level is None else ("selected", "counts")
        self.outputs = (*feature_maps(model.config), "anchors", *choice)

    def forward(self, image: Tensor, image_size: Tensor) -> tuple[Tensor, ...]:
        features = self.model.features(image, image_size)
        p5 = map_of("P5", features, self.model.config)
        anchors = self.model.anchor_generator.first_level(p5, image_size).anchors
        return (*features, anchors, *self.choose(anchors))


class ProbeStage(SelectingStage):
    """Anchors of the patches of one probed level."""

    inputs = ("feature", "feature_size", "image_size", "patches", "patch_count", "slots")

    def __init__(self, model: Asag, level: Level, next_level: Level | None) -> None:
        super().__init__()
        self.model, self.level, self.next_level = model, level, next_level
        self.name = f"probe_{level.lower()}"
        choice = ("counts",) if next_level is None else ("selected", "counts")
        self.outputs = ("anchors", *choice)

    def forward(
        self,
        feature: Tensor,
        feature_size: Tensor,
        image_size: Tensor,
        patches: Tensor,
        patch_count: Tensor,
        slots: Tensor,
    ) -> tuple[Tensor, ...]:
        origins = torch.index_select(patches, 1, slots)
        generator = self.model.anchor_generator
        prediction = generator.probe(self.level, feature, feature_size, image_size, origins, patch_count)
        anchors = prediction.anchors
        return (anchors, *self.choose(anchors))


class DecoderStage(StageModule):
    """Anchor padding, relation block, one decoder, and the best-scored detections.

    The relation block's own boxes come out as well, for whoever measures them.
    """

    name = "decoder"
    outputs: tuple[str, ...] = (
        "logits",
        "boxes",
        "anchors",
        "anchor_count",
        "det_scores",
        "det_labels",
        "det_boxes",
        "proposal_scores",
        "proposal_boxes",
    )

    def __init__(self, model: Asag, head: str, levels: Sequence[Level]) -> None:
        super().__init__()
        self.model, self.head, self.levels = model, head, tuple(levels)
        model.head_index(head)
        self.replace = model.config.replace_anchors
        anchors: list[str] = ["anchors_p5"]
        for i, level in enumerate(self.levels):
            selected = [f"selected_{('p5', 'p4')[i]}"] if self.replace else []
            anchors += [*selected, f"anchors_{level.lower()}"]
        probed = ("probed",) if self.levels and self.replace else ()
        self.maps = feature_maps(model.config)
        self.inputs = (*self.maps, *anchors, *probed, "image_size", "query_slots")

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(self.inputs, tensors, strict=True))
        features = [named[name] for name in self.maps]
        image_size = named["image_size"]
        queries, count = self.queries(named)
        valid = named["query_slots"] < count[:, None]
        proposals, blocked = self.model.relate(features, queries, valid, image_size)
        logits, boxes = self.model.decode(self.head, features, proposals, blocked, image_size)
        limit = self.model.config.detection_limit
        detections = best_detections(logits, boxes, valid, limit)
        score = torch.where(valid, proposals.logits.amax(dim=-1).sigmoid(), 0.0)
        return logits, boxes, queries, count, *detections, score, proposals.boxes

    def queries(self, named: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the anchors that reach the decoder (B, Q, 4), and how many of them are real (B,)."""
        config = self.model.config
        anchors, keep = self._gather(named)
        first_level = FIRST_LEVEL_PATCHES * config.first_level_anchors
        floor, cap = config.anchor_floor, config.anchor_cap
        return pad_anchors(anchors, keep, named["image_size"], named["query_slots"], first_level, floor, cap)

    def _gather(self, named: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return all levels' anchors (B, N, 5), and which pass: those that a deeper level replaced do not."""
        anchors, keep = [], []
        for i, level in enumerate(("P5", *self.levels)):
            of_level = named[f"anchors_{level.lower()}"]
            passes = self.model.anchor_generator.passes(of_level)
            if self.replace and i < len(self.levels):
                passes = passes & ~(named[f"selected_{level.lower()}"] & named["probed"][:, i : i + 1])
            anchors.append(of_level)
            keep.append(passes)
        return torch.cat(anchors, dim=1), torch.cat(keep, dim=1)


def best_detections(
    logits: Tensor, boxes: Tensor, valid: Tensor, limit: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the best-scored (query, class) pairs of each image.

    logits (B, Q, classes), boxes (B, Q, 4) cxcywh, valid (B, Q) -> scores (B, D), labels int64 (B, D), boxes
    (B, D, 4) xyxy, best first, D = min(limit, Q * classes); pairs of padding queries score 0.
    """
    classes = logits.shape[-1]
    score = torch.where(valid[..., None], logits.sigmoid(), 0.0).flatten(1)
    count = torch.sym_min(limit, score.shape[1])  # type: ignore[no-untyped-call]
    best, index = torch.topk(score, count, dim=1)
    query = torch.div(index, classes, rounding_mode="floor")
    corners = torch.gather(box_ops.cxcywh_to_xyxy(boxes), 1, query[..., None].expand(-1, -1, 4))
    return best, index - query * classes, corners


class TorchNetwork(Network):
    """The stages run by PyTorch itself, on any of its devices.

    Evaluation runs it, and the exporter's parity gate compares other networks with it.
    """

    def __init__(self, stages: Sequence[StageModule], device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.modules = {stage.name: stage for stage in stages}

    def stage(self, name: str) -> _TorchStage:
        """Return the stage called `name` (KeyError if there is none)."""
        return _TorchStage(self.modules[name])

    def upload(self, array: NDArray[Any]) -> Tensor:
        """Copy a host array to a tensor on the network's device."""
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def download(self, array: Tensor) -> NDArray[Any]:
        """Copy a tensor to a host array."""
        return array.detach().cpu().numpy()

    def select(
        self, probing: Probing, level: ProbeLevel, before: LevelOutputs, image_size: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Run patch NMS in PyTorch: what every other network is compared with."""
        origins, patches = patch_nms(
            before.anchors,
            before.selected,
            image_size,
            level.stride,
            probing.patch_size,
            probing.patch_nms_iou,
            level.capacity,
            probing.max_candidates,
        )
        filled = before.counts.clone()
        filled[:, PATCHES_COLUMN] = patches
        return origins, filled


class _TorchStage:
    def __init__(self, module: StageModule) -> None:
        self.module = module

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        ordered = [inputs[name] for name in self.module.inputs]
        with torch.no_grad():
            return dict(zip(self.module.outputs, self.module(*ordered), strict=True))
