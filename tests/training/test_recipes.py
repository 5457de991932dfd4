"""Recipes: by name, with changes, as JSON."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import pytest

from asag_deploy.bundle.manifest import Preprocessing
from asag_deploy.errors import ConfigError
from asag_training.network.config import own_preprocessing, variant_config
from asag_training.recipes import ABLATIONS, RECIPES, Recipe, recipe
from asag_training.settings import Optimisation, apply_changes

OF_OTHERS = ("scenes-s", "bccd-s", "scenes-d", "bccd-d")
SMALL = ("scenes", "bccd", "photographs", "scenes-lite", "bccd-lite", *OF_OTHERS)
D = ("asag-d-r50-100-3x", "asag-d-r50-300-3x")
LIGHT = ("asag-a-lite-s-3x", "asag-a-lite-m-3x")
PUBLISHED = [name for name in RECIPES if name not in (*SMALL, *LIGHT)]


def test_nine_models_were_published() -> None:
    assert len([name for name in PUBLISHED if name not in D]) == 9
    assert set(D) < set(PUBLISHED)  # which the paper describes, though nobody has published weights


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipes(name: str) -> None:
    made = recipe(name)
    variant = made.network.variant
    assert made.network == variant_config(variant)
    assert name.startswith(variant)
    # 4 GPUs with 4 images each, in half precision.
    assert made.optimisation.batch_size == 16
    assert made.loss.patch_images == 4
    assert made.optimisation.compute == "auto"
    assert made.optimisation.freeze_stem
    assert made.patches.all_target_patches
    assert made.patches.target_patch_epochs == 1
    longer = 1500 if "crowdhuman" in name else 1333
    assert made.augmentation.longer_side == made.preprocessing.longer_side == longer
    assert made.preprocessing.shorter_side == max(made.augmentation.shorter_sides) == 800
    epochs = 50 if "crowdhuman" in name else int(name[-2]) * 12
    assert made.schedule.epochs == epochs
    assert (made.augmentation.crop is None) == name.endswith("1x")
    assert (made.patches.denoising_queries > 0) == ("-dn-" in name)


@pytest.mark.parametrize("name", LIGHT)
def test_light_recipes_are_at_their_own_size(name: str) -> None:
    made = recipe(name)
    assert made.network == variant_config(name.removesuffix("-3x"))
    assert made.preprocessing == own_preprocessing(made.network)
    assert max(made.augmentation.shorter_sides) == made.preprocessing.shorter_side
    assert made.augmentation.longer_side == made.preprocessing.longer_side
    assert made.augmentation.crop is not None
    assert made.optimisation.freeze_stem
    assert made.schedule.epochs == 36


@pytest.mark.parametrize("name", SMALL)
def test_small_recipes_start_from_random_weights(name: str) -> None:
    made = recipe(name)
    assert made.loss.patch_images == 2  # as the networks that come with the project were trained
    assert not made.patches.all_target_patches
    assert made.optimisation.batch_statistics
    assert not made.optimisation.freeze_stem
    assert made.network.backbone_width < 64
    assert (made.network.backbone == "resnet") == (not name.endswith("lite"))
    assert max(made.augmentation.shorter_sides) <= made.preprocessing.longer_side


@pytest.mark.parametrize("name", OF_OTHERS)
def test_other_decoders_are_trained_as_adamixer_is_on_small_data(name: str) -> None:
    made, first = recipe(name), recipe(name[:-2])
    assert made.network.variant == f"asag-{name[-1]}-{name[:-2]}"
    assert made.network.decoder == variant_config(f"asag-{name[-1]}-r50-100").decoder
    assert dataclasses.replace(made, network=first.network) == first
    decoder = ("variant", "decoder", "finest_map", "dynamic_dim", "encoder_layers", "deformable_ffn_dim")
    rest = {name: value for name, value in made.network.to_dict().items() if name not in decoder}
    assert rest.items() <= first.network.to_dict().items()


def test_every_recipe_is_json() -> None:
    for name in RECIPES:
        text = json.dumps(recipe(name).to_dict())
        back = json.loads(text)
        assert json.dumps(back) == text
        assert set(back) == {field.name for field in dataclasses.fields(Recipe)}
        assert back["schedule"]["drops"] == list(recipe(name).schedule.drops)


def test_changes() -> None:
    made = recipe(
        "asag-a-r50-100-3x",
        [
            "network.patch_size=12",
            "network.variant=mine",
            "network.max_patches=60",
            "loss.query_weighting=false",
            "loss.patch_images=null",
            "loss.matching.l1=1",
            "schedule.drops=[3]",
            "schedule.epochs=4",
            "optimisation.lr=1",
            "optimisation.compute=bf16",
            "augmentation.crop.probability=0.25",
            "preprocessing.mean=[1, 2, 3]",
        ],
    )
    assert (made.network.patch_size, made.network.variant, made.network.max_patches) == (12, "mine", 60)
    assert (made.loss.query_weighting, made.loss.patch_images) == (False, None)
    assert (made.schedule.epochs, made.schedule.drops) == (4, (3,))
    assert isinstance(made.optimisation.lr, float)
    assert made.optimisation.compute == "bf16"
    assert made.augmentation.crop is not None
    assert made.augmentation.crop.probability == 0.25
    assert made.preprocessing.mean == (1.0, 2.0, 3.0)
    assert made.loss.matching.l1 == 1
    untouched = recipe("asag-a-r50-100-3x")
    assert made.augmentation.shorter_sides == untouched.augmentation.shorter_sides
    assert made.loss.matching.classes == untouched.loss.matching.classes


def test_an_optional_part_can_be_left_out() -> None:
    assert recipe("asag-a-r50-100-3x", ["augmentation.crop=null"]).augmentation.crop is None


def test_the_order_of_changes_does_not_matter() -> None:
    changes = ["schedule.epochs=3", "schedule.drops=[2]"]
    assert recipe("scenes", changes) == recipe("scenes", changes[::-1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("network.patch_size", "expected NAME=VALUE"),
        ("patch_size=3", "unknown setting 'patch_size'; the settings are network, schedule, .*preprocessing"),
        ("nets.patch_size=3", "unknown setting 'nets'; the settings are network, "),
        ("network.patchsize=3", "unknown setting 'network.patchsize'; .*of 'network' are .*patch_size"),
        ("network.patch_size.x=3", "'network.patch_size' is 8 and has no settings of its own"),
        ("network.patch_size=big", '`network.patch_size` is "big", expected a whole number'),
        ("network.patch_size=1.5", "expected a whole number"),
        ("network.patch_size=true", "expected a whole number"),
        ("network.patch_size=null", "expected a whole number"),
        ("network.variant=7", "expected text"),
        ("network.decoder=detr", "expected 'adamixer' or 'sparse-rcnn' or 'deformable-detr'"),
        ("optimisation.lr=fast", "expected a number"),
        ("optimisation.lr=NaN", "expected a number"),
        ("optimisation.lr=-1", "optimisation setting lr -1.0 is not possible: expected above 0"),
        ("optimisation.compute=fp8", "expected 'auto' or 'fp32' or 'bf16' or 'fp16'"),
        ("optimisation.batch_size=0", "batch_size 0 is not possible: expected at least 1"),
        ("optimisation.accumulate=3", "batch_size 4 is not possible: expected a multiple of the 3 passes"),
        ("loss.query_weighting=1", "expected true or false"),
        ("loss.patch_images=many", "expected a number or null"),
        ("loss.patch_size=12", "unknown setting 'loss.patch_size'"),
        ("loss.matching=3", "has settings of its own: change them, as in loss.matching.NAME=VALUE"),
        ("loss.matching=null", "`loss.matching` is null, expected an object"),
        ("loss.matching.l1=far", '`loss.matching.l1` is "far", expected a number'),
        ("schedule.drops=8", "`schedule.drops` is 8, expected a list"),
        ("schedule.drops=[1.5]", r"`schedule.drops\[0\]` is 1.5, expected a whole number"),
        (
            "schedule.epochs=3",
            r"drops \(7, 8\) is not possible: .* 0 and 3 \(for none: --set 'schedule.drops=\[\]'\)$",
        ),
        ("schedule.epochs=1", r"rising epochs between 0 and 1 \(for none: --set 'schedule.drops=\[\]'\)$"),
        ("schedule.drops=[4,2]", r"drops \(4, 2\) is not possible: expected rising epochs .* and \d+$"),
        ("preprocessing.std=[1, 2]", "has 2 values, expected 3"),
        ("preprocessing.std=[1, 2, 0]", "deviations above 0"),
        ("preprocessing.longer_side=100", "320 to 100 pixels"),
        ("network.hidden_dim=97", "hidden_dim 97 is not possible"),
    ],
)
def test_changes_that_are_refused(change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        recipe("scenes", [change])
    assert "\n" not in str(caught.value)


def test_a_setting_is_not_changed_as_a_whole_and_in_part() -> None:
    with pytest.raises(ConfigError, match="both as a whole and in part"):
        recipe("asag-a-r50-100-3x", ["augmentation.crop=null", "augmentation.crop.probability=1"])


def test_unknown_recipe() -> None:
    with pytest.raises(ConfigError, match=re.escape("unknown recipe 'resnet'; the recipes are asag-a-r50")):
        recipe("resnet")


def test_settings_are_checked_where_they_are_made() -> None:
    with pytest.raises(ConfigError, match="max_gradient_norm 0 is not possible"):
        Optimisation(max_gradient_norm=0)
    with pytest.raises(ConfigError, match="weight_decay -1 is not possible"):
        Optimisation(weight_decay=-1)
    with pytest.raises(ConfigError, match="evaluation at 800 to 1333 pixels, in steps of 0"):
        dataclasses.replace(recipe("scenes"), preprocessing=Preprocessing(size_divisor=0))


def test_changing_nothing() -> None:
    assert apply_changes(recipe("bccd"), []) == recipe("bccd")


def differing(changed: Recipe, base: Recipe) -> dict[str, object]:
    """What differs between two recipes, by setting, but for the variant."""
    mine, theirs = _flat(changed.to_dict()), _flat(base.to_dict())
    return {k: v for k, v in mine.items() if theirs[k] != v and k != "network.variant"}


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in tree.items():
        found.update(
            _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
        )
    return found


CHANGED = {
    "fixed-queries": {"network.score_pass": 1e-6, "network.anchor_cap": 100},
    "no-query-weighting": {"loss.query_weighting": False},
    "no-auxiliary-heads": {"network.heads": 1},
    "auxiliary-heads": {},
    "keep-anchors": {"network.replace_anchors": False},
    "patch-10": {"network.patch_size": 10, "network.first_level_size": 30},
    "patch-12": {"network.patch_size": 12, "network.first_level_size": 30},
    "patch-15": {"network.first_level_size": 30},
    "patch-18": {"network.patch_size": 18, "network.first_level_size": 30},
    "two-layers": {"network.decoder_layers": 2},
    "denoising": {"patches.denoising_queries": 200},
    "no-denoising": {},
}


def test_an_ablation_changes_what_the_paper_says_and_nothing_else() -> None:
    base = recipe("asag-a-r50-100-1x")
    for name in ABLATIONS:
        made = recipe(f"asag-a-r50-100-1x@{name}")
        assert made.network.variant == f"asag-a-r50-100@{name}"
        assert differing(made, base) == CHANGED[name], name


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_every_ablation(name: str) -> None:
    for ablation in ABLATIONS:
        assert recipe(f"{name}@{ablation}").network.variant == f"{recipe(name).network.variant}@{ablation}"
    assert recipe(f"{name}@auxiliary-heads").network.heads == 4


def test_ablations_add_up_and_take_changes() -> None:
    made = recipe("scenes@no-query-weighting@two-layers", ["network.patch_size=9"])
    assert made.network.variant == "asag-a-scenes@no-query-weighting@two-layers"
    assert (made.network.decoder_layers, made.network.patch_size) == (2, 9)
    assert not made.loss.query_weighting


def test_unknown_ablations_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="unknown ablation 'without'; the ablations are fixed-queries, no-"):
        recipe("scenes@without")
    with pytest.raises(ConfigError, match="unknown recipe 'scene'; the recipes are asag-a"):
        recipe("scene@two-layers")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("scenes@patch-10@patch-12", "'patch-10' and 'patch-12' both change network.patch_size"),
        ("scenes@denoising@no-denoising", "both change patches.denoising_queries"),
        ("scenes@two-layers@two-layers", "'two-layers' is named twice"),
    ],
)
def test_ablations_that_do_not_go_together(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        recipe(name)
