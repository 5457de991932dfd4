"""The pages on training, fine-tuning, evaluation and the paper: commands are understood, all is named."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from asag_deploy.errors import ConfigError
from asag_deploy.examples import PHOTOGRAPHS_CLASSES
from asag_training.evaluation.sweep import SWEPT, read_ways
from asag_training.recipes import ABLATIONS, RECIPES, recipe
from asag_training.run.log import EVALUATIONS, STEPS
from asag_training.run.state import BEST, LAST, STATE
from support.every_program import PROGRAMS, commands

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("train.md", "fine-tune.md", "evaluate.md", "paper.md")
_MODULES = {f"python -m {module}": program for program, module in PROGRAMS.items()}
_MODULES["torchrun --nproc-per-node 8 training/train.py"] = "asag-train"


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def command_lines(name: str) -> Iterator[tuple[str, list[str]]]:
    """The program and the arguments of every command of a page that is written out."""
    for block in re.findall(r"^```\n(.*?)^```", page(name), re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            text = line.removeprefix("OMP_NUM_THREADS=1 ")
            for module, program in _MODULES.items():
                text = text.replace(module, program)
            program, _, arguments = text.partition(" ")
            if program in PROGRAMS and "..." not in text.partition("#")[0]:
                yield program, shlex.split(arguments, comments=True)


def parsed(program: str, arguments: list[str]) -> argparse.Namespace:
    (_, parser), *_ = commands(program)
    return parser.parse_args(arguments)


@pytest.mark.parametrize("name", PAGES)
def test_commands_are_understood(name: str) -> None:
    seen = 0
    for program, arguments in command_lines(name):
        options = parsed(program, arguments)
        seen += 1
        if program == "asag-train":
            recipe(options.recipe, options.changes)
        if program == "asag-eval":
            read_ways(options.changes, recipe("scenes").network)
    assert seen >= 2


def test_a_command_that_is_wrong_would_be_found() -> None:
    with pytest.raises(ConfigError, match="unrecognized arguments: --epochs 3"):
        parsed("asag-train", ["--data", "d", "--output-dir", "o", "--epochs", "3"])


def test_every_recipe_ablation_setting_and_file_is_named() -> None:
    train, evaluate, paper = page("train.md"), page("evaluate.md"), page("paper.md")
    assert [name for name in RECIPES if f"`{name}`" not in train] == []
    assert [name for name in ABLATIONS if f"`{name}`" not in paper] == []
    assert [name for name in SWEPT if f"`{name}`" not in evaluate] == []
    files = (BEST, LAST, STATE, STEPS, EVALUATIONS, "recipe.json", "pictures/", "tensorboard/")
    assert [name for name in files if f"`{name}`" not in train] == []


def test_thresholds_of_the_page_are_those_of_the_network_that_comes_with_the_project() -> None:
    """`pack` of the page makes what lies in the tree."""
    from asag_training.checkpoints.loading import load_checkpoint

    said = [arguments for program, arguments in command_lines("train.md") if program == "pack"]
    changes = dict(change.split("=") for change in parsed("pack", said[0]).changes)
    shipped = Path(__file__).parents[2] / "export" / "asag_export" / "asag-a-bccd.safetensors"
    config = load_checkpoint(shipped).config.to_dict()
    assert {name: float(value) for name, value in changes.items()} == {name: config[name] for name in changes}


def test_all_parts_are_converted_with_classes_in_the_order_of_the_network() -> None:
    said = [
        parsed(*line) for line in command_lines("train.md") if line[0] == "asag-data" and "voc" in line[1]
    ]
    assert [options.part for options in said] == [None, "val", "test"]
    assert {(*options.classes,) for options in said} == {PHOTOGRAPHS_CLASSES}
    assert {str(options.output_dir) for options in said} == {"bccd"}
