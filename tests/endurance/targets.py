"""What is fuzzed: targets by name, each opened where it is needed, since some take PyTorch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import MappingProxyType

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from endurance.judging import Opened, Target

TARGETS: Mapping[str, str] = MappingProxyType(
    {
        "manifests": "targets_bundles",
        "graphs": "targets_bundles",
        "records": "targets_records",
        "images": "targets_images",
        "videos": "targets_images",
        "annotations": "targets_annotations",
        "checkpoints": "targets_checkpoints",
        "states": "targets_checkpoints",
        "requests": "targets_requests",
        "commands": "targets_commands",
    }
)
"""Targets by name, with the module that has the function `open_NAME`."""

NEED_PYTORCH = ("records", "checkpoints", "states", "commands")


def target(name: str) -> Opened:
    """Return the function that opens a target."""
    if name == SELF_CHECK:
        return _self_check
    opened: Opened = getattr(import_module(f"endurance.{TARGETS[name]}"), f"open_{name}")
    return opened


SELF_CHECK = "self-check"
"""A target that ends its process at one of two inputs, for the fuzzer's own test."""


@contextmanager
def _self_check(folder: Path) -> Iterator[Target]:
    def run(data: bytes) -> None:
        if data == b"end":
            os.abort()

    yield Target(inputs=st.sampled_from((b"fine", b"end")), run=run)


Part = tuple[SearchStrategy[bytes], Callable[[bytes], object]]


def one_of_parts(parts: Mapping[str, Part]) -> tuple[SearchStrategy[bytes], Callable[[bytes], object]]:
    """Join several readers: an input's first line is the name of the one that gets the rest."""

    def headed(name: str) -> SearchStrategy[bytes]:
        return parts[name][0].map(lambda content: name.encode() + b"\n" + content)

    def run(data: bytes) -> object:
        name, _, content = data.partition(b"\n")
        return parts[name.decode()][1](content)

    return st.sampled_from(sorted(parts)).flatmap(headed), run
