"""Six decoder layers over learned queries, as AdaMixer and Sparse R-CNN have them: what ASAG does without.

They share backbone, feature pyramid and decoder stage with the network they are compared with; only what
finds and decodes the queries differs.  Their weights are random: they are for speed and have no accuracy.

B images, Q queries, C channels.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from asag_bench.runners.graphs import feature_pyramid, several_graphs
from asag_bench.runners.runner import Run, TimedNetwork, split
from asag_deploy.backends.network import Network
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.bundle.manifest import Level, Manifest, Precision
from asag_deploy.detector_options import DetectorOptions
from asag_deploy.errors import ConfigError
from asag_deploy.images.reading import RgbImage
from asag_deploy.loop.stages import features_among
from asag_deploy.processing.postprocess import detections_of
from asag_deploy.scratch import scratch_folder
from asag_deploy.timing import since
from asag_training.network import boxes as box_ops
from asag_training.network.config import VARIANTS, AsagConfig, DecoderType
from asag_training.network.model import DECODER_MODULES, Asag
from asag_training.network.pyramid import box_cell
from asag_training.network.relation_block import Proposals
from asag_training.network.stages import StageModule, best_detections, feature_maps

if TYPE_CHECKING:
    from asag_training.checkpoints import Checkpoint

LAYERS = 6
DECODERS: dict[str, DecoderType] = {"adamixer-6": "adamixer", "sparse-rcnn-6": "sparse-rcnn"}
"""The decoder of each reference."""
_RESULTS = ("det_scores", "det_labels", "det_boxes")
_SEED = 0
_HALF_PRECISION: Precision = "fp16"


class SixLayerDecoder(StageModule):
    """Learned boxes and contents, and six decoder layers in sequence over them.

    It takes the place of a bundle's `decoder`: P2..P5 or P3..P6, each (B, h, w, C), and image_size (B, 2)
    in; logits (B, Q, classes), boxes (B, Q, 4) cxcywh relative to the valid image, and the best detections,
    as `asag_deploy.loop.stages` has them, out.
    """

    name = "decoder"
    outputs = ("logits", "boxes", *_RESULTS)
    learned_boxes: Tensor

    def __init__(self, config: AsagConfig, queries: int) -> None:
        super().__init__()
        self.config = config
        self.inputs = (*feature_maps(config), "image_size")
        self.stride = box_cell(config)
        self.learned_content = nn.Embedding(queries, config.hidden_dim)
        self.register_buffer("learned_boxes", _spread_boxes(queries))
        self.decoder = DECODER_MODULES[config.decoder](config)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        *features, image_size = tensors
        batch = image_size.shape[0]
        content = self.learned_content.weight.expand(batch, -1, -1)
        boxes = self.learned_boxes.float().expand(batch, -1, -1)
        pixels = box_ops.cxcywh_to_xyxy(boxes) * box_ops.whwh(image_size)
        xyzr = box_ops.xyxy_to_xyzr(pixels / self.stride)
        queries = boxes.shape[1]
        nobody = torch.zeros(batch, queries, queries, dtype=torch.bool, device=boxes.device)
        proposals = Proposals(content, boxes, xyzr, content)  # no decoder reads a proposal's logits
        logits, boxes = self.decoder(0, features, proposals, image_size, nobody)[-1]
        all_real = torch.ones(batch, queries, dtype=torch.bool, device=boxes.device)
        detections = best_detections(logits, boxes, all_real, self.config.detection_limit)
        return logits, boxes, *detections


class PyramidStage(StageModule):
    """Backbone and neck of a network, without the anchors of the first level."""

    name = "backbone"
    inputs = ("image", "image_size")

    def __init__(self, model: Asag) -> None:
        super().__init__()
        self.model = model
        self.outputs = feature_maps(model.config)

    def forward(self, image: Tensor, image_size: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.model.features(image, image_size))


def six_layer_config(decoder: DecoderType, bundle: Bundle, checkpoint: Checkpoint | None) -> AsagConfig:
    """Return the settings of six layers beside a bundle: as wide as its own decoder is.

    Raises ConfigError if the bundle is of no published variant and there is no checkpoint to look it up in.
    """
    manifest = bundle.manifest
    own = checkpoint.config if checkpoint is not None else VARIANTS.get(manifest.variant)
    if own is None:
        raise ConfigError(
            f"how wide six decoder layers beside '{manifest.variant}' are to be is not known, for it is no "
            "published variant: give the checkpoint that the bundle was exported from with --checkpoint FILE"
        )
    outputs = {tensor.name: tensor for tensor in manifest.graph("backbone").outputs}
    width = outputs[features_among(outputs)[0]].shape[-1]
    if width != own.hidden_dim:
        raise ConfigError(
            f"the bundle's features have {width} channels, but those of {own.variant} {own.hidden_dim}; "
            "give the checkpoint that the bundle was exported from with --checkpoint FILE"
        )
    classes = len(manifest.categories)
    return own.with_changes(decoder=decoder, decoder_layers=LAYERS, heads=1, num_classes=classes)


def query_count(config: AsagConfig) -> int:
    """Return the number of learned queries that a setting stands for (paper, section 5.1).

    It is 100 where the first level predicts 50 anchors a patch, 300 where it predicts 150.
    """
    return 2 * config.first_level_anchors


def six_layer_decoder(config: AsagConfig) -> SixLayerDecoder:
    """Make six layers with random weights, the same every time.

    None is left at zero, as training would begin.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        decoder = SixLayerDecoder(config, query_count(config))
        for parameter in decoder.parameters():
            if parameter.dim() > 1 and not parameter.any():
                nn.init.normal_(parameter, std=0.01)
    return decoder.eval().requires_grad_(False)


def open_six_layers(
    name: str, bundle: Bundle, options: DetectorOptions, checkpoint: Checkpoint | None
) -> SixLayers:
    """Export six layers over the bundle's own pyramid, and load them with the backend of `options`.

    Raises ConfigError as `six_layer_config`, ExportError or BackendError if they cannot be exported or run.
    """
    from asag_export.stage_export import export_stage

    manifest = bundle.manifest
    config = six_layer_config(DECODERS[name], bundle, checkpoint)
    decoder = six_layer_decoder(config)
    precision: Precision = "fp32"
    if manifest.precision == _HALF_PRECISION:
        decoder, precision = decoder.half(), _HALF_PRECISION
    model, _, _ = export_stage(decoder, config, manifest.probing, precision=precision, opset=manifest.opset)
    graphs = {"normalize": None, "backbone": feature_pyramid(bundle), "decoder": model}
    with scratch_folder() as folder:
        whole = several_graphs(graphs, bundle, folder)
        network = options.open_network(whole)
    return SixLayers(name, manifest, network)


class SixLayers:
    """A detector of six decoder layers: pixels, pyramid, layers, detections."""

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
        features = network.stage("backbone")({"image": prepared.image, "image_size": image_size})
        outputs = network.stage("decoder")({**features, "image_size": image_size})
        begin = time.perf_counter()
        scores, labels, boxes = (network.download(outputs[result]) for result in _RESULTS)
        for i, image in enumerate(images):
            shape = (image.shape[0], image.shape[1])
            detections_of(scores[i], labels[i], boxes[i], original_shape=shape, nms_iou=None)
        times_ms["postprocess"] = since(begin)
        times_ms["total"] = since(start)
        return Run(total_ms=times_ms["total"], phases_ms=split(network, times_ms))


def _spread_boxes(queries: int) -> Tensor:
    """Draw boxes everywhere and of all sizes, as learned ones end up.

    Returns (Q, 4) cxcywh relative to the image.
    """
    centres = 0.05 + 0.9 * torch.rand(queries, 2)
    sizes = 0.05 * 12.0 ** torch.rand(queries, 2)
    return torch.cat([centres, sizes], dim=-1)
