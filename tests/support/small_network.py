"""A network of every part but few channels: what most export tests run on."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from asag_deploy.bundle.bundle import Bundle
from asag_export import bundle_export, stage_export
from asag_export.bundle_export import export_bundle
from asag_training.checkpoints import Checkpoint, untrained_checkpoint
from asag_training.network.config import AsagConfig, variant_config

_ENCODER = {"encoder_layers", "deformable_points", "deformable_ffn_dim"}
_DECODER = {"decoder", "ffn_dim", "in_points", "out_points", "groups", "dynamic_dim", *_ENCODER}
_BACKBONE = {"backbone", "backbone_depth", "backbone_width", "separable_neck"}
_RESULTS = {"num_classes", "anchor_cap", "max_detections", "detection_nms_iou"}
OF_NO_MATTER = {
    "backbone": {*_DECODER, *_RESULTS, "max_patches"},
    "probe_p4": {*_DECODER, *_RESULTS, *_BACKBONE},
    "probe_p3": {*_DECODER, *_RESULTS, *_BACKBONE},
    "decoder": _BACKBONE,
}
"""Settings that leave a stage as it is: variants that differ in nothing else share that stage."""


def what_matters(stage: str, config: AsagConfig) -> Any:
    """What a stage of that name is like: equal for networks that may differ in nothing but its weights."""
    if stage == "normalize":
        return stage
    of_no_matter = OF_NO_MATTER[stage]
    if stage == "backbone" and config.decoder == "deformable-detr":
        of_no_matter = of_no_matter - {"decoder", *_ENCODER}
    settings = {name: value for name, value in config.to_dict().items() if name not in of_no_matter}
    return stage, tuple(sorted((settings | {"variant": ""}).items(), key=str))


def small_config(variant: str = "asag-a-r50-100", **changes: Any) -> AsagConfig:
    """The variant, narrowed."""
    narrow = {"hidden_dim": 32, "backbone_width": 8, "ffn_dim": 64, "out_points": 16, "in_points": 8}
    narrow |= {"encoder_layers": 2, "deformable_ffn_dim": 48}
    return variant_config(variant).with_changes(**{**narrow, **changes})


def small_checkpoint(variant: str = "asag-a-r50-100", **changes: Any) -> Checkpoint:
    """Random weights for it, all of which matter: nothing is left at zero as it is where training begins.

    Its anchors differ, so that every decision there is to make goes either way.
    """
    checkpoint = untrained_checkpoint(small_config(variant, **changes))
    generator = torch.Generator().manual_seed(0)
    state = dict(checkpoint.state)
    for name, tensor in state.items():
        if "layernorm" in name and tensor.dim() > 1 and name.endswith("weight"):
            # Drawn around 0 they would take the picture out of the tokens, and all anchors would be alike.
            state[name] = torch.ones_like(tensor)
        elif tensor.dim() > 1 and not tensor.any():
            state[name] = 0.05 * torch.randn(tensor.shape, generator=generator)
    return dataclasses.replace(checkpoint, state=state)


def export_small(path: Path, variant: str = "asag-a-r50-100", **options: Any) -> Bundle:
    """Export it, gate included."""
    return export_bundle(small_checkpoint(variant), path, **options).bundle


def replay_exports(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let an export of the network that `bundle` is of, with the same options, take its stages from there.

    Stages in another precision are exported; the names of these are added to the list that comes back.
    """
    manifest, exported = bundle.manifest, list[str]()

    def export_stage(stage: Any, config: AsagConfig, probing: Any, *, precision: Any, opset: int) -> Any:
        assert (config.variant, probing, opset) == (manifest.variant, manifest.probing, manifest.opset)
        if precision != manifest.precision:
            exported.append(stage.name)
            return stage_export.export_stage(stage, config, probing, precision=precision, opset=opset)
        spec = manifest.graph(stage.name)
        return onnx.load(bundle.graph_path(stage.name)), spec.inputs, spec.outputs

    monkeypatch.setattr(bundle_export, "export_stage", export_stage)
    return exported
