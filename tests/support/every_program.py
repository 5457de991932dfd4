"""Every program of the project: its module and its options."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator

PROGRAMS = {
    "asag-detect": "asag_deploy.detect.cli",
    "asag-build": "asag_deploy.engines.cli",
    "asag-serve": "asag_deploy.serving.cli",
    "asag-batch": "asag_deploy.batch.cli",
    "asag-playground": "asag_deploy.playground.cli",
    "asag-data": "asag_evaluation.data.cli",
    "asag-eval": "asag_training.evaluation.cli",
    "asag-train": "asag_training.cli",
    "pack": "asag_training.checkpoints.pack",
    "asag-quantize": "asag_export.quantize.cli",
    "asag-export": "asag_export.cli",
    "demo": "asag_export.demo.cli",
    "asag-bench": "asag_bench.cli",
    "asag-paper": "asag_bench.paper.cli",
}


def commands(program: str) -> Iterator[tuple[tuple[str, ...], argparse.ArgumentParser]]:
    """Yield a program's parser and those of its commands, each with the words that call it."""
    module = importlib.import_module(PROGRAMS[program])
    yield from _below((), module._parser())


def _below(
    words: tuple[str, ...], parser: argparse.ArgumentParser
) -> Iterator[tuple[tuple[str, ...], argparse.ArgumentParser]]:
    yield words, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                yield from _below((*words, name), below)
