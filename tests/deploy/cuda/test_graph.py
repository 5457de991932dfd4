"""Graphs put together by hand: parts captured alone, and bodies that run if their condition is set."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

import pytest

from asag_deploy.cuda import Cuda
from asag_deploy.cuda.graph import Chain, capture, new_graph, nodes, why_not_a_part
from asag_deploy.errors import BackendError, CaptureError
from support.simulated_gpu.fake_cuda import FakeCuda


def bytes_at(pointer: int, count: int) -> list[int]:
    return list((ctypes.c_uint8 * count).from_address(pointer))


def nothing() -> None:
    """What a kernel without effect does."""


def add_part(api: Cuda, chain: Chain, stream: int, work: Callable[[], None], name: str = "probe") -> None:
    part = capture(api, stream, work)
    try:
        chain.add_part(part, name)
    finally:
        api.destroy_graph(part)


@pytest.mark.parametrize(("first", "second"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_nested_bodies_run_if_their_condition_is_set(
    cuda: FakeCuda, api: Cuda, stream: int, memory: list[int], first: int, second: int
) -> None:
    """Decided when the stream runs: the values are given after the launch, and anew for the next one."""
    target, ones = memory
    given = {"first": 0, "second": 0}

    def add_decision(chain: Chain, name: str) -> int:
        condition = chain.new_condition()
        decide = lambda: cuda.conditions.update({condition: given[name]})  # noqa: E731
        chain.add_kernel(lambda graph, before: cuda.add_kernel_node(graph, before, decide))
        return condition

    with new_graph(api) as root:
        root.add_clear(target, 4)
        body = root.add_if(add_decision(root, "first"))
        add_part(api, body, stream, lambda: api.copy(target, ones, 1, "on_device", stream))
        inner = body.add_if(add_decision(body, "second"))
        add_part(api, inner, stream, lambda: api.copy(target + 1, ones, 1, "on_device", stream))
        add_part(api, root, stream, lambda: api.copy(target + 2, ones, 1, "on_device", stream))
        launchable = root.instantiate()
    assert cuda.graphs == {}
    for values in ((1, 1), (first, second)):
        api.launch(launchable, stream)
        given.update(first=values[0], second=values[1])
        api.synchronize(stream)
        assert bytes_at(target, 4) == [values[0], values[0] and values[1], 1, 0]
    api.destroy_launchable(launchable)


def test_a_condition_that_nothing_sets_is_not_met(
    cuda: FakeCuda, api: Cuda, stream: int, memory: list[int]
) -> None:
    with new_graph(api) as root:
        condition = root.new_condition()
        root.add_kernel(lambda graph, before: cuda.add_kernel_node(graph, before, nothing))
        body = root.add_if(condition)
        add_part(api, body, stream, lambda: api.copy(memory[0], memory[1], 4, "on_device", stream))
        launchable = root.instantiate()
    cuda.conditions[condition] = 1  # of a launch before, which must not matter
    api.launch(launchable, stream)
    api.synchronize(stream)
    assert bytes_at(memory[0], 4) == [0] * 4
    api.destroy_launchable(launchable)


def test_what_is_captured_happens_at_the_launch(
    cuda: FakeCuda, api: Cuda, stream: int, memory: list[int]
) -> None:
    part = capture(api, stream, lambda: api.copy(memory[0], memory[1], 4, "on_device", stream))
    api.synchronize(stream)
    assert bytes_at(memory[0], 4) == [0] * 4
    assert [node.kind for node in nodes(api, part)] == ["Memcpy"]
    launchable = api.instantiate(part)
    api.destroy_graph(part)
    api.launch(launchable, stream)
    api.synchronize(stream)
    assert bytes_at(memory[0], 4) == [1] * 4
    api.destroy_launchable(launchable)
    assert set(cuda.leaked()) == {"streams", "device"}


@pytest.mark.parametrize("place", ["root", "body"])
@pytest.mark.parametrize(
    ("kind", "nested", "sentence"),
    [
        ("Host", False, "it holds a function on the host"),
        ("Host", True, "it holds a function on the host"),
        ("MemAlloc", False, "it holds an allocation of memory"),
        ("MemFree", False, "it holds a release of memory"),
        ("EventRecord", False, "it holds the record of an event"),
        ("WaitEvent", False, "it holds a wait for an event"),
        ("WaitEvent", True, "it holds a wait for an event"),
        ("MemcpyBatch", False, "it holds a node of type MemcpyBatch"),
    ],
)
def test_what_may_not_be_a_part(
    cuda: FakeCuda, api: Cuda, stream: int, kind: str, nested: bool, sentence: str, place: str
) -> None:
    """Also if it is in a part of the part; found before anything is instantiated."""

    def work() -> None:
        cuda.put(stream, nothing, kind)

    def build() -> None:
        with new_graph(api) as inside, new_graph(api) as root:
            part = capture(api, stream, work)
            try:
                if nested:
                    answer = api.module.cudaGraphAddChildGraphNode(inside.graph, [], 0, part)
                    api.must(answer, "put one graph into another")
                chain = root
                if place == "body":
                    condition = root.new_condition()
                    root.add_kernel(lambda graph, before: cuda.add_kernel_node(graph, before, nothing))
                    chain = root.add_if(condition)
                chain.add_part(inside.graph if nested else part, "probe_p4")
            finally:
                api.destroy_graph(part)

    with pytest.raises(CaptureError, match=f"what 'probe_p4' does cannot be a part of the .*: {sentence}"):
        build()
    assert set(cuda.leaked()) == {"streams"}


@pytest.mark.parametrize(
    ("direction", "in_root", "in_body"),
    [
        ("on_device", None, None),
        ("to_device", None, "copies from the host's memory, which the body of a conditional node cannot"),
        ("to_host", "copies to the host's memory", "copies to the host's memory"),
    ],
)
def test_copies_from_and_to_the_host(
    api: Cuda, stream: int, memory: list[int], direction: Any, in_root: str | None, in_body: str | None
) -> None:
    """Told by where the memory is: what the copy says of itself is not asked."""
    pinned = api.allocate_pinned(4)
    sides = {"on_device": memory, "to_device": (memory[0], pinned), "to_host": (pinned, memory[0])}
    target, source = sides[direction]
    part = capture(api, stream, lambda: api.copy(target, source, 4, direction, stream))
    for place, expected in (("root", in_root), ("body", in_body)):
        found = why_not_a_part(api, part, place)  # type: ignore[arg-type]
        assert (found is None) == (expected is None)
        assert (expected or "") in (found or "")
    api.destroy_graph(part)
    api.free_pinned(pinned)


def test_work_that_fails_leaves_the_stream_usable(
    cuda: FakeCuda, api: Cuda, stream: int, memory: list[int]
) -> None:
    calls: list[int] = []

    def fail() -> None:
        calls.append(1)
        api.clear(memory[0], 4, stream)
        raise BackendError("the engine could not be started")

    with pytest.raises(BackendError, match="the engine could not be started"):
        capture(api, stream, fail)
    assert len(calls) == 1
    assert api.capture_status(stream) == "none"
    assert cuda.graphs == {}
    api.destroy_graph(capture(api, stream, nothing))


FORBIDDEN: dict[str, Callable[[Cuda, int], object]] = {
    "allocate": lambda api, stream: api.allocate(4),
    "allocate pinned": lambda api, stream: api.allocate_pinned(4),
    "free": lambda api, stream: api.must(api.module.cudaFree(4096), "free"),
    "synchronize": lambda api, stream: api.synchronize(stream),
    "synchronize the device": lambda api, stream: api.synchronize_device(),
}


@pytest.mark.parametrize("is_lost", [False, True])
@pytest.mark.parametrize("name", FORBIDDEN)
def test_a_call_that_a_capture_forbids(
    cuda: FakeCuda, api: Cuda, stream: int, memory: list[int], name: str, is_lost: bool
) -> None:
    """Whether its failure is noticed by whoever made it, or not."""
    calls: list[int] = []

    def work() -> None:
        api.clear(memory[0], 4, stream)
        calls.append(1)
        try:
            FORBIDDEN[name](api, stream)
        except BackendError:
            if not is_lost:
                raise

    with pytest.raises(CaptureError, match="StreamCapture"):
        capture(api, stream, work)
    assert len(calls) == 3  # as it might have been another thread's doing
    assert api.capture_status(stream) == "none"
    assert cuda.graphs == {}


def test_what_another_thread_spoils_is_captured_again(
    cuda: FakeCuda, api: Cuda, stream: int, memory: list[int]
) -> None:
    spoilt: list[int] = []

    def work() -> None:
        api.clear(memory[0], 4, stream)
        if not spoilt:
            other = threading.Thread(target=lambda: spoilt.append(cuda.cudaDeviceSynchronize()[0]))
            other.start()
            other.join()

    part = capture(api, stream, work)
    assert spoilt == [cuda.cudaError_t.cudaErrorStreamCaptureUnsupported]
    assert [node.kind for node in nodes(api, part)] == ["Memset"]
    api.destroy_graph(part)


def test_an_invalidated_capture_gives_a_null_graph(
    cuda: FakeCuda, api: Cuda, stream: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bindings say so with None or with a handle of zero, also beside success: nothing is destroyed then."""
    for null in (None, 0):
        api.begin_capture(stream)
        monkeypatch.setattr(cuda, "cudaStreamEndCapture", lambda _, null=null: (cuda.cudaError_t(0), null))
        api.abandon_capture(stream)
        monkeypatch.undo()
        api.abandon_capture(stream)
    api.abandon_capture(stream)  # nothing is being captured any more
    assert cuda.graphs == {}
