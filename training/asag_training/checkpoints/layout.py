"""Names and shapes of the tensors a network has, and the network that has given names and shapes."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from asag_training.network.config import (
    DEFORMABLE,
    RESNET,
    VARIANTS,
    AsagConfig,
    DecoderType,
    asag_100,
    asag_300,
    asag_crowdhuman,
)
from asag_training.network.deformable import MAPS
from asag_training.network.model import Asag

Layout = Mapping[str, tuple[int, ...]]

_NAMED = 3
"""As many tensors of a kind a message names."""
_NEAR, _COMPARED = 0.9, 500
"""How alike two names are to be shown, from 0 to 1, and how many are looked at."""
_SHOWN_BY_SHAPES = (
    *(
        "decoder",
        "backbone",
        "backbone_depth",
        "backbone_width",
        "separable_neck",
        "finest_map",
        "num_classes",
        "hidden_dim",
        "ffn_dim",
        "attention_heads",
    ),
    *("in_points", "out_points", "groups", "dynamic_dim", "patch_size", "first_level_size", "compress_dim"),
    *("encoder_layers", "deformable_points", "deformable_ffn_dim"),
    *("first_level_anchors", "patch_anchors"),
)
"""The settings that make a published variant's layout; parallel decoders can have been left out."""
_DEPTHS = {101: "layer3.22", 50: "layer3.5"}
"""By the block that no shallower ResNet has."""
_BODY = "backbone.0.body."
_DEPTH_OF_NONE = AsagConfig(variant="").backbone_depth
"""The setting where there is no ResNet."""
_DECODERS: dict[DecoderType, str] = {"adamixer": "decoder.bbox_head.", DEFORMABLE: "decoder.layers."}
"""What decoders' tensors are called; those of a Sparse R-CNN are what is left."""
_ENCODER_KEY = re.compile(r"encoder\.layers\.(\d+)\.")
_HEAD_KEY = re.compile(r"decoder\.(?:bbox_head|head_series|layers)\.(\d+)\.")


def layout_of(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the layout of given tensors."""
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


@lru_cache(maxsize=64)
def expected_layout(config: AsagConfig) -> Layout:
    """Return the layout of the network with these settings (built without memory for its weights)."""
    with torch.device("meta"):
        return layout_of(Asag(config).state_dict())


def mismatch(found: Layout, expected: Layout) -> str | None:
    """Say how `found` differs from `expected`, naming the first tensors of each kind; None if it does not."""
    kinds = _kinds(found, expected)
    said = [f"{kind}: {_first(names)}" for kind, names in kinds.items() if names]
    return "; ".join(said + _renamed(kinds["missing"], kinds["unexpected"])) or None


def differences(found: Layout, expected: Layout) -> str | None:
    """Say in few words how another network's layout differs: three tensors at most, and how many more.

    None if it does not.
    """
    kinds = {kind: names for kind, names in _kinds(found, expected).items() if names}
    each = _NAMED // max(len(kinds), 1)
    more = sum(max(len(names) - each, 0) for names in kinds.values())
    said = "; ".join(f"{kind}: {', '.join(names[:each])}" for kind, names in kinds.items())
    return (said + (f"; and {more} more" if more else "")) or None


def _kinds(found: Layout, expected: Layout) -> dict[str, list[str]]:
    """Return the tensors in which `found` differs, by how they do."""
    return {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "misshapen": [
            f"{name} {_text(found[name])} instead of {_text(shape)}"
            for name, shape in expected.items()
            if name in found and found[name] != shape
        ],
    }


def count_heads(names: Iterable[str]) -> int:
    """Count the parallel decoders of one layer that tensors of these names make up.

    (Those of several layers look the same; only our own checkpoints have any, and say so.)
    """
    return len({match[1] for match in map(_HEAD_KEY.match, names) if match})


def infer_config(found: Layout, *, data_set: str | None = None) -> AsagConfig | None:
    """Return the settings of the network that has this layout, or None if there is none.

    A published variant where one fits; otherwise the settings that are published for as many anchors, with
    what the shapes tell changed in them.  `data_set` is what it was trained on [dataset_file], if known.
    """
    config = nearest_config(found, data_set=data_set)
    if config is None or expected_layout(config) != found:
        return None
    for published in VARIANTS.values():
        possible = data_set in (None, "crowdhuman") or not published.variant.endswith("crowdhuman")
        if possible and all(getattr(published, name) == getattr(config, name) for name in _SHOWN_BY_SHAPES):
            return published.with_changes(heads=config.heads)
    return config


def nearest_config(found: Layout, *, data_set: str | None = None) -> AsagConfig | None:
    """Return the settings that a few tensors' shapes tell, whether or not the others fit; None if none do."""
    try:
        config = _custom_config(found, crowdhuman=data_set == "crowdhuman")
        expected_layout(config)
    except (KeyError, IndexError, ValueError, ZeroDivisionError, RuntimeError):
        return None  # a tensor lacks, or its shape is no network's
    return config


def _custom_config(found: Layout, *, crowdhuman: bool) -> AsagConfig:
    decoder: DecoderType = next((name for name, own in _DECODERS.items() if _any(found, own)), "sparse-rcnn")
    first_level_anchors = found["anchor_generator.proj_all.layers.2.weight"][0] // 5
    preset = asag_crowdhuman if crowdhuman else asag_100 if first_level_anchors == 50 else asag_300
    deformable = decoder == DEFORMABLE
    hidden_dim = found["neck.input_proj.0.0.weight" if deformable else "neck.inner_blocks.0.0.weight"][0]
    first, patch, _ = (math.isqrt(found[f"anchor_generator.layernorm.{i}.weight"][0]) for i in range(3))
    backbone = _backbone_settings(found)
    depth = backbone["backbone_depth"]
    kind = f"r{depth}" if backbone["backbone"] == RESNET else backbone["backbone"]
    name = f"asag-{decoder[0]}-{kind}-custom{'-crowdhuman' if crowdhuman else ''}"
    return preset(name, decoder, depth).with_changes(
        **backbone,
        separable_neck="neck.layer_blocks.0.1.weight" in found,
        finest_map="P2" if "neck.inner_blocks.3.0.weight" in found else "P3",
        num_classes=found["rpn.fc_cls.weight"][0],
        heads=count_heads(found),
        hidden_dim=hidden_dim,
        ffn_dim=found["rpn.tokens_proj.layers.0.weight"][0],
        attention_heads=found["rpn.iof_tau"][0],
        patch_size=patch,
        first_level_size=None if first == patch else 2 * first,
        compress_dim=found["anchor_generator.P6.weight"][0],
        first_level_anchors=first_level_anchors,
        patch_anchors=found["anchor_generator.proj_patch.layers.2.weight"][0] // 5,
        **_OF_DECODER[decoder](found, hidden_dim),
    )


def _backbone_settings(found: Layout) -> dict[str, Any]:
    stem = found.get(f"{_BODY}conv_stem.weight")
    if stem is not None:
        size = "medium" if f"{_BODY}blocks.0.0.conv_exp.weight" in found else "small"
        return {
            "backbone": f"mobilenetv4-conv-{size}",
            "backbone_depth": _DEPTH_OF_NONE,
            "backbone_width": stem[0],
        }
    depth = next((depth for depth, last in _DEPTHS.items() if _any(found, f"{_BODY}{last}.")), 26)
    return {
        "backbone": RESNET,
        "backbone_depth": depth,
        "backbone_width": found[f"{_BODY}conv1.weight"][0],
    }


def _adamixer_settings(found: Layout, hidden_dim: int) -> dict[str, Any]:
    stage = "decoder.bbox_head.0.sampling_n_mixing"
    points = found[f"{stage}.sampling_offset_generator.0.weight"][0] // 3  # x, y, z of groups * in_points
    out_points = found[f"{stage}.adaptive_mixing.out_proj.weight"][1] // hidden_dim
    # A group's parameters mix channels, (hidden / groups)^2 of them, and points, in_points * out_points.
    channel_mix = found[f"{stage}.adaptive_mixing.parameter_generator.0.weight"][0] - points * out_points
    groups = hidden_dim**2 // channel_mix
    return {"groups": groups, "in_points": points // groups, "out_points": out_points}


def _sparse_rcnn_settings(found: Layout, hidden_dim: int) -> dict[str, Any]:
    inner = found["decoder.head_series.0.inst_interact.dynamic_layer.weight"][0]
    return {"dynamic_dim": inner // (2 * hidden_dim)}


def _deformable_settings(found: Layout, hidden_dim: int) -> dict[str, Any]:
    weights = found["encoder.layers.0.self_attn.attention_weights.weight"][0]  # of heads * maps * points
    layers = {match[1] for match in map(_ENCODER_KEY.match, found) if match}
    return {
        "encoder_layers": len(layers),
        "deformable_points": weights // (MAPS * found["rpn.iof_tau"][0]),
        "deformable_ffn_dim": found["encoder.layers.0.linear1.weight"][0],
    }


_OF_DECODER: dict[DecoderType, Callable[[Layout, int], dict[str, Any]]] = {
    "adamixer": _adamixer_settings,
    "sparse-rcnn": _sparse_rcnn_settings,
    DEFORMABLE: _deformable_settings,
}


def _renamed(missing: list[str], unexpected: list[str]) -> list[str]:
    """Say which names are nearly those that lack."""
    said = []
    for name in missing[:_NAMED]:
        near = difflib.get_close_matches(name, unexpected[:_COMPARED], n=1, cutoff=_NEAR)
        said += [f"'{near[0]}' is nearly '{name}'" for _ in near]
    return said


def _any(found: Layout, prefix: str) -> bool:
    return any(name.startswith(prefix) for name in found)


def _first(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _text(shape: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, shape))})"
