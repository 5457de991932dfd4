"""Recipes: everything that decides what a training run does, as one value; and the published ones by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from asag_deploy.bundle.manifest import Preprocessing
from asag_deploy.errors import ConfigError
from asag_training.data.transforms import Augmentation, CropRecipe, multi_scale, standard
from asag_training.losses.config import LossConfig
from asag_training.network.config import (
    AsagConfig,
    DecoderType,
    finest_map_of,
    own_preprocessing,
    variant_config,
)
from asag_training.settings import (
    Optimisation,
    Schedule,
    Settings,
    TrainingSettings,
    apply_changes,
    check_preprocessing,
)

_PUBLISHED_IMAGES_PER_RANK = 4
"""Training was published on 4 GPUs with 4 images each; the weight of the patch losses depends on it."""
_SMALL_PATCH_IMAGES = 2
"""What the recipes for small data were tried with."""

SCHEDULES: dict[str, Schedule] = {
    "1x": Schedule(epochs=12, drops=(8, 11)),
    "3x": Schedule(epochs=36, drops=(24, 33)),
    "crowdhuman": Schedule(epochs=50, drops=(40, 46)),
}
"""The published schedules by name."""


@dataclass(frozen=True, kw_only=True)
class Recipe(Settings):
    """A whole training run but for its data, its seed and its machine.

    Raises ConfigError for an evaluation size that is not possible.
    """

    of = "recipe"
    network: AsagConfig
    schedule: Schedule
    augmentation: Augmentation
    loss: LossConfig = field(default_factory=lambda: LossConfig(patch_images=_SMALL_PATCH_IMAGES))
    patches: TrainingSettings = field(default_factory=TrainingSettings)
    optimisation: Optimisation = field(default_factory=Optimisation)
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    """How images are resized for evaluation."""

    def __post_init__(self) -> None:
        check_preprocessing(self.preprocessing)


_PUBLISHED = Optimisation(compute="auto")


def _published(variant: str, recipe: str, *, denoising: bool = False) -> Callable[[], Recipe]:
    def make() -> Recipe:
        network = variant_config(variant)
        preprocessing = own_preprocessing(network) or Preprocessing()
        augmentation = standard() if recipe == "1x" else multi_scale()
        return Recipe(
            network=network,
            schedule=SCHEDULES[recipe],
            augmentation=augmentation.with_changes(longer_side=preprocessing.longer_side),
            loss=LossConfig(patch_images=_PUBLISHED_IMAGES_PER_RANK),
            patches=TrainingSettings(denoising_queries=200 if denoising else 0, all_target_patches=True),
            optimisation=_PUBLISHED,
            preprocessing=preprocessing,
        )

    return make


def _light(variant: str, shorter_sides: tuple[int, ...], crop: CropRecipe) -> Callable[[], Recipe]:
    """Return the 3x recipe at the sizes of a light network, whose backbone starts from ImageNet weights."""

    def make() -> Recipe:
        network = variant_config(variant)
        preprocessing = own_preprocessing(network) or Preprocessing()
        return Recipe(
            network=network,
            schedule=SCHEDULES["3x"],
            augmentation=Augmentation(
                shorter_sides=shorter_sides, longer_side=preprocessing.longer_side, crop=crop
            ),
            loss=LossConfig(patch_images=_PUBLISHED_IMAGES_PER_RANK),
            patches=TrainingSettings(denoising_queries=0, all_target_patches=True),
            optimisation=_PUBLISHED,
            preprocessing=preprocessing,
        )

    return make


def _small(variant: str, num_classes: int, decoder: DecoderType = "adamixer") -> AsagConfig:
    """Return a network for images of some 320 pixels, which learns from a few thousand of them.

    Patches are as large a part of such an image as the published ones are of 800 pixels; the fewer cells a
    patch has, the fewer images it takes to learn to read it.
    """
    return variant_config("asag-a-r50-100").with_changes(
        variant=variant,
        decoder=decoder,
        finest_map=finest_map_of(decoder),
        num_classes=num_classes,
        backbone_depth=26,
        backbone_width=16,
        hidden_dim=96,
        ffn_dim=384,
        attention_heads=4,
        in_points=16,
        out_points=32,
        patch_size=8,
        first_level_anchors=25,
        patch_anchors=16,
        anchor_cap=150,
        heads=1,
        **_NARROW.get(decoder, {}),
    )


_NARROW: dict[DecoderType, dict[str, int]] = {
    "sparse-rcnn": {"dynamic_dim": 32},
    "deformable-detr": {"encoder_layers": 2, "deformable_ffn_dim": 256},
}
"""What else is less in a small network with this decoder."""

_FROM_RANDOM_WEIGHTS = Optimisation(
    batch_size=4, lr=5e-4, backbone_factor=1.0, freeze_stem=False, batch_statistics=True, compute="bf16"
)


def _scenes() -> Recipe:
    """Return the recipe for 3000 generated scenes of 320 pixels, from random weights on one CPU core."""
    return Recipe(
        network=_small("asag-a-scenes", num_classes=5),
        schedule=Schedule(epochs=9, drops=(7, 8), warmup_steps=100),
        augmentation=Augmentation(shorter_sides=(320,), longer_side=320, vertical_flip=0.5),
        patches=TrainingSettings(min_patches=8, denoising_queries=50),
        optimisation=_FROM_RANDOM_WEIGHTS,
        preprocessing=Preprocessing(shorter_side=320, longer_side=320),
    )


def _bccd() -> Recipe:
    """Return the recipe for photographs of blood cells, 640x480: a few hundred images, no up or down."""
    return Recipe(
        network=_small("asag-a-bccd", num_classes=3),
        schedule=Schedule(epochs=90, drops=(75, 85), warmup_steps=100),
        augmentation=Augmentation(
            shorter_sides=(288, 320, 352),
            longer_side=480,
            vertical_flip=0.5,
            quarter_turns=True,
            colour=0.3,
        ),
        patches=TrainingSettings(min_patches=8, denoising_queries=50),
        optimisation=_FROM_RANDOM_WEIGHTS,
        preprocessing=Preprocessing(shorter_side=320, longer_side=480),
    )


def _photographs() -> Recipe:
    """Return the recipe of the network for blood cells that comes with the project.

    It begins with the weights of the one for scenes (`--init`), sees the cells at more sizes than `bccd`, and
    drops duplicates by NMS, since after so short a training several queries answer to one object.
    """
    of = _bccd()
    return dataclasses.replace(
        of,
        network=of.network.with_changes(detection_nms_iou=0.7),
        schedule=Schedule(epochs=105, drops=(82, 98), warmup_steps=100),
        augmentation=of.augmentation.with_changes(
            shorter_sides=(256, 288, 320, 352, 384),
            longer_side=512,
            colour=0.4,
            crop=CropRecipe(shorter_sides=(480,), smallest=240, largest=400, probability=0.3),
        ),
    )


def _with_decoder(of: Callable[[], Recipe], decoder: DecoderType) -> Callable[[], Recipe]:
    """Return a recipe for small data with another decoder: all else, data and updates included, is the
    same."""

    def make() -> Recipe:
        made = of()
        variant = made.network.variant.replace("asag-a", f"asag-{decoder[0]}", 1)
        return dataclasses.replace(made, network=_small(variant, made.network.num_classes, decoder))

    return make


def _on_light_network(of: Recipe, variant: str, **network: Any) -> Recipe:
    """Return a recipe for small data with the smaller of the light networks, so changed, at the same size.

    Its patches have as many pixels as that recipe's.  After so short a training several queries answer to one
    object, which NMS at the published threshold mends: AP 54.2 for 51.0 on the photographs, 60.2 for 59.3 on
    the scenes.
    """
    changes = dict(
        variant=variant,
        num_classes=of.network.num_classes,
        heads=1,
        patch_size=8,
        detection_nms_iou=0.7,
        **network,
    )
    return dataclasses.replace(of, network=variant_config("asag-a-lite-s").with_changes(**changes))


def _scenes_lite() -> Recipe:
    """Return the recipe for generated scenes of 320 pixels and up to 200 objects, from random weights."""
    return _on_light_network(
        _scenes(),
        "asag-a-lite-s-scenes",
        first_level_anchors=25,
        patch_anchors=16,
        anchor_cap=300,
        max_detections=300,
    )


def _bccd_lite() -> Recipe:
    """Return the recipe for the photographs of blood cells."""
    return _on_light_network(
        _bccd(), "asag-a-lite-s-bccd", first_level_anchors=25, patch_anchors=16, anchor_cap=150
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    "asag-a-r50-100-1x": _published("asag-a-r50-100", "1x"),
    "asag-a-r50-300-1x": _published("asag-a-r50-300", "1x"),
    "asag-a-r50-100-3x": _published("asag-a-r50-100", "3x"),
    "asag-a-r50-300-3x": _published("asag-a-r50-300", "3x"),
    "asag-a-r101-300-3x": _published("asag-a-r101-300", "3x"),
    "asag-s-r50-100-3x": _published("asag-s-r50-100", "3x"),
    "asag-s-r50-300-3x": _published("asag-s-r50-300", "3x"),
    "asag-d-r50-100-3x": _published("asag-d-r50-100", "3x"),
    "asag-d-r50-300-3x": _published("asag-d-r50-300", "3x"),
    "asag-a-r50-100-dn-1x": _published("asag-a-r50-100", "1x", denoising=True),
    "asag-s-r50-crowdhuman": _published("asag-s-r50-crowdhuman", "crowdhuman"),
    "asag-a-lite-s-3x": _light(
        "asag-a-lite-s",
        (416, 448, 480, 512),
        CropRecipe(shorter_sides=(256, 320, 384), smallest=240, largest=384),
    ),
    "asag-a-lite-m-3x": _light(
        "asag-a-lite-m",
        (512, 544, 576, 608, 640),
        CropRecipe(shorter_sides=(320, 400, 480), smallest=304, largest=480),
    ),
    "scenes": _scenes,
    "bccd": _bccd,
    "photographs": _photographs,
    "scenes-s": _with_decoder(_scenes, "sparse-rcnn"),
    "bccd-s": _with_decoder(_bccd, "sparse-rcnn"),
    "scenes-d": _with_decoder(_scenes, "deformable-detr"),
    "bccd-d": _with_decoder(_bccd, "deformable-detr"),
    "scenes-lite": _scenes_lite,
    "bccd-lite": _bccd_lite,
}
"""Recipes by name: the published models', the light networks', and some for small data."""


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """A named change of any recipe: a row of the paper's ablation studies."""

    table: str
    """Of the paper."""
    about: str
    change: Callable[[Recipe], Recipe]


def _of_network(**changes: Any) -> Callable[[Recipe], Recipe]:
    return lambda made: dataclasses.replace(made, network=made.network.with_changes(**changes))


def fixed_queries(network: AsagConfig) -> dict[str, Any]:
    """Return the settings that give every image as many anchors as the network's setting stands for.

    Half of the most that an image can have, and the best scored: 100 of the 100 queries setting (paper, table
    5a).  A score of nearly 0 passes.
    """
    return {"score_pass": 1e-6, "anchor_cap": max(network.anchor_cap // 2, network.anchor_floor)}


def _fixed_queries(made: Recipe) -> Recipe:
    return _of_network(**fixed_queries(made.network))(made)


def _with_denoising(queries: int) -> Callable[[Recipe], Recipe]:
    return lambda made: dataclasses.replace(
        made, patches=made.patches.with_changes(denoising_queries=queries)
    )


def _without_query_weighting(made: Recipe) -> Recipe:
    return dataclasses.replace(made, loss=made.loss.with_changes(query_weighting=False))


def _with_patches(size: int) -> Callable[[Recipe], Recipe]:
    """Change the patches of P4 and P3; those of P5 and P6 keep their size, as in the public code."""

    def change(made: Recipe) -> Recipe:
        first = 2 * made.network.first_patch_size
        return _of_network(patch_size=size, first_level_size=first)(made)

    return change


AT, _DENOISING_QUERIES, _HEADS = "@", 200, 4
ABLATIONS: dict[str, Ablation] = {
    "fixed-queries": Ablation(
        table="5a", about="as many anchors for every image, the best scored", change=_fixed_queries
    ),
    "no-query-weighting": Ablation(
        table="5a", about="focal loss, and all boxes count alike", change=_without_query_weighting
    ),
    "no-auxiliary-heads": Ablation(table="5a", about="the main decoder alone", change=_of_network(heads=1)),
    "auxiliary-heads": Ablation(
        table="5a", about="three auxiliary decoders beside the main one", change=_of_network(heads=_HEADS)
    ),
    "keep-anchors": Ablation(
        table="5a",
        about="anchors that ask for a closer look stay",
        change=_of_network(replace_anchors=False),
    ),
    **{
        f"patch-{size}": Ablation(
            table="5c", about=f"probed patches of {size} cells a side", change=_with_patches(size)
        )
        for size in (10, 12, 15, 18)
    },
    "two-layers": Ablation(
        table="8", about="decoders of two layers in sequence", change=_of_network(decoder_layers=2)
    ),
    "denoising": Ablation(
        table="A-1",
        about=f"{_DENOISING_QUERIES} denoising queries",
        change=_with_denoising(_DENOISING_QUERIES),
    ),
    "no-denoising": Ablation(table="A-1", about="no denoising queries", change=_with_denoising(0)),
}
"""The paper's ablations by name, each of which changes any recipe: `scenes@two-layers`."""


def recipe(name: str, changes: Iterable[str] = ()) -> Recipe:
    """Return the recipe of that name, with changes such as `network.patch_size=12` or
    `loss.query_weighting=false`.

    The name may go on with ablations: `scenes@no-query-weighting`, of which the network's variant then tells.
    Values are JSON (strings may go without quotes).  Raises ConfigError for an unknown recipe, ablation or
    setting, or a value that makes no sense.
    """
    base, *ablations = name.split(AT)
    if base not in RECIPES:
        raise ConfigError(f"unknown recipe '{base}'; the recipes are {', '.join(RECIPES)}")
    made = RECIPES[base]()
    by: dict[str, str] = {}
    for ablation in ablations:
        before, made = _settings_of(made), _ablated(made, ablation)
        changed = [path for path, value in _settings_of(made).items() if before.get(path, value) != value]
        for path in changed:
            if path in by:
                raise ConfigError(f"the ablations '{by[path]}' and '{ablation}' both change {path}: name one")
        by.update(dict.fromkeys(changed, ablation))
        if not changed and ablation in by.values():
            raise ConfigError(f"the ablation '{ablation}' is named twice: name it once")
    return apply_changes(made, changes)


def _settings_of(made: Recipe) -> dict[str, Any]:
    """Return every setting of a recipe but its name, by its path."""
    found: dict[str, Any] = {}

    def add(path: str, value: Any) -> None:
        if isinstance(value, dict):
            for name, part in value.items():
                add(f"{path}.{name}" if path else name, part)
        else:
            found[path] = value

    add("", made.to_dict())
    del found["network.variant"]
    return found


def _ablated(made: Recipe, ablation: str) -> Recipe:
    """Change a recipe, and name its network after the change."""
    if ablation not in ABLATIONS:
        raise ConfigError(f"unknown ablation '{ablation}'; the ablations are {', '.join(ABLATIONS)}")
    changed = ABLATIONS[ablation].change(made)
    variant = f"{changed.network.variant}{AT}{ablation}"
    return dataclasses.replace(changed, network=changed.network.with_changes(variant=variant))
