"""Weights together with all that is needed to use them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from asag_deploy.bundle.manifest import Category, Preprocessing
from asag_deploy.errors import CheckpointError, ConfigError, plural
from asag_training.checkpoints.layout import expected_layout, layout_of, mismatch
from asag_training.network.config import AsagConfig, default_categories, own_preprocessing, variant_config
from asag_training.network.model import build
from asag_training.settings import apply_changes

CLASSES_UNNAMED = "it does not name its classes: they are class_0 and so on"
"""What it holds where classes are not `named`."""


def preparation_assumed(config: AsagConfig) -> str:
    """Return what `Checkpoint.assumed` holds where there is no `preprocessing`."""
    usual = own_preprocessing(config) or Preprocessing()
    return (
        f"the file does not say how images are prepared: without other options, {usual.shorter_side} to "
        f"{usual.longer_side} pixels and ImageNet's mean and deviation are assumed"
    )


_HEAD_KEY = re.compile(r"(decoder\.(?:bbox_head|head_series|layers)\.)(\d+)(\..+)")
_EMBEDDING_KEY = "decoder.decoder_embedding.weight"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A network's weights, settings and classes.

    Raises CheckpointError when weights or classes are not what the settings call for.
    """

    config: AsagConfig
    state: Mapping[str, Tensor]
    """Named and shaped as `Asag(config).state_dict()`, floating point, on the CPU when it was loaded."""
    categories: tuple[Category, ...]
    """(num_classes) in label order."""
    trained: bool = True
    """False if the weights are random."""
    head: str | None = None
    """The decoder that was selected out of several (it is the network's only one now); None if none was."""
    epoch: int | None = None
    """The last epoch that was trained, counted from 0, if the file says."""
    preprocessing: Preprocessing | None = None
    """How images were resized for evaluation in training, if the file says."""
    named: bool = True
    """False if the names of the classes are made up, because the file says none."""
    notes: tuple[str, ...] = ()
    """Sentences about which of a file's weights were taken."""
    assumed: tuple[str, ...] = ()
    """Sentences about what was assumed, because the file does not say."""

    def __post_init__(self) -> None:
        config = self.config
        wrong = mismatch(layout_of(self.state), expected_layout(config))
        if wrong is not None:
            raise CheckpointError(
                f"the weights are not those of {config.variant} with these settings ({wrong})"
            )
        if len(self.categories) != config.num_classes:
            given = plural(len(self.categories), "class name was", "class names were")
            raise CheckpointError(f"{given} given for a network of {plural(config.num_classes, 'class')}")
        if len({category.id for category in self.categories}) != len(self.categories):
            raise CheckpointError("two classes have the same id: give each its own")
        if self.head is not None and config.heads != 1:
            raise CheckpointError(
                f"head '{self.head}' cannot be selected while there are {config.heads} heads"
            )

    @property
    def prepared(self) -> Preprocessing:
        """How images are prepared: as the file says, else as is usual for such a network."""
        return self.preprocessing or own_preprocessing(self.config) or Preprocessing()

    @property
    def head_names(self) -> tuple[str, ...]:
        """The decoders there are, in checkpoint order."""
        return self.config.head_names if self.head is None else (self.head,)


def select_head(checkpoint: Checkpoint, head: str) -> Checkpoint:
    """Return the checkpoint of a network that has only this one of the parallel decoders.

    Raises CheckpointError, listing the heads, when there is none of that name.
    """
    names = checkpoint.head_names
    if head not in names:
        raise CheckpointError(f"there is no head '{head}' in the checkpoint; it has {', '.join(names)}")
    if len(names) == 1:
        return dataclasses.replace(checkpoint, head=head)
    layers = checkpoint.config.decoder_layers
    first = names.index(head) * layers
    state = {}
    for name, tensor in checkpoint.state.items():
        match = _HEAD_KEY.fullmatch(name)
        if match is None:
            state[name] = tensor[first : first + layers] if name == _EMBEDDING_KEY else tensor
        elif first <= int(match[2]) < first + layers:
            state[f"{match[1]}{int(match[2]) - first}{match[3]}"] = tensor
    config = checkpoint.config.with_changes(heads=1)
    return dataclasses.replace(checkpoint, config=config, state=state, head=head)


def change_settings(checkpoint: Checkpoint, changes: Iterable[str]) -> Checkpoint:
    """Return the checkpoint with other network settings, such as `score_low=0.2`, which makes it probe less.

    Raises ConfigError for an unknown setting, a bad value, or one that the weights do not fit.
    """
    changes = list(changes)
    config = apply_changes(checkpoint.config, changes)
    if expected_layout(config) != expected_layout(checkpoint.config):
        raise ConfigError(
            f"the settings {', '.join(changes)} need other weights than these: change those only "
            "that decide no shape, such as score_low, score_high, score_pass, patch_nms_iou or anchor_cap"
        )
    return dataclasses.replace(checkpoint, config=config)


def untrained_checkpoint(variant: str | AsagConfig, seed: int = 0) -> Checkpoint:
    """Draw random weights, to try or to time a network that has not been trained; a seed gives the same ones.

    Freshly initialised anchors are large, and none would be probed.  The last layer of both anchor predictors
    is therefore drawn wider and moved: small boxes with uncertain scores come out, and every stage has
    something to do, whatever the image.  Raises ConfigError for an unknown variant.
    """
    config = variant_config(variant) if isinstance(variant, str) else variant
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(config)
        for mlp in (model.anchor_generator.proj_all, model.anchor_generator.proj_patch):
            _spread(mlp.layers[-1])
    return Checkpoint(
        config=config,
        state=model.state_dict(),
        categories=default_categories(config),
        trained=False,
        preprocessing=own_preprocessing(config),
    )


def _spread(last: nn.Module) -> None:
    weight, bias = last.get_parameter("weight"), last.get_parameter("bias")
    nn.init.normal_(weight, std=4.0 / weight.shape[1] ** 0.5)
    with torch.no_grad():
        bias.view(-1, 5)[:, 2:4] -= 2.5
        bias.view(-1, 5)[:, 4] -= 1.0
