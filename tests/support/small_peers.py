"""The peers in small: the same layers as those that are timed, a few channels wide."""

from __future__ import annotations

import torch
from torch import nn

from asag_bench.runners.peer_networks import BoxesOfChosen

SIDE = 64
CLASSES = 5
_NARROW = {
    "d_model": 32,
    "encoder_hidden_dim": 32,
    "encoder_ffn_dim": 32,
    "encoder_attention_heads": 4,
    "decoder_in_channels": [32, 32, 32],
    "decoder_ffn_dim": 32,
    "decoder_attention_heads": 4,
    "encoder_in_channels": [8, 16, 16],
    "decoder_layers": 2,
    "num_queries": 70,
    "num_labels": CLASSES,
}


def small_d_fine() -> nn.Module:
    from transformers import DFineConfig, DFineForObjectDetection, HGNetV2Config

    backbone = HGNetV2Config(
        embedding_size=8,
        stem_channels=[3, 4, 4],
        hidden_sizes=[8, 8, 16, 16],
        stage_in_channels=[4, 8, 8, 16],
        stage_mid_channels=[4, 4, 4, 4],
        stage_out_channels=[8, 8, 16, 16],
        stage_num_blocks=[1, 1, 1, 1],
        stage_numb_of_layers=[1, 1, 1, 1],
        stage_downsample=[False, True, True, True],
        stage_light_block=[False, False, True, True],
        stage_kernel_size=[3, 3, 5, 5],
        use_learnable_affine_block=True,
        out_indices=[2, 3, 4],
    )
    config = DFineConfig(backbone_config=backbone, depth_mult=0.34, decoder_n_points=[1, 2, 1], **_NARROW)
    network = DFineForObjectDetection(config)
    network.model.enc_bbox_head = BoxesOfChosen(network.model.enc_bbox_head)
    return randomised(network)


def small_rt_detr() -> nn.Module:
    from transformers import RTDetrResNetConfig, RTDetrV2Config, RTDetrV2ForObjectDetection

    backbone = RTDetrResNetConfig(
        embedding_size=4, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], out_indices=[2, 3, 4]
    )
    return randomised(RTDetrV2ForObjectDetection(RTDetrV2Config(backbone_config=backbone, **_NARROW)))


def small_rf_detr() -> nn.Module:
    from transformers import RfDetrConfig, RfDetrForObjectDetection
    from transformers.models.rf_detr import RfDetrDinov2Config

    backbone = RfDetrDinov2Config(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=8,
        num_windows=2,
        out_features=["stage1", "stage2"],
    )
    config = RfDetrConfig(
        backbone_config=backbone,
        d_model=32,
        c2f_num_blocks=1,
        decoder_layers=2,
        decoder_ffn_dim=32,
        decoder_n_points=2,
        decoder_self_attention_heads=4,
        decoder_cross_attention_heads=4,
        num_queries=60,
        group_detr=1,
        num_labels=CLASSES,
    )
    return randomised(RfDetrForObjectDetection(config))


def randomised(network: nn.Module) -> nn.Module:
    """Draw weights and statistics anew: some layers begin with zeros, which would hide their work."""
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        if name.endswith("running_var"):
            nn.init.uniform_(tensor, 0.5, 2.0)
        elif name.endswith("running_mean") or ("weight" in name and tensor.dim() > 1):
            nn.init.normal_(tensor, std=0.2)
        elif "norm" in name and name.endswith("weight"):
            nn.init.uniform_(tensor, 0.5, 1.5)
        elif name.endswith("bias"):
            nn.init.normal_(tensor, std=0.1)
    return network


SMALL = {"d-fine-s": small_d_fine, "rt-detrv2-r50": small_rt_detr, "rf-detr-n": small_rf_detr}
"""By the name of the reference."""


def picture_batch(images: int) -> torch.Tensor:
    """Pixels uint8 (B, side, side, 3)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (images, SIDE, SIDE, 3), dtype=torch.uint8, generator=generator)
