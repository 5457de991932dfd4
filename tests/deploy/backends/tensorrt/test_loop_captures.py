"""How the loop becomes a graph, and what happens where it cannot: a sentence, and nothing left behind."""

from __future__ import annotations

import gc
import itertools
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from asag_deploy.bundle.bundle import Bundle
from asag_deploy.detector import Detector
from asag_deploy.errors import CaptureError
from support.detection_samples import assert_same
from support.simulated_gpu.device_loops import MIXED, STOPS
from support.simulated_gpu.fake_cuda import FakeCuda
from support.simulated_gpu.fake_kernels import FakeKernels
from support.simulated_gpu.fake_tensorrt import IExecutionContext
from support.tiny_bundle import batch

IN_ORDER = tuple(enumerate(["backbone", "probe_p4", "probe_p3", "decoder"]))


def refuse_bodies(monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda) -> None:
    refused = (cuda.cudaError_t.cudaErrorNotSupported, None)
    monkeypatch.setattr(cuda, "cudaGraphAddNode", lambda *_: refused)


def while_capturing(
    monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda, number: int, act: Callable[[int], Any]
) -> None:
    """Let `act`, given the stream, happen when the stage of that number is captured; False: it fails."""
    original, seen = IExecutionContext.execute_async_v3, itertools.count()

    def execute(self: IExecutionContext, stream_handle: int) -> bool:
        started = original(self, stream_handle)
        if cuda.stream(stream_handle).capture is not None and next(seen) == number:
            return act(stream_handle) is not False and started
        return started

    monkeypatch.setattr(IExecutionContext, "execute_async_v3", execute)


def assert_still_works(cuda: FakeCuda, device: Detector) -> None:
    """Nothing is left of what failed, and the next try goes well."""
    assert len(cuda.graphs) == 0
    assert len(cuda.launchable) == 0
    assert device(STOPS["P3"], channel_order="rgb").trace.levels[-1].level == "P3"


def test_what_the_graph_is_made_of(cuda: FakeCuda, device: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts, decisions and bodies; an engine and what finds the next level's patches make one part."""
    found: list[list[str]] = []
    instantiate = cuda.cudaGraphInstantiate

    def note(graph: int, flags: int) -> Any:
        found.append(cuda.kinds(graph))
        return instantiate(graph, flags)

    monkeypatch.setattr(cuda, "cudaGraphInstantiate", note)
    device.forward(batch(STOPS["P3"]), np.array([[64, 64]]))
    stage, stage_and_select = ["Graph", "Kernel"], ["Graph", "Kernel", "Kernel"]
    inner = ["Kernel", "Conditional", *stage]
    outer = ["Kernel", "Conditional", *stage_and_select, *inner]
    assert found == [["Memset", *stage_and_select, *outer, *stage]]


def test_everything_is_warm_before_the_first_capture(
    cuda: FakeCuda, kernels: FakeKernels, device: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every stage, and every kernel, for loading a module is nothing to do in a capture."""
    launched: list[list[str]] = []
    begin = cuda.cudaStreamBeginCapture

    def begin_capture(stream: int, mode: int) -> Any:
        launched.append(list(kernels.calls))
        return begin(stream, mode)

    monkeypatch.setattr(cuda, "cudaStreamBeginCapture", begin_capture)
    device.forward(batch(STOPS["P3"]), np.array([[64, 64]]))
    assert launched[0].count("patch_nms") == launched[0].count("decide") == 2
    assert len(launched) == 4


def test_what_cannot_be_built_is_an_error_if_it_was_asked_for(
    cuda: FakeCuda, device: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        refuse_bodies(patch, cuda)
        with pytest.raises(CaptureError, match=r"could not be captured in a graph \(.*conditional node"):
            device(STOPS["P3"], channel_order="rgb")
    assert_still_works(cuda, device)


@pytest.mark.parametrize(("number", "stage"), IN_ORDER)
def test_an_engine_that_cannot_start_in_a_capture(
    cuda: FakeCuda, device: Detector, monkeypatch: pytest.MonkeyPatch, number: int, stage: str
) -> None:
    with monkeypatch.context() as patch:
        while_capturing(patch, cuda, number, lambda stream: False)
        with pytest.raises(CaptureError, match=f"'{stage}': it could not be started"):
            device(STOPS["P3"], channel_order="rgb")
    assert_still_works(cuda, device)


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("Host", "a function on the host"),
        ("MemAlloc", "an allocation of memory"),
        ("WaitEvent", "a wait for"),
    ],
)
@pytest.mark.parametrize(("number", "stage"), IN_ORDER)
def test_a_stage_that_holds_what_cannot_be_replayed(
    cuda: FakeCuda,
    device: Detector,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    stage: str,
    kind: str,
    sentence: str,
) -> None:
    """Found before anything is instantiated."""
    instantiated: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(cuda, "cudaGraphInstantiate", lambda graph, flags: instantiated.append(graph))
        while_capturing(patch, cuda, number, lambda stream: bool(cuda.put(stream, lambda: None, kind) == 0))
        with pytest.raises(CaptureError, match=f"what '{stage}' does cannot be a part .*{sentence}.*'host'"):
            device.forward(batch(STOPS["P3"]), np.array([[64, 64]]))
    assert instantiated == []
    assert_still_works(cuda, device)


@pytest.mark.parametrize("number", range(4))
def test_another_thread_that_spoils_a_capture(
    cuda: FakeCuda, host: Detector, device: Detector, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    answers: list[int] = []

    def spoil(stream: int) -> None:
        with ThreadPoolExecutor(1) as pool:
            answers.extend(pool.submit(cuda.cudaDeviceSynchronize).result())

    image = [STOPS["P3"]]
    expected = host(image, channel_order="rgb")
    while_capturing(monkeypatch, cuda, number, spoil)
    assert_same(expected, device(image, channel_order="rgb"))
    assert answers == [cuda.cudaError_t.cudaErrorStreamCaptureUnsupported]


def test_a_finaliser_in_the_midst_of_a_capture(
    cuda: FakeCuda, bundle: Bundle, host: Detector, device: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of another detector's outputs, which have outlived it."""
    with Detector.load(bundle, backend="tensorrt", loop="device") as other:
        held = [other.forward_on_device(batch(STOPS["P4"]), np.array([[64, 64]]))]
    del other
    gc.collect()
    during: list[int] = []
    image = [STOPS["P3"]]
    expected = host(image, channel_order="rgb")

    def let_go(stream: int) -> None:
        before = cuda.leaked()["device"]
        held.clear()
        during.append(cuda.leaked()["device"] - before)

    while_capturing(monkeypatch, cuda, 1, let_go)
    answers: list[Any] = []
    free = cuda.cudaFree

    def note(pointer: int) -> Any:
        answers.append(free(pointer))
        return answers[-1]

    monkeypatch.setattr(cuda, "cudaFree", note)
    assert_same(expected, device(image, channel_order="rgb"))
    assert during == [0]
    assert set(answers) == {(cuda.cudaError_t.cudaSuccess,)}


def test_an_engine_of_which_the_library_says_that_it_cannot_be_captured(
    cuda: FakeCuda, device: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(IExecutionContext, "is_stream_capturable", lambda *_: False)
    with pytest.raises(CaptureError, match="graph 'backbone': it says that its work cannot be captured"):
        device(STOPS["P3"], channel_order="rgb")
    assert cuda.leaked().get("graphs") is None


def test_auto_goes_on_with_the_host_and_says_why(
    cuda: FakeCuda, kernels: FakeKernels, bundle: Bundle, host: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_bodies(monkeypatch, cuda)
    with Detector.load(bundle, backend="tensorrt-rtx") as detector:
        with pytest.warns(RuntimeWarning, match="runs on the host from now on: .*captured") as warned:
            first = detector(MIXED, channel_order="rgb")
        assert len(warned) == 1
        assert_same(host(MIXED, channel_order="rgb"), first)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert_same(first, detector(MIXED, channel_order="rgb"))
