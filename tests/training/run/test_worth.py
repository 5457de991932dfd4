"""Runs that would be wasted are refused before they start."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from asag_deploy.bundle.manifest import Category
from asag_deploy.errors import ConfigError
from asag_training.cli import main
from asag_training.recipes import RECIPES, recipe
from asag_training.run.start import start
from asag_training.run.worth import check_beginning, check_length
from support.training_runs import write_pictures

SMALL = tuple(name for name in RECIPES if name.startswith(("scenes", "bccd", "photographs")))
TRAINS_ALL = ["optimisation.freeze_stem=false", "optimisation.batch_statistics=true"]


@pytest.mark.parametrize("name", RECIPES)
def test_what_a_recipe_starts_from(name: str) -> None:
    check_beginning(recipe(name), pretrained=True)
    if name in SMALL:
        check_beginning(recipe(name), pretrained=False)
        return
    with pytest.raises(ConfigError, match=r"freeze_stem.* random, .*--backbone FILE .*--init FILE"):
        check_beginning(recipe(name), pretrained=False)
    check_beginning(recipe(name, TRAINS_ALL), pretrained=False)
    check_beginning(recipe(name, ["optimisation.allow_random_frozen=true"]), pretrained=False)


def test_which_of_the_backbone_would_stay_random() -> None:
    with pytest.raises(ConfigError) as refused:
        check_beginning(recipe("asag-a-r50-100-1x", TRAINS_ALL[:1]), pretrained=False)
    assert "keep its BatchNorm statistics (optimisation.batch_statistics) as it begins" in str(refused.value)
    with pytest.raises(ConfigError) as refused:
        check_beginning(recipe("asag-a-r50-100-1x", TRAINS_ALL[1:]), pretrained=False)
    assert "keep its stem (optimisation.freeze_stem) as it begins" in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["augmentation.shorter_sides=[320]"], "evaluated at 800 pixels, but trained at 320, "),
        (["augmentation.shorter_sides=[256, 300]", "augmentation.longer_side=400"], "trained at 256 to 300"),
        (["preprocessing.shorter_side=320"], "evaluated at 320 pixels, but trained at 800"),
        (
            ["loss.ce=0", "loss.l1=0", "loss.giou=0"],
            "loss.ce and loss.l1 and loss.giou are all 0, .*decoders",
        ),
        (["loss.anchor_ce=0", "loss.anchor_l1=0", "loss.anchor_giou=0"], "are all 0, .*the anchor generator"),
    ],
)
def test_settings_that_go_against_each_other(changes: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_beginning(recipe("asag-a-r50-100-1x", changes), pretrained=True)


@pytest.mark.parametrize(
    "changes",
    [
        ["augmentation.shorter_sides=[400]", "augmentation.longer_side=800"],
        ["augmentation.shorter_sides=[480, 1600]", "augmentation.longer_side=1600"],
        ["loss.ce=0", "loss.giou=0", "loss.anchor_ce=0"],
    ],
)
def test_settings_that_go_together(changes: list[str]) -> None:
    check_beginning(recipe("asag-a-r50-100-1x", changes), pretrained=True)


def test_a_run_too_short_to_learn_to_probe() -> None:
    once = recipe("scenes", ["schedule.epochs=1", "schedule.drops=[]"])
    with pytest.raises(ConfigError, match="target_patch_epochs 1 leaves none of the run's epochs"):
        check_length(once, 1000, probes=False)
    check_length(once, 1000, probes=True)
    check_length(recipe("scenes"), 1000, probes=False)


def test_a_run_shorter_than_its_warm_up() -> None:
    chosen = recipe("asag-a-r50-100-1x")  # 500 updates of warm-up, 12 epochs
    check_length(chosen, 42, probes=False)
    with pytest.raises(ConfigError, match=r"takes 500 updates and the whole run 492 \(epochs: 12\)"):
        check_length(chosen, 41, probes=True)


def test_another_number_of_classes_than_the_data_has() -> None:
    chosen = recipe("scenes", ["network.num_classes=4"])
    classes = [Category(id=i, name=str(i)) for i in range(5)]
    with pytest.raises(ConfigError, match="num_classes is 4, but the data has 5 classes: leave it out"):
        start(chosen, classes, seed=0, named=["network.num_classes"])


def test_the_command_refuses_before_it_reads_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--data", str(tmp_path / "none"), "--output-dir", str(tmp_path / "run")]
    assert main([*words, "--recipe", "asag-a-r50-100-1x"]) == 2
    [sentence] = capsys.readouterr().err.splitlines()
    assert re.search(r"error: the backbone would keep its stem .*allow_random_frozen=true$", sentence)
    assert not (tmp_path / "run").exists()


def test_the_command_refuses_a_run_that_is_too_short(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pictures(tmp_path)
    write_pictures(tmp_path, "val2017", count=2)
    words = [
        "--data",
        str(tmp_path),
        "--output-dir",
        str(tmp_path / "run"),
        "--workers",
        "0",
        "--device",
        "cpu",
    ]
    assert main([*words, "--recipe", "scenes"]) == 2
    assert "the warm-up takes 100 updates and the whole run 18" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
