"""PyTorch's stages where engines would be, on a simulated GPU: both loops, captured graphs, the kernels."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from asag_bench.runners.torch_cuda import OnGpu, TorchStage
from asag_bench.runners.torch_cuda_graphs import SameShapes
from asag_bench.runners.torch_cuda_operators import KernelOperators
from asag_deploy.backends.hooked_network import HookedNetwork
from asag_deploy.backends.tensorrt.backend import EngineNetwork
from asag_deploy.backends.tensorrt.device_loop import DeviceLoop
from asag_deploy.errors import BackendError
from asag_deploy.kernels import KernelLibrary
from asag_deploy.loop.probing import Probed, detect
from asag_deploy.loop.stopping import StopRule
from asag_training.checkpoints import Checkpoint
from asag_training.network import operators
from asag_training.network.model import build
from asag_training.network.operator_choice import use_operators
from asag_training.network.stage_plan import build_stages, probing_plan
from asag_training.network.stages import TorchNetwork
from support import naive_operators as naive
from support.simulated_gpu.fake_cuda import FakeCuda
from support.simulated_gpu.fake_torch import fake_torch_network
from support.small_network import small_checkpoint

RULES = {
    "P3": StopRule(),
    "P4": StopRule(max_level="P4"),
    "P5": StopRule(max_level="P5"),
    "fast": StopRule(min_selected=3, max_patches=15),
}
SIZES = np.array([[128, 160], [100, 160]], dtype=np.int64)
CHECKPOINT = small_checkpoint(backbone_depth=26)
PROBING = probing_plan(CHECKPOINT.config)


def images() -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(0).normal(size=(2, 3, 128, 160)).astype(np.float32)


@pytest.fixture
def made(
    monkeypatch: pytest.MonkeyPatch, host_library_path: Path
) -> Iterator[tuple[EngineNetwork, FakeCuda]]:
    network, cuda, _ = fake_torch_network(monkeypatch, host_library_path, CHECKPOINT, PROBING)
    yield network, cuda
    network.close()
    assert cuda.leaked() == {}


@pytest.fixture(scope="module")
def network(host_library_path: Path) -> Iterator[EngineNetwork]:
    """One for all tests that leave it as it is."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        shared, cuda, _ = fake_torch_network(monkeypatch, host_library_path, CHECKPOINT, PROBING)
        yield shared
        shared.close()
        assert cuda.leaked() == {}


def assert_same(network: Any, expected: Probed, other: Any, found: Probed, atol: float) -> None:
    assert expected.stop == found.stop
    np.testing.assert_array_equal(expected.probed, found.probed)
    counts = network.download(expected.outputs["anchor_count"])
    np.testing.assert_array_equal(other.download(found.outputs["anchor_count"]), counts)
    for name in ("logits", "boxes", "anchors"):
        one, two = network.download(expected.outputs[name]), other.download(found.outputs[name])
        for i, count in enumerate(counts):
            np.testing.assert_allclose(two[i, :count], one[i, :count], atol=atol, rtol=1e-4)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_both_loops_find_what_pytorch_finds(network: EngineNetwork, rule: StopRule) -> None:
    plain = TorchNetwork(build_stages(build(CHECKPOINT.config, CHECKPOINT.state), PROBING))
    expected = detect(plain, PROBING, rule, plain.upload(images()), SIZES)
    loop = network.open_device_loop()
    assert isinstance(loop, DeviceLoop)
    for _ in range(3):  # as it is, captured, and replayed
        image = network.upload(images())
        host = detect(network, PROBING, rule, image, SIZES)
        assert_same(plain, expected, network, host, atol=2e-4)
        assert_same(network, host, network, loop(network, PROBING, rule, image, SIZES), atol=2e-4)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_the_hosts_loop_can_give_the_same_shapes(network: EngineNetwork, rule: StopRule) -> None:
    """Else a GPU's libraries may take other kernels for one loop than for the other, which round otherwise.

    But the anchors of a level that an image does not reach are selected from, and nothing else.
    """
    given: dict[str, dict[str, tuple[int, ...]]] = {}

    def note(stage: str, inputs: Any) -> None:
        given[stage] = {name: array.shape for name, array in inputs.items()}

    image, loop = network.upload(images()), network.open_device_loop()
    alike = SameShapes(network, PROBING, rule)
    detect(HookedNetwork(alike, before=note), PROBING, rule, image, SIZES)
    loop(alike, PROBING, rule, image, SIZES)
    (graph,) = (graph for graph in loop._graphs.values() if graph._rule == rule)
    assert {"backbone", "decoder"} <= given.keys() <= graph._calls.keys()
    for stage, shapes in given.items():
        in_graph = graph._calls[stage].context._context._shapes
        for tensor in network._stages[stage].inputs:
            if not tensor.name.startswith(("anchors_", "selected_")):
                assert shapes[tensor.name] == in_graph[tensor.name], (stage, tensor.name)


def test_stages_are_replayed(made: tuple[EngineNetwork, FakeCuda]) -> None:
    network, cuda = made
    image = network.upload(images())
    before = cuda.launches
    for _ in range(6):
        detect(network, PROBING, StopRule(max_level="P5"), image, SIZES)
    assert cuda.launches - before >= 2 * 3
    allocated = network.device.allocated
    for _ in range(5):
        detect(network, PROBING, StopRule(max_level="P5"), image, SIZES)
    assert network.device.allocated == allocated


def test_a_thread_captures_only_what_it_has_run(made: tuple[EngineNetwork, FakeCuda]) -> None:
    """Libraries make handles and plans for each thread, and not while a stream captures."""
    network, cuda = made
    stage, before = network.stage("backbone"), cuda.launches
    inputs = {"image": network.upload(images()), "image_size": network.upload(SIZES)}
    for _ in range(2):
        stage(inputs)
    with ThreadPoolExecutor(1) as thread:
        thread.submit(stage, inputs).result()
    assert cuda.launches == before, "what this thread has run was captured by another"
    stage(inputs)
    assert cuda.launches == before + 1


def test_from_several_threads(network: EngineNetwork) -> None:
    loop, rule = network.open_device_loop(), StopRule()
    image = network.upload(images())
    expected = detect(network, PROBING, rule, image, SIZES)

    def once(number: int) -> Probed:
        return (detect if number % 2 else loop)(network, PROBING, rule, image, SIZES)

    with ThreadPoolExecutor(4) as threads:
        for found in threads.map(once, range(24)):
            assert_same(network, expected, network, found, atol=2e-4)


def test_half_precision(monkeypatch: pytest.MonkeyPatch, host_library_path: Path) -> None:
    network, _, _ = fake_torch_network(monkeypatch, host_library_path, CHECKPOINT, PROBING, "fp16")
    image = network.upload(images())
    host = detect(network, PROBING, StopRule(), image, SIZES)
    device = network.open_device_loop()(network, PROBING, StopRule(), image, SIZES)
    assert (
        network.stage("backbone")({"image": image, "image_size": network.upload(SIZES)})["p2"].dtype
        == np.float16
    )
    assert_same(network, host, network, device, atol=0.05)
    network.close()


@pytest.mark.parametrize("variant", ["asag-a-r50-100", "asag-s-r50-100", "asag-a-lite-s"])
def test_the_kernels_take_the_place_of_the_operators(host_library_path: Path, variant: str) -> None:
    checkpoint: Checkpoint = small_checkpoint(variant)
    network = TorchNetwork(build_stages(build(checkpoint.config, checkpoint.state), PROBING))
    image = network.upload(images())
    expected = detect(network, PROBING, StopRule(), image, SIZES)
    library = CountingLibrary(host_library_path)
    with use_operators(KernelOperators(library, stream=lambda: 0)):
        found = detect(network, PROBING, StopRule(), image, SIZES)
    assert {"multiscale_roi_align", "pad_anchors"} <= set(library.calls)
    assert ("pyramid_sample" in library.calls) == (variant != "asag-s-r50-100")
    assert_same(network, expected, network, found, atol=2e-4)
    calls = len(library.calls)
    detect(network, PROBING, StopRule(), image, SIZES)
    assert len(library.calls) == calls, "they are back after the block"


def test_deformable_sampling_is_the_kernel(host_library_path: Path) -> None:
    library = CountingLibrary(host_library_path)
    maps = [torch.from_numpy(each).half() for each in naive.pyramid(0, 64, 96, channels=16)]
    given = [torch.from_numpy(each) for each in naive.deformable_points(1, naive.pyramid(0, 64, 96))]
    expected = operators.deformable_sample(maps, *given)
    with use_operators(KernelOperators(library, stream=lambda: 0)):
        turned = [each.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3) for each in maps]
        found = operators.deformable_sample(turned, *given)
    assert library.calls == ["deformable_sample"]
    assert found.dtype == torch.float16
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-4)


class CountingLibrary(KernelLibrary):
    """The kernels for the CPU, and what was called."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "host")
        self.calls: list[str] = []

    def run(self, operator: str, arguments: Any, stream: int = 0) -> None:
        self.calls.append(operator)
        super().run(operator, arguments, stream)


def test_a_wrong_input_is_refused(network: EngineNetwork) -> None:
    stage, size = network.stage("backbone"), network.upload(SIZES)
    assert isinstance(stage, TorchStage)
    with pytest.raises(BackendError, match="asks for an input 'image' that"):
        stage({"image_size": size})
    with pytest.raises(BackendError, match="takes 'image' as float32, got int64; convert it first"):
        stage({"image": size, "image_size": size})
    odd = network.upload(np.zeros((1, 5, 32, 32), np.float32))
    with pytest.raises(BackendError, match="takes no inputs of these shapes"):
        stage({"image": odd, "image_size": size})


def test_what_pytorch_says_when_it_fails(made: tuple[EngineNetwork, FakeCuda]) -> None:
    network, _ = made
    stage: Any = network.stage("backbone")

    def run(stream: int, work: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    stage._access.run = run
    inputs = {"image": network.upload(images()), "image_size": network.upload(SIZES)}
    with pytest.raises(
        BackendError, match=r"in the stage 'backbone': it could not be started \(CUDA out of memory\.\)"
    ):
        stage(inputs)


def test_what_pytorch_has_begun_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as putting weights into another order, on its own stream, for which no other waits."""
    done: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("waited"))
    monkeypatch.setattr(torch.cuda, "MemPool", lambda: None)
    OnGpu()
    assert done == ["waited"]
