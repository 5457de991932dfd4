"""Memory of a network on a GPU: pools, pinned memory, PyTorch's arrays in and out, and what kernels write."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch as _torch

from asag_bench.runners.references import open_with_kernels
from asag_deploy.backends.tensorrt.backend import EngineNetwork
from asag_deploy.bundle.manifest import Manifest
from asag_evaluation.data.doodles import draw_doodles
from support import gpu_checks as checks
from support.detection_samples import assert_same

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

torch: Any = _torch  # whose types lack much of what is used here

SIZES = ((320, 320), (256, 320), (500, 333), (90, 200), (640, 480), (211, 333))
"""Heights and widths of pictures: some grow, some shrink, one does both."""


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    return checks.manifest_of(checks.demo_checkpoint())


def open_network(manifest: Manifest) -> EngineNetwork:
    return open_with_kernels(checks.demo_checkpoint(), manifest.probing, "fp32", manifest.preprocessing)


@pytest.fixture
def network(manifest: Manifest) -> Iterator[EngineNetwork]:
    made = open_network(manifest)
    yield made
    made.close()


@pytest.fixture(scope="module")
def pictures() -> list[checks.Picture]:
    return [draw_doodles(*size, seed=i) for i, size in enumerate(SIZES)]


def test_pictures_and_detections_are_processed_as_on_the_cpu(
    network: EngineNetwork, manifest: Manifest, pictures: list[checks.Picture]
) -> None:
    checks.check_processing(network, manifest, pictures)


def test_memory_does_not_grow(
    network: EngineNetwork, manifest: Manifest, pictures: list[checks.Picture]
) -> None:
    checks.check_memory(network, manifest, pictures, rounds=5)
    before = torch.cuda.memory_reserved()
    checks.check_memory(network, manifest, pictures, rounds=5)
    assert torch.cuda.memory_reserved() == before


def test_pinned_memory_is_used_again(network: EngineNetwork) -> None:
    checks.check_pinned(network)


@pytest.mark.parametrize("loop", ["host", "device"])
def test_arrays_of_pytorch_in_and_out(network: EngineNetwork, manifest: Manifest, loop: Any) -> None:
    """Where they lie, in the order of PyTorch's own streams, also as soon as it lets go of them."""
    images = np.random.default_rng(0).normal(size=(1, 3, 320, 320)).astype(np.float32)
    sizes = np.array([[320, 320]])
    detector = checks.detector_of(network, manifest, network.loop(loop))
    expected = detector.forward(images, sizes)
    here = torch.from_numpy(images)
    for round_ in range(20):
        stream = torch.cuda.Stream() if round_ % 2 else torch.cuda.default_stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(1_000_000)  # what is still being computed has to be waited for
            there = here.to("cuda", non_blocking=True) * 2 / 2
            outputs = detector.forward_on_device(there, sizes)
            del there
            torch.full((1, 3, 320, 320), float("nan"), device="cuda")  # may lie where it lay
            logits = torch.from_dlpack(outputs["logits"]) + 0
            again = torch.as_tensor(outputs["boxes"], device="cuda") + 0
        stream.synchronize()
        count = expected.logits.shape[1]
        np.testing.assert_allclose(logits.cpu().numpy()[:, :count], expected.logits, atol=1e-4)
        np.testing.assert_allclose(again.cpu().numpy()[:, :count], expected.boxes, atol=1e-5)


def test_a_picture_of_pytorch_is_used_where_it_lies(network: EngineNetwork, manifest: Manifest) -> None:
    picture = draw_doodles(400, 300, seed=1)
    detector = checks.detector_of(network, manifest)
    expected = detector(picture, channel_order="rgb")
    found = detector(torch.from_numpy(picture).cuda(), channel_order="rgb")
    assert_same(expected, found)


def test_a_closed_network_holds_no_memory(manifest: Manifest) -> None:
    for _ in range(3):
        network = open_network(manifest)
        detector = checks.detector_of(network, manifest, network.loop("device"))
        detector(draw_doodles(320, 320, seed=0), channel_order="rgb")
        assert network.device.allocated > 0
        del detector
        gc.collect()
        network.close()
        assert network.device.allocated == 0
