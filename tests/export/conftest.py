"""Bundles that several tests share, each exported once per run of the suite, by whichever worker is first."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from asag_deploy.bundle import Bundle
from asag_deploy.manifest import Preprocessing
from asag_export.cli import main
from asag_training.checkpoints import save_checkpoint
from small_network import export_small, small_checkpoint

SMALL_IMAGES = Preprocessing(shorter_side=160, longer_side=320)


@pytest.fixture(scope="session")
def shared_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Bundle]:
    """A function that gives the bundle of that name, which the first to ask makes with the given function."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent

    def get(name: str, export: Callable[[Path], object]) -> Bundle:
        path = folder / name
        with (folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                export(path)
        return Bundle.open(path)

    return get


@pytest.fixture(scope="session")
def small_bundle(shared_bundle: Callable[..., Bundle]) -> Bundle:
    """The small network, every level, exact, float32; it resizes images to 160 pixels."""
    return shared_bundle("small", lambda path: export_small(path, preprocessing=SMALL_IMAGES))


@pytest.fixture(scope="session")
def half_bundle(shared_bundle: Callable[..., Bundle], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The small network's head `aux_1` up to P4 in float16, made by `asag-export`."""

    def export(path: Path) -> None:
        checkpoint = tmp_path_factory.mktemp("checkpoint") / "small.safetensors"
        save_checkpoint(checkpoint, small_checkpoint())
        options = "--head aux_1 --levels p4-p6 --precision fp16 --shorter-side 160 --longer-side 320 --quiet"
        assert main(["--checkpoint", str(checkpoint), "--output-dir", str(path), *options.split()]) == 0

    return shared_bundle("half", export)
