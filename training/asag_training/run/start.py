"""What a run begins with: a new network, or one that takes over the weights of a checkpoint or a backbone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from asag_deploy.bundle.manifest import Category
from asag_deploy.errors import ConfigError, plural
from asag_training.checkpoints import Checkpoint, load_backbone, load_checkpoint, start_from
from asag_training.network.model import Asag
from asag_training.recipes import Recipe
from asag_training.settings import WEIGHTS_CHOICES, WeightsChoice

T = TypeVar("T")

_OF_THE_DATA = ("variant", "num_classes", "heads")
"""Settings of a network that say nothing of how it computes."""


class Start(NamedTuple):
    """The beginning of a run."""

    recipe: Recipe
    """As it was given, but for what the weights rely on."""
    model: Asag
    notes: tuple[str, ...]
    """Sentences about what was taken from where."""


def start(
    recipe: Recipe,
    categories: Sequence[Category],
    *,
    seed: int,
    init: Path | None = None,
    weights: WeightsChoice | None = None,
    backbone: Path | None = None,
    named: Sequence[str] = (),
) -> Start:
    """Make the network of a recipe, for as many classes as `categories`, and give it what there is for it.

    init: a checkpoint to start from, with any classes; weights: which of those in it; backbone: ImageNet
    weights to start the backbone from; named: the settings that were asked for by name, which no checkpoint
    changes.

    Raises ConfigError for what does not go together, CheckpointError for a file that does not fit.
    """
    if init is None and weights is not None:
        raise ConfigError("--weights chooses among those of the checkpoint to start from: give --init too")
    if init is not None and backbone is not None:
        raise ConfigError("--init brings a whole network: leave --backbone out")
    said, count = recipe.network.num_classes, len(categories)
    if "network.num_classes" in named and said != count:
        raise ConfigError(
            f"network.num_classes is {said}, but the data has {plural(count, 'class')}: leave it out, the "
            "data decides"
        )
    recipe = dataclasses.replace(recipe, network=recipe.network.with_changes(num_classes=count))
    initial, notes = None, list[str]()
    if init is not None:
        initial = load_checkpoint(init, weights=weights or WEIGHTS_CHOICES[0])
        notes += initial.notes
        recipe = _as_it_was_trained(recipe, initial, named, notes)
    torch.manual_seed(seed)
    model = Asag(recipe.network)
    if init is not None and initial is not None:
        notes += start_from(model, categories, initial, init)
        notes += _other_settings(recipe, initial, named)
    if backbone is not None:
        notes += load_backbone(model, backbone)
    return Start(recipe, model, tuple(f"from '{init or backbone}': {sentence}" for sentence in notes))


def _other_settings(recipe: Recipe, initial: Checkpoint, named: Sequence[str]) -> list[str]:
    """Say which settings of the network, of those that decide no shape, are the recipe's and were others."""
    if initial.preprocessing is None:  # then it is not ours, and does not say its settings
        return []
    ours, theirs = recipe.network.to_dict(), initial.config.to_dict()
    differing = [
        f"network.{name} is {ours[name]}, not {theirs[name]}"
        for name in ours
        if name not in _OF_THE_DATA and f"network.{name}" not in named and ours[name] != theirs[name]
    ]
    return [f"settings are the recipe's, not the checkpoint's: {', '.join(differing)}"] if differing else []


def _as_it_was_trained(recipe: Recipe, initial: Checkpoint, named: Sequence[str], notes: list[str]) -> Recipe:
    """Return the recipe with what the checkpoint's weights rely on, unless it was asked for by name: the
    activation, and how pixels become numbers."""
    before, was = recipe.preprocessing, initial.preprocessing or recipe.preprocessing

    def settle(setting: str, ours: T, theirs: T) -> T:
        if ours == theirs:
            return ours
        if setting in named:
            notes.append(f"{setting} is {ours}, though the checkpoint was trained with {theirs}")
            return ours
        notes.append(f"{setting} is {theirs}, as the checkpoint has it")
        return theirs

    activation = settle("network.activation", recipe.network.activation, initial.config.activation)
    return dataclasses.replace(
        recipe,
        network=recipe.network.with_changes(activation=activation),
        preprocessing=dataclasses.replace(
            before,
            mean=settle("preprocessing.mean", before.mean, was.mean),
            std=settle("preprocessing.std", before.std, was.std),
        ),
    )
