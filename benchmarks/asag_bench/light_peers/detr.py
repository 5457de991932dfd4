"""A DETR-like peer: D-FINE (arXiv 2410.13842) by `transformers`, on the light network's backbone.

Encoder, decoder, denoising, matching and losses are the library's; the sizes are those of D-FINE-N, but for
the map of stride 8, without which objects of a few pixels could not be found.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from asag_deploy.errors import ConfigError
from asag_deploy.extras import missing
from asag_training.losses.targets import Targets
from asag_training.network.backbone import Backbone
from asag_training.network.config import AsagConfig

_STRIDES = (8, 16, 32)
_LEVELS = len(_STRIDES)
_FFN = 4
"""Widths of the feed-forward layers, in widths of the network."""


def cells_of(canvas: tuple[int, int]) -> int:
    """Return how many cells the maps of a padded picture of this height and width have together."""
    return sum(-(-canvas[0] // stride) * -(-canvas[1] // stride) for stride in _STRIDES)


def check_cells(queries: int, canvas: tuple[int, int]) -> None:
    """Raise ConfigError if a padded picture of this height and width has fewer cells than queries."""
    cells = cells_of(canvas)
    if queries > cells:
        raise ConfigError(
            f"the maps of a picture of {canvas[0]}x{canvas[1]} have {cells} cells, too few for the peer's "
            f"{queries} queries: train it with --queries {cells} at most, or leave such pictures out"
        )


class DetrDetector(nn.Module):
    """image (B, 3, H, W), normalised -> logits (B, Q, classes) and boxes (B, Q, 4) cxcywh relative to it.

    A picture must have as many cells at strides 8, 16 and 32 as there are queries, Q.

    Raises ConfigError where `transformers` is missing.
    """

    def __init__(self, config: AsagConfig, queries: int) -> None:
        super().__init__()
        try:
            from transformers import DFineConfig, DFineForObjectDetection, HGNetV2Config
        except ImportError as error:
            raise ConfigError(missing(error, "asag-bench", purpose="the peer 'd-fine-lite'")) from error
        backbone = Backbone(config)
        backbone.body.learn_statistics()
        channels = list(backbone.body.channels[-_LEVELS:])
        width, heads = config.hidden_dim, config.attention_heads * 2
        self.queries = queries
        self.network: Any = DFineForObjectDetection(
            DFineConfig(
                # Replaced below; until then it is as small as it can be, with as many channels.
                backbone_config=HGNetV2Config(
                    embedding_size=8,
                    stem_channels=[3, 8, 8],
                    hidden_sizes=[8, *channels],
                    stage_in_channels=[8, 8, *channels[:-1]],
                    stage_mid_channels=[8] * 4,
                    stage_out_channels=[8, *channels],
                    stage_num_blocks=[1] * 4,
                    stage_numb_of_layers=[1] * 4,
                    stage_downsample=[False, True, True, True],
                    stage_light_block=[False] * 4,
                    stage_kernel_size=[3] * 4,
                    out_indices=[2, 3, 4],
                ),
                encoder_in_channels=channels,
                encoder_hidden_dim=width,
                encoder_ffn_dim=_FFN * width,
                encoder_attention_heads=heads,
                decoder_in_channels=[width] * _LEVELS,
                d_model=width,
                decoder_ffn_dim=_FFN * width,
                decoder_attention_heads=heads,
                decoder_layers=3,
                decoder_n_points=[3, 6, 3],
                hidden_expansion=0.34,
                depth_mult=0.5,
                num_queries=queries,
                num_labels=config.num_classes,
            )
        )
        self.network.model.backbone = _WithMasks(backbone)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        found = self.network(pixel_values=image)
        return found.logits, found.pred_boxes

    def losses(self, image: Tensor, targets: list[Targets], image_size: Tensor) -> dict[str, Tensor]:
        """Return the losses by name, weighted, to be added up.

        targets: boxes relative to each image's valid size, which is a row of image_size (B, 2), height and
        width.  Denoising draws from PyTorch's global generator.
        """
        canvas = torch.tensor(image.shape[-2:])
        labels = []
        for target, size in zip(targets, image_size, strict=True):
            part = (size / canvas).flip(0).repeat(2)
            labels.append({"class_labels": target.labels, "boxes": target.boxes * part})
        named: dict[str, Tensor] = self.network(pixel_values=image, labels=labels).loss_dict
        return named


class _WithMasks(nn.Module):
    """A backbone as D-FINE takes it: pairs of a map and of the mask that it does not look at."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, image: Tensor, mask: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [(features, mask) for features in self.backbone(image)[-_LEVELS:]]
