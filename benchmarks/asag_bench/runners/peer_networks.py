"""The networks of the peers: settings written here from their papers, layers by `transformers`.

Nothing is downloaded: weights are random, the same every time.  Only networks of `transformers` are used, and
none of its image processors, so that it needs neither torchvision nor timm.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any, cast

import onnx
import torch
from torch import Tensor, nn

from asag_bench.runners.peers import BEST, GRAPH, PEERS, PIXELS, RESULTS, Peer
from asag_deploy.bundle.manifest import TensorSpec
from asag_deploy.errors import ConfigError
from asag_deploy.extras import missing
from asag_export.stage_export import export_module
from asag_training.network.stages import best_detections

COCO_CLASSES = 80
COCO_CATEGORIES = 91
"""RF-DETR numbers its classes as COCO does, which leaves gaps."""
_SEED = 0
_NO_CHECKS = "TRANSFORMERS_DISABLE_TORCH_CHECK"
"""A variable of `transformers`.  Its checks depend on values, and ONNX has no operator for them."""
_TWO_BRANCHES = ("DFineRepVggBlock", "RTDetrV2RepVggBlock")


def d_fine_s() -> nn.Module:
    """Build D-FINE-S: HGNetV2-B0, a hybrid encoder of half width and a third of the depth, three layers."""
    from transformers import DFineConfig, DFineForObjectDetection, HGNetV2Config

    backbone = HGNetV2Config(
        embedding_size=32,
        stem_channels=[3, 16, 16],
        hidden_sizes=[128, 256, 512, 1024],
        stage_in_channels=[16, 64, 256, 512],
        stage_mid_channels=[16, 32, 64, 128],
        stage_out_channels=[64, 256, 512, 1024],
        stage_num_blocks=[1, 1, 2, 1],
        stage_numb_of_layers=[3, 3, 3, 3],
        stage_downsample=[False, True, True, True],
        stage_light_block=[False, False, True, True],
        stage_kernel_size=[3, 3, 5, 5],
        use_learnable_affine_block=True,
        out_indices=[2, 3, 4],
    )
    config = DFineConfig(
        backbone_config=backbone,
        encoder_in_channels=[256, 512, 1024],
        hidden_expansion=0.5,
        depth_mult=0.34,
        decoder_layers=3,
        decoder_n_points=[3, 6, 3],
        num_labels=COCO_CLASSES,
    )
    network = DFineForObjectDetection(config)
    network.model.enc_bbox_head = BoxesOfChosen(network.model.enc_bbox_head)
    return cast(nn.Module, network)


def rt_detr_v2_r50() -> nn.Module:
    """Build RT-DETRv2-R50: ResNet-50-vd, a hybrid encoder, six layers of four points a level."""
    from transformers import RTDetrResNetConfig, RTDetrV2Config, RTDetrV2ForObjectDetection

    backbone = RTDetrResNetConfig(
        embedding_size=64,
        hidden_sizes=[256, 512, 1024, 2048],
        depths=[3, 4, 6, 3],
        layer_type="bottleneck",
        out_indices=[2, 3, 4],
    )
    config = RTDetrV2Config(
        backbone_config=backbone,
        encoder_in_channels=[512, 1024, 2048],
        decoder_layers=6,
        decoder_n_points=4,
        num_labels=COCO_CLASSES,
    )
    return cast(nn.Module, RTDetrV2ForObjectDetection(config))


def rf_detr_n() -> nn.Module:
    """Build RF-DETR-N: DINOv2-S in two by two windows, patches of 16 pixels, two layers over one level."""
    from transformers import RfDetrConfig, RfDetrForObjectDetection
    from transformers.models.rf_detr import RfDetrDinov2Config

    backbone = RfDetrDinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        image_size=384,
        patch_size=16,
        num_windows=2,
        out_features=["stage3", "stage6", "stage9", "stage12"],
    )
    config = RfDetrConfig(
        backbone_config=backbone, decoder_layers=2, decoder_n_points=2, num_labels=COCO_CATEGORIES
    )
    return cast(nn.Module, RfDetrForObjectDetection(config))


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "d-fine-s": d_fine_s,
    "rt-detrv2-r50": rt_detr_v2_r50,
    "rf-detr-n": rf_detr_n,
}
"""What builds each peer, by the name of the reference."""


def build_peer(name: str) -> nn.Module:
    """Build a peer's network with random weights, the same every time, in the form that it is deployed in.

    Raises ConfigError if `transformers` is missing or does not have it.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            network = BUILDERS[name]()
    except ImportError as error:
        purpose = f"the reference '{name}'"
        raise ConfigError(missing(error, "asag-bench", purpose=purpose)) from error
    return merge_branches(network.eval().requires_grad_(False))


def merge_branches(network: nn.Module) -> nn.Module:
    """Replace every two convolutions that are added up by the one that computes the same; in place.

    Hybrid encoders are trained with a branch of 3x3 and one of 1x1 (RepVGG, arXiv 2101.03697), and deployed
    without: published costs count one.
    """
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if type(child).__name__ in _TWO_BRANCHES:
                setattr(parent, name, _merged(child))
    return network


def _merged(block: Any) -> nn.Module:
    wide: nn.Conv2d = block.conv1.conv
    (weight, bias), (point, shift) = _folded(block.conv1), _folded(block.conv2)
    one = nn.Conv2d(wide.in_channels, wide.out_channels, 3, padding=1, device=weight.device)
    one.weight = nn.Parameter(weight + nn.functional.pad(point, [1, 1, 1, 1]), requires_grad=False)
    one.bias = nn.Parameter(bias + shift, requires_grad=False)
    return nn.Sequential(one, block.activation).eval()


def _folded(layer: Any) -> tuple[Tensor, Tensor]:
    """Return weight and bias of a convolution with the BatchNorm after it."""
    norm = layer.norm
    scale: Tensor = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    weight: Tensor = layer.conv.weight * scale[:, None, None, None]
    return weight, norm.bias - norm.running_mean * scale


class BoxesOfChosen(nn.Module):
    """The first box predictor of D-FINE, run where a query begins alone, as D-FINE has it.

    `transformers` predicts a box everywhere and then chooses, for 2.1 GFLOPs more than were published.  What
    this returns stands for all boxes, until some are chosen.
    """

    def __init__(self, predictor: nn.Module) -> None:
        super().__init__()
        self.predictor = predictor

    def forward(self, features: Tensor) -> _ToChoose:
        return _ToChoose(self.predictor, features, None)


class _ToChoose:
    """Boxes (B, N, 4) that are computed when some of them are gathered."""

    def __init__(self, predictor: nn.Module, features: Tensor, offsets: Tensor | None) -> None:
        self._predictor, self._features, self._offsets = predictor, features, offsets
        self.shape = (*features.shape[:2], 4)

    def __add__(self, offsets: Tensor) -> _ToChoose:
        return _ToChoose(self._predictor, self._features, offsets)

    def gather(self, dim: int, index: Tensor) -> Tensor:
        """Predict the boxes of `index` (B, Q, 4), which is the same along its last axis."""
        assert dim == 1
        assert self._offsets is not None
        at = index[..., :1].expand(-1, -1, self._features.shape[-1])
        boxes: Tensor = self._predictor(self._features.gather(1, at))
        offsets = self._offsets.expand(len(index), -1, -1)
        return boxes + offsets.gather(1, index)


class PeerStage(nn.Module):
    """A peer from pixels to detections.

    pixels uint8 (B, side, side, 3) RGB in; the best detections out, as a bundle's decoder gives them: scores
    (B, 300), labels int64 (B, 300), and boxes (B, 300, 4) xyxy relative to the image.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, peer: Peer) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", 255 * torch.tensor(peer.mean).view(3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(peer.std).view(3, 1, 1))

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        image = (pixels.permute(0, 3, 1, 2).contiguous().float() - self.mean) / self.std
        found = self.network(pixel_values=image)
        logits, boxes = found.logits, found.pred_boxes
        all_real = torch.ones(logits.shape[:2], dtype=torch.bool)
        return best_detections(logits, boxes, all_real, BEST)


@functools.lru_cache(maxsize=1)  # several backends ask for the same, one after the other
def export_peer(name: str, images: int, opset: int) -> onnx.ModelProto:
    """Export a peer for batches of so many images; every size in the graph is fixed.

    Raises ConfigError as `build_peer`, ExportError if PyTorch cannot export it.
    """
    peer = PEERS[name]
    stage = PeerStage(build_peer(name), peer).eval()
    pixels = torch.zeros(images, peer.side, peer.side, 3, dtype=torch.uint8)
    given = TensorSpec(name=PIXELS, dtype="uint8", shape=tuple(pixels.shape))
    with without_checks():
        with torch.no_grad():
            results = stage(pixels)
        outputs = tuple(_spec(name, result) for name, result in zip(RESULTS, results, strict=True))
        model = export_module(stage, GRAPH, (pixels,), (given,), outputs, opset=opset)
    leave_unsorted(model, queries=not peer.ranks_queries)
    return model


def leave_unsorted(model: onnx.ModelProto, *, queries: bool) -> None:
    """Let TopK give the best detections in any order: in order they take up to 30 ms more in OpenVINO.

    They are sorted at the end, as a bundle's are.  queries: so, too, the first choice, that of the queries.
    """
    choices = [node for node in model.graph.node if node.op_type == "TopK"]
    for node in (choices[0], choices[-1]) if queries else choices[-1:]:
        kept = [attribute for attribute in node.attribute if attribute.name != "sorted"]
        del node.attribute[:]
        node.attribute.extend([*kept, onnx.helper.make_attribute("sorted", 0)])


def _spec(name: str, result: Tensor) -> TensorSpec:
    return TensorSpec(name=name, dtype=str(result.dtype).removeprefix("torch."), shape=tuple(result.shape))


@contextlib.contextmanager
def without_checks() -> Iterator[None]:
    """Let the body export what `transformers` would check, which ONNX cannot."""
    before = os.environ.get(_NO_CHECKS)
    os.environ[_NO_CHECKS] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_NO_CHECKS]
        else:
            os.environ[_NO_CHECKS] = before
