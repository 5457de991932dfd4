"""ImageNet weights for the backbone: ResNet under torchvision's names, MobileNetV4 under timm's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from asag_deploy.errors import CheckpointError
from asag_deploy.fetching.locate import local_checkpoint
from asag_training.checkpoints.containers import find_weights
from asag_training.checkpoints.layout import expected_layout, layout_of, mismatch
from asag_training.checkpoints.reading import as_float32, read_weight_file
from asag_training.network.config import BACKBONE_DEPTHS, BACKBONES, RESNET, AsagConfig
from asag_training.network.mobilenet import STANDARD_WIDTH as MOBILENET_WIDTH
from asag_training.network.model import Asag

_PREFIX = "backbone.0.body."
_CLASSIFIERS = ("fc.", "blocks.4.", "conv_head.", "norm_head.", "classifier.")
"""What serves classification in a ResNet, and in a MobileNetV4."""
_NAMES = re.compile(
    r"(?:^|(?<=\.))(?=(?:conv1|bn1|layer[1-4]|fc|conv_stem|blocks|conv_head|norm_head|classifier)\.)"
)


def load_backbone(model: Asag, path: str | Path) -> tuple[str, ...]:
    """Give the network's backbone the weights of a ResNet or MobileNetV4 (.pth or .safetensors).

    Their names are torchvision's and timm's.  They may be those of a whole detector's backbone.  The
    classifier and BatchNorm's counters are left out.  Return sentences about what was taken.  Raises
    CheckpointError, which names the first tensors that do not fit and the backbone that would.
    """
    path = local_checkpoint(path)
    found = find_weights(path, read_weight_file(path), _root)
    weights = {
        _PREFIX + name: tensor for name, tensor in found.tensors.items() if not name.startswith(_CLASSIFIERS)
    }
    _check(path, weights, model.config)
    model.load_state_dict(as_float32(path, weights), strict=False)
    return found.notes


def _root(name: str) -> int:
    match = _NAMES.search(name)
    return -1 if match is None else match.start()


def _check(path: Path, weights: Mapping[str, Tensor], config: AsagConfig) -> None:
    wrong = _misfit(weights, config)
    if wrong is None:
        return
    others = (config.with_changes(**changes) for changes in _other_backbones(config))
    fitting = [_title(other) for other in others if _misfit(weights, other) is None]
    advice = f"it is a {fitting[0]}" if fitting else "it is no backbone that the network can have"
    raise CheckpointError(f"'{path}' does not hold a {_title(config)} ({wrong}); {advice}")


def _other_backbones(config: AsagConfig) -> list[dict[str, Any]]:
    """List the settings of all backbones: as wide as the network's, or of the usual width of another kind."""
    resnet = config.backbone == RESNET
    usual = {
        name: AsagConfig(variant="").backbone_width if name == RESNET else MOBILENET_WIDTH
        for name in BACKBONES
    }
    return [
        {
            "backbone": name,
            "backbone_depth": depth,
            "backbone_width": config.backbone_width if resnet == (name == RESNET) else usual[name],
        }
        for name in BACKBONES
        for depth in (BACKBONE_DEPTHS if name == RESNET else (config.backbone_depth,))
    ]


def _title(config: AsagConfig) -> str:
    """Name a backbone as its paper does."""
    if config.backbone == RESNET:
        return f"ResNet-{config.backbone_depth}"
    return config.backbone.title().replace("Mobilenetv4", "MobileNetV4")


def _misfit(weights: Mapping[str, Tensor], config: AsagConfig) -> str | None:
    expected = {name: shape for name, shape in expected_layout(config).items() if name.startswith(_PREFIX)}
    wrong = mismatch(layout_of(weights), expected)
    return wrong and wrong.replace(_PREFIX, "")
