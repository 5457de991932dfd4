"""What would waste a run is refused before it starts."""

from __future__ import annotations

from asag_deploy.errors import ConfigError, plural
from asag_training.recipes import Recipe

_OFTEN = 2
"""Times as large, or as small, as in training images may be in evaluation."""


def check_beginning(recipe: Recipe, *, pretrained: bool) -> None:
    """Refuse settings that make a run useless whatever the data, with ConfigError.

    pretrained: whether the backbone starts from weights that were trained, of ImageNet or of a checkpoint.
    """
    if not pretrained:
        _check_random_weights(recipe)
    _check_loss(recipe)
    sides, side = recipe.augmentation.shorter_sides, recipe.preprocessing.shorter_side
    if not min(sides) / _OFTEN <= side <= max(sides) * _OFTEN:
        raise ConfigError(
            f"the network would be evaluated at {side} pixels, but trained at {_sides(sides)}, where objects "
            "are of quite another size: change preprocessing.shorter_side and preprocessing.longer_side, or "
            "augmentation.shorter_sides and augmentation.longer_side"
        )


def check_length(recipe: Recipe, updates: int, *, probes: bool) -> None:
    """Refuse a run that is too short for its own schedule, with ConfigError.

    updates: of an epoch; probes: whether the network starts from one that has learned to probe.
    """
    schedule, before = recipe.schedule, recipe.patches.target_patch_epochs
    if not probes and before >= schedule.epochs:
        raise ConfigError(
            f"patches.target_patch_epochs {before} leaves none of the run's epochs ({schedule.epochs}) in "
            "which anchors ask for patches, so that the network would not learn to probe: lower it, or raise "
            "schedule.epochs"
        )
    total = schedule.epochs * updates
    if schedule.warmup_steps > total:
        raise ConfigError(
            f"the warm-up takes {plural(schedule.warmup_steps, 'update')} and the whole run {total} (epochs: "
            f"{schedule.epochs}), so that the learning rate is never what it is set to: lower "
            "schedule.warmup_steps, or raise schedule.epochs"
        )


def _check_random_weights(recipe: Recipe) -> None:
    o = recipe.optimisation
    frozen = ["its stem (optimisation.freeze_stem)"] if o.freeze_stem else []
    frozen += [] if o.batch_statistics else ["its BatchNorm statistics (optimisation.batch_statistics)"]
    if frozen and not o.allow_random_frozen:
        raise ConfigError(
            f"the backbone would keep {' and '.join(frozen)} as it begins, random, which wastes the run: "
            "give --backbone FILE with ImageNet weights, or --init FILE; to train random weights, --set "
            "optimisation.freeze_stem=false --set optimisation.batch_statistics=true; or allow it by --set "
            "optimisation.allow_random_frozen=true"
        )


def _check_loss(recipe: Recipe) -> None:
    loss = recipe.loss
    parts = {
        "the decoders": ("ce", "l1", "giou"),
        "the anchor generator": ("anchor_ce", "anchor_l1", "anchor_giou"),
    }
    for who, names in parts.items():
        if not any(getattr(loss, name) for name in names):
            raise ConfigError(
                f"{' and '.join(f'loss.{name}' for name in names)} are all 0, so that {who} would learn "
                "nothing: raise one of them"
            )


def _sides(sides: tuple[int, ...]) -> str:
    low, high = min(sides), max(sides)
    return f"{low}" if low == high else f"{low} to {high}"
