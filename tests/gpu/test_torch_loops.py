"""Both loops over PyTorch's stages on a GPU: equal on pictures of every exit level, and in four threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from asag_bench.runners.references import open_with_kernels
from asag_deploy.backends.tensorrt.backend import EngineNetwork
from asag_deploy.bundle.manifest import Level, Manifest, Precision
from support import gpu_checks as checks

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

EACH = 100
CALLS, THREADS = 1000, 4
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16")

Pictures = dict[Level, list[checks.Picture]]


@pytest.fixture(scope="module", params=PRECISIONS)
def manifest(request: pytest.FixtureRequest) -> Manifest:
    return checks.manifest_of(checks.demo_checkpoint(), request.param)


@pytest.fixture(scope="module")
def network(manifest: Manifest) -> Iterator[EngineNetwork]:
    given = (checks.demo_checkpoint(), manifest.probing, manifest.precision, manifest.preprocessing)
    made = open_with_kernels(*given)
    yield made
    made.close()


@pytest.fixture(scope="module")
def pictures(network: EngineNetwork, manifest: Manifest) -> Pictures:
    return checks.pictures_of_every_level(network, manifest, EACH)


def test_stages_can_be_captured(network: EngineNetwork, manifest: Manifest, pictures: Pictures) -> None:
    checks.check_captures(network, manifest, pictures["P3"][0])


def test_decisions_and_detections_are_equal(
    network: EngineNetwork, manifest: Manifest, pictures: Pictures
) -> None:
    checks.check_loops(network, manifest, pictures)


def test_calls_from_four_threads(network: EngineNetwork, manifest: Manifest, pictures: Pictures) -> None:
    of_all = [picture for of_level in pictures.values() for picture in of_level[:10]]
    checks.check_threads(network, manifest, of_all, calls=CALLS, threads=THREADS)


def test_the_cpu_finds_the_same(network: EngineNetwork, manifest: Manifest, pictures: Pictures) -> None:
    if manifest.precision != "fp32":
        pytest.skip("rounding to float16 moves scores across thresholds: compared in float32")
    checks.check_cpu_agrees(
        network, manifest, [of_level[i] for of_level in pictures.values() for i in range(8)]
    )
