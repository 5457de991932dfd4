"""The classes of a network whose checkpoint names none."""

from __future__ import annotations

from asag_deploy.bundle.manifest import Category
from asag_evaluation.data.categories import COCO_CATEGORIES, CROWDHUMAN_CATEGORIES
from asag_training.network.config import AsagConfig


def default_categories(config: AsagConfig) -> tuple[Category, ...]:
    """The classes of a checkpoint that does not say: those of its data set, else `class_0`, `class_1`, ..."""
    if config.num_classes == len(COCO_CATEGORIES):
        return COCO_CATEGORIES
    if config.num_classes == 1 and config.variant.endswith("crowdhuman"):
        return CROWDHUMAN_CATEGORIES
    return tuple(Category(id=i, name=f"class_{i}") for i in range(config.num_classes))
