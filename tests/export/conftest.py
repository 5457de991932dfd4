"""A bundle in float16 that several tests share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from asag_deploy.bundle.bundle import Bundle
from asag_export.cli import main
from asag_training.checkpoints import save_checkpoint
from support.small_network import small_checkpoint


@pytest.fixture(scope="session")
def half_bundle(shared_bundle: Callable[..., Bundle], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The small network's head `aux_1` up to P4 in float16, made by `asag-export`."""

    def export(path: Path) -> None:
        checkpoint = tmp_path_factory.mktemp("checkpoint") / "small.safetensors"
        save_checkpoint(checkpoint, small_checkpoint())
        options = "--head aux_1 --levels p4-p6 --precision fp16 --shorter-side 160 --longer-side 320 --quiet"
        assert main(["--checkpoint", str(checkpoint), "--output-dir", str(path), *options.split()]) == 0

    return shared_bundle("half", export)
