"""Small things to train on, and small networks to train."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from asag_evaluation.data.coco import CocoDataset
from asag_training.data.loading import TrainingLoader
from asag_training.network.model import Asag
from asag_training.recipes import Recipe, recipe
from asag_training.run.process import Process
from asag_training.run.trainer import Trainer
from support.coco_files import box, write_coco

SIDE = 96

_SQUARE, _DISC = 7, 3
"""Ids among `coco_files.CATEGORIES`."""

TINY = (
    "network.hidden_dim=32",
    "network.backbone_width=8",
    "network.ffn_dim=64",
    "network.attention_heads=4",
    "network.in_points=4",
    "network.out_points=8",
    "network.compress_dim=2",
    "network.first_level_anchors=10",
    "network.patch_anchors=5",
    "network.anchor_cap=40",
    "network.heads=2",
    "network.num_classes=2",
    "network.patch_size=15",
    "patches.denoising_queries=10",
    "patches.min_patches=4",
    "optimisation.batch_size=4",
    "optimisation.lr=0.0002",
    "optimisation.batch_statistics=false",
    "optimisation.allow_random_frozen=true",
    "optimisation.compute=fp32",
    "augmentation.vertical_flip=0",
    "schedule.drops=[]",
    "schedule.epochs=2",
    "schedule.warmup_steps=2",
    f"augmentation.shorter_sides=[{SIDE}]",
    f"augmentation.longer_side={SIDE}",
    f"preprocessing.shorter_side={SIDE}",
    f"preprocessing.longer_side={SIDE}",
)
"""Changes that make the recipe `scenes` a matter of milliseconds."""


TINY_D = (
    "network.decoder=deformable-detr",
    "network.finest_map=P3",
    "network.encoder_layers=2",
    "network.deformable_points=2",
    "network.deformable_ffn_dim=64",
)
"""Changes that make it one of a tiny ASAG-D."""
TINY_S = ("network.decoder=sparse-rcnn", "network.dynamic_dim=16")
"""And of a tiny ASAG-S."""


def tiny_recipe(*changes: str) -> Recipe:
    """For pictures of `write_pictures`."""
    return recipe("scenes", [*TINY, *changes])


def write_pictures(
    root: Path, split: str = "train2017", count: int = 8, seed: int = 0, objects: int | None = 2
) -> Path:
    """A data set of `count` pictures, each with as many objects (None: one to four).

    They are red discs and blue squares on grey, in quarters of their own.
    """
    rng = np.random.default_rng([seed, count])
    pictures: list[NDArray[np.uint8]] = []
    annotations: list[dict[str, Any]] = []
    for image_id in range(1, count + 1):
        picture = rng.integers(90, 130, (SIDE, SIDE, 1), dtype=np.uint8).repeat(3, axis=2)
        corners = [
            divmod(int(corner), 2) for corner in rng.permutation(4)[: objects or int(rng.integers(1, 5))]
        ]
        annotations += [_draw(picture, image_id, corner, rng) for corner in corners]
        pictures.append(picture)
    write_coco(root, annotations, split=split, pictures=pictures)
    return root


def _draw(
    picture: NDArray[np.uint8], image_id: int, corner: tuple[int, int], rng: np.random.Generator
) -> dict[str, Any]:
    """Draw an object of a class by chance into a quarter of the picture; returns its annotation."""
    half = SIDE // 2
    side = int(rng.integers(24, half + 1))
    y, x = (quarter * half + int(rng.integers(half - side + 1)) for quarter in corner)
    part = picture[y : y + side, x : x + side]
    if rng.random() < 0.5:
        part[:] = (20, 20, 230)
        return box(image_id, [x, y, side, side], _SQUARE)
    away = np.hypot(*np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j])
    part[away <= 1] = (230, 20, 20)
    return box(image_id, [x, y, side, side], _DISC)


def make_trainer(
    data: Path,
    output_dir: Path,
    chosen: Recipe | None = None,
    *,
    seed: int = 0,
    process: Process | None = None,
) -> Trainer:
    """A trainer for the pictures in `data`, with fresh weights."""
    chosen = chosen or tiny_recipe()
    output_dir.mkdir(exist_ok=True)
    torch.manual_seed(seed)
    categories = CocoDataset.open(data).categories
    return Trainer(chosen, Asag(chosen.network), categories, output_dir, seed=seed, process=process)


def make_loader(data: Path, chosen: Recipe | None = None, *, seed: int = 0, **options: Any) -> TrainingLoader:
    """Batches of the pictures in `data`, without workers."""
    chosen = chosen or tiny_recipe()
    o = chosen.optimisation
    share = o.accumulate * int(options.get("world_size", 1))
    return TrainingLoader(
        CocoDataset.open(data),
        chosen.augmentation,
        batch_size=o.batch_size // share,
        seed=seed,
        preprocessing=chosen.preprocessing,
        workers=0,
        **options,
    )


def options_of(changes: Sequence[str]) -> list[str]:
    """Changes as the command line takes them."""
    return [word for change in changes for word in ("--set", change)]
