"""ImageNet weights for the backbone, under torchvision's names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from asag_deploy.errors import CheckpointError
from asag_training.checkpoints.containers import find_weights
from asag_training.checkpoints.layout import expected_layout, layout_of, mismatch
from asag_training.checkpoints.reading import as_float32, read_weight_file
from asag_training.network.config import BACKBONE_DEPTHS, AsagConfig
from asag_training.network.model import Asag

_PREFIX = "backbone.0.body."
_CLASSIFIER = "fc."
_NAMES = re.compile(r"(?:^|(?<=\.))(?=(?:conv1|bn1|layer[1-4]|fc)\.)")


def load_backbone(model: Asag, path: str | Path) -> tuple[str, ...]:
    """Give the network's backbone the weights of a torchvision-named ResNet (.pth or .safetensors).

    They may be those of a whole detector's backbone.  The classifier and BatchNorm's counters are left out.
    Return sentences about what was taken.  Raises CheckpointError, which names the first tensors that do not
    fit and the depth that would.
    """
    path = Path(path)
    found = find_weights(path, read_weight_file(path), _root)
    weights = {
        _PREFIX + name: tensor for name, tensor in found.tensors.items() if not name.startswith(_CLASSIFIER)
    }
    _check(path, weights, model.config)
    model.load_state_dict(as_float32(path, weights), strict=False)
    return found.notes


def _root(name: str) -> int:
    match = _NAMES.search(name)
    return -1 if match is None else match.start()


def _check(path: Path, weights: Mapping[str, Tensor], config: AsagConfig) -> None:
    misfits = {
        depth: _misfit(weights, config.with_changes(backbone_depth=depth)) for depth in BACKBONE_DEPTHS
    }
    wrong = misfits[config.backbone_depth]
    if wrong is None:
        return
    fitting = [f"ResNet-{depth}" for depth, misfit in misfits.items() if misfit is None]
    advice = f"it is a {fitting[0]}" if fitting else "it is no ResNet that the network can have"
    raise CheckpointError(f"'{path}' does not hold a ResNet-{config.backbone_depth} ({wrong}); {advice}")


def _misfit(weights: Mapping[str, Tensor], config: AsagConfig) -> str | None:
    expected = {name: shape for name, shape in expected_layout(config).items() if name.startswith(_PREFIX)}
    wrong = mismatch(layout_of(weights), expected)
    return wrong and wrong.replace(_PREFIX, "")
