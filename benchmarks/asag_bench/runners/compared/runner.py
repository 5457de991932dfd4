"""The compared detectors as runners: exported over a bundle's own maps, or in PyTorch.

They share the backbone, and where they have one the feature pyramid, with the network they are compared
with; only what finds and decodes the queries differs.  Their weights are random: they are for speed and have
no accuracy.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from asag_bench.runners.compared.adamixer import AdaMixer
from asag_bench.runners.compared.deformable_detr import DeformableDetr
from asag_bench.runners.compared.detector import RESULTS, ComparedDetector, backbone_channels
from asag_bench.runners.compared.efficient_detr import EfficientDetr
from asag_bench.runners.compared.featurized_query_rcnn import FeaturizedQueryRcnn, QueryGenerator
from asag_bench.runners.compared.sparse_rcnn import SparseRcnn
from asag_bench.runners.graphs import maps_graph, several_graphs
from asag_bench.runners.runner import Run, TimedNetwork, split
from asag_deploy.backends.network import Network
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.bundle.manifest import Level, Manifest, Precision, TensorSpec
from asag_deploy.detector_options import DetectorOptions
from asag_deploy.errors import ConfigError
from asag_deploy.images.reading import RgbImage
from asag_deploy.loop.stages import features_among
from asag_deploy.processing.postprocess import detections_of
from asag_deploy.scratch import scratch_folder
from asag_deploy.timing import since
from asag_training.network.config import VARIANTS, AsagConfig
from asag_training.network.learned_queries import LearnedQueries

if TYPE_CHECKING:
    from asag_training.checkpoints import Checkpoint

BUILDERS: dict[str, Callable[[AsagConfig, int], ComparedDetector]] = {
    "adamixer-6": AdaMixer,
    "sparse-rcnn-6": SparseRcnn,
    "f-qrcnn": FeaturizedQueryRcnn,
    "cf-qrcnn": lambda config, queries: FeaturizedQueryRcnn(config, queries, layers=2),
    "deformable-detr-6": DeformableDetr,
    "efficient-detr": EfficientDetr,
}
"""What makes each detector of `COMPARED`, of the settings it is compared under and a number of queries."""
_SEED = 0
_CELLS = 3.0
"""How far a box of a dense grid goes to each side of its cell."""
_HALF_PRECISION: Precision = "fp16"


def compared_config(bundle: Bundle, checkpoint: Checkpoint | None) -> AsagConfig:
    """Return the settings that detectors beside a bundle share with it: backbone, width, classes.

    Raises ConfigError if the bundle is of no published variant and there is no checkpoint to look it up in.
    """
    manifest = bundle.manifest
    own = checkpoint.config if checkpoint is not None else VARIANTS.get(manifest.variant)
    if own is None:
        raise ConfigError(
            f"how wide a detector compared with '{manifest.variant}' is to be is not known, for it is no "
            "published variant: give the checkpoint that the bundle was exported from with --checkpoint FILE"
        )
    outputs = {tensor.name: tensor for tensor in manifest.graph("backbone").outputs}
    width = outputs[features_among(outputs)[0]].shape[-1]
    if width != own.hidden_dim:
        raise ConfigError(
            f"the bundle's features have {width} channels, but those of {own.variant} {own.hidden_dim}; "
            "give the checkpoint that the bundle was exported from with --checkpoint FILE"
        )
    return own.with_changes(num_classes=len(manifest.categories))


def query_count(config: AsagConfig) -> int:
    """Return the number of queries that a setting stands for (paper, section 5.1).

    It is 100 where the first level predicts 50 anchors a patch, 300 where it predicts 150.
    """
    return 2 * config.first_level_anchors


def build_compared(name: str, config: AsagConfig, queries: int | None = None) -> ComparedDetector:
    """Make a detector with random weights, the same every time; None: as many queries as the setting stands
    for.

    No weight is left at zero, as training would begin.  Learned queries begin all over the image, as those of
    a trained detector go on after its first layer, and boxes of a dense grid have some size: it takes longer
    to read what lies far apart.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        detector = BUILDERS[name](config, query_count(config) if queries is None else queries)
        for parameter in detector.parameters():
            if parameter.dim() > 1 and not parameter.any():
                nn.init.normal_(parameter, std=0.01)
        for module in detector.modules():
            if isinstance(module, LearnedQueries):
                module.boxes.data.copy_(_spread_boxes(len(module.boxes)))
            if isinstance(module, QueryGenerator):
                nn.init.constant_(module.distances.get_parameter("bias"), _CELLS)
    return detector.eval().requires_grad_(False)


def _spread_boxes(queries: int) -> Tensor:
    """Draw boxes everywhere and of all sizes: (Q, 4) cxcywh relative to the image."""
    centres = 0.05 + 0.9 * torch.rand(queries, 2)
    sizes = 0.05 * 12.0 ** torch.rand(queries, 2)
    return torch.cat([centres, sizes], dim=-1)


def open_compared(
    name: str, bundle: Bundle, options: DetectorOptions, checkpoint: Checkpoint | None
) -> ComparedRunner:
    """Export a detector over the bundle's own maps, and load it with the backend of `options`.

    Raises ConfigError as `compared_config`, ExportError or BackendError if it cannot be exported or run.
    """
    from asag_export.stage_export import export_stage

    manifest = bundle.manifest
    detector = build_compared(name, compared_config(bundle, checkpoint))
    precision: Precision = "fp32"
    if manifest.precision == _HALF_PRECISION:
        detector, precision = detector.half(), _HALF_PRECISION
    more = maps_of_backbone(detector, precision)
    given = (detector, detector.config, manifest.probing)
    model, _, _ = export_stage(*given, precision=precision, opset=manifest.opset, more=more)
    maps = maps_graph(bundle, detector.maps)
    graphs = {"normalize": None, "backbone": maps, "decoder": model}
    with scratch_folder() as folder:
        whole = several_graphs(graphs, bundle, folder)
        network = options.open_network(whole)
    return ComparedRunner(name, manifest, network)


def maps_of_backbone(detector: ComparedDetector, precision: Precision) -> dict[str, TensorSpec]:
    """Describe C2 to C5, each (B, C_i, h, w), for the exporter, as far as a detector reads them."""
    dtype = "float16" if precision == _HALF_PRECISION else "float32"
    names = [name for name in detector.maps if name.startswith("c")]
    channels = backbone_channels(detector.config, names)
    return {
        name: TensorSpec(name=name, dtype=dtype, shape=("batch", count, f"height_{name}", f"width_{name}"))
        for name, count in zip(names, channels, strict=True)
    }


class ComparedRunner:
    """A compared detector: pixels, maps, queries and layers, detections."""

    def __init__(self, name: str, manifest: Manifest, network: Network) -> None:
        self.name = name
        self._manifest = manifest
        self._network = TimedNetwork(network)

    def __call__(self, images: Sequence[RgbImage], max_level: Level | None) -> Run:
        """Detect in a batch of RGB images; there is no level to stop at."""
        network = self._network
        network.begin()
        start = time.perf_counter()
        prepared = network.processing(self._manifest).prepare(images, "rgb")
        times_ms = dict(prepared.times_ms)
        image_size = network.upload(prepared.sizes)
        maps = network.stage("backbone")({"image": prepared.image, "image_size": image_size})
        outputs = network.stage("decoder")({**maps, "image_size": image_size})
        begin = time.perf_counter()
        scores, labels, boxes = (network.download(outputs[result]) for result in RESULTS)
        for i, image in enumerate(images):
            shape = (image.shape[0], image.shape[1])
            detections_of(scores[i], labels[i], boxes[i], original_shape=shape, nms_iou=None)
        times_ms["postprocess"] = since(begin)
        times_ms["total"] = since(start)
        return Run(total_ms=times_ms["total"], phases_ms=split(network, times_ms))
