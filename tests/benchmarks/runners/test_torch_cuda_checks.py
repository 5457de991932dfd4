"""The checks that are for a GPU (`tests/gpu`), on the simulated one and with few pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from asag_deploy.backends.tensorrt.backend import EngineNetwork
from asag_deploy.bundle.manifest import Level, Manifest
from support import gpu_checks as checks
from support.simulated_gpu.fake_torch import fake_torch_network


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    return checks.manifest_of(checks.demo_checkpoint())


@pytest.fixture(scope="module")
def network(host_library_path: Path) -> Iterator[EngineNetwork]:
    checkpoint = checks.demo_checkpoint()
    with pytest.MonkeyPatch.context() as monkeypatch:
        made, _, _ = fake_torch_network(monkeypatch, host_library_path, checkpoint, checks.demo_probing())
        yield made
        made.close()


@pytest.fixture(scope="module")
def pictures(manifest: Manifest) -> dict[Level, list[checks.Picture]]:
    return checks.pictures_of_every_level(checks.on_the_cpu(manifest), manifest, 1)


@pytest.mark.slow
def test_loops(
    network: EngineNetwork, manifest: Manifest, pictures: dict[Level, list[checks.Picture]]
) -> None:
    checks.check_loops(network, manifest, pictures)


@pytest.mark.slow
def test_threads(
    network: EngineNetwork, manifest: Manifest, pictures: dict[Level, list[checks.Picture]]
) -> None:
    of_all = [picture for of_level in pictures.values() for picture in of_level]
    checks.check_threads(network, manifest, of_all, calls=12, threads=4)


def test_cpu_agrees(
    network: EngineNetwork, manifest: Manifest, pictures: dict[Level, list[checks.Picture]]
) -> None:
    checks.check_cpu_agrees(network, manifest, pictures["P3"])


def test_processing(
    network: EngineNetwork, manifest: Manifest, pictures: dict[Level, list[checks.Picture]]
) -> None:
    small = np.ascontiguousarray(pictures["P4"][0][:200, :130])
    checks.check_processing(network, manifest, [pictures["P5"][0], small])


def test_memory(
    network: EngineNetwork, manifest: Manifest, pictures: dict[Level, list[checks.Picture]]
) -> None:
    checks.check_memory(network, manifest, pictures["P4"], rounds=2)


def test_pinned(network: EngineNetwork) -> None:
    checks.check_pinned(network, rounds=10)


def test_captures(
    network: EngineNetwork, manifest: Manifest, pictures: dict[Level, list[checks.Picture]]
) -> None:
    checks.check_captures(network, manifest, pictures["P3"][0])
