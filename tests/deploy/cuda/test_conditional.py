"""Conditional nodes: what a body holds runs if the stream finds the condition set, and only then."""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Iterator

import pytest

from asag_deploy.cuda import Cuda, open_cuda
from asag_deploy.cuda.conditional import if_set, new_condition, why_no_conditions
from asag_deploy.errors import BackendError
from fake_cuda import FakeCuda


@pytest.fixture
def api(cuda: FakeCuda) -> Cuda:
    return open_cuda()


@pytest.fixture
def streams(api: Cuda) -> Iterator[list[int]]:
    made = [api.create_stream() for _ in range(3)]
    yield made
    for stream in made:
        api.destroy_stream(stream)


def bytes_at(pointer: int, count: int) -> list[int]:
    return list((ctypes.c_uint8 * count).from_address(pointer))


@pytest.mark.parametrize(("first", "second"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_nested_bodies_run_if_their_condition_is_set(
    cuda: FakeCuda, api: Cuda, streams: list[int], first: int, second: int
) -> None:
    """Decided when the stream runs: the values are given after the launch, and anew for the next one."""
    outer, inner, innermost = streams
    memory, source = api.allocate(2), api.allocate(1)
    ctypes.memset(source, 1, 1)
    given = {"first": 0, "second": 0}

    def decide(stream: int, condition: int, name: str) -> None:
        cuda.put(stream, lambda: cuda.conditions.update({condition: given[name]}))

    api.begin_capture(outer)
    api.clear(memory, 2, outer)
    condition = new_condition(api, outer)
    decide(outer, condition, "first")
    with if_set(api, outer, condition, inner):
        api.copy(memory, source, 1, "on_device", inner)
        nested = new_condition(api, inner)
        decide(inner, nested, "second")
        with if_set(api, inner, nested, innermost):
            api.copy(memory + 1, source, 1, "on_device", innermost)
    graph = api.end_capture(outer)
    for values in ((1, 1), (first, second)):
        api.launch(graph, outer)
        given.update(first=values[0], second=values[1])
        api.synchronize(outer)
        assert bytes_at(memory, 2) == [values[0], values[0] and values[1]]
    api.destroy_graph(graph)
    api.free(memory)
    api.free(source)
    assert set(cuda.leaked()) == {"streams"}


def test_a_condition_that_nothing_sets_is_not_met(cuda: FakeCuda, api: Cuda, streams: list[int]) -> None:
    outer, inner, _ = streams
    api.begin_capture(outer)
    condition = new_condition(api, outer)
    ran: list[bool] = []
    with if_set(api, outer, condition, inner):
        cuda.put(inner, lambda: ran.append(True))
    graph = api.end_capture(outer)
    cuda.conditions[condition] = 1  # of a launch before, which must not matter
    api.launch(graph, outer)
    api.synchronize(outer)
    assert ran == []


def test_a_body_that_fails_leaves_the_streams_usable(cuda: FakeCuda, api: Cuda, streams: list[int]) -> None:
    outer, inner, _ = streams

    def capture() -> None:
        with if_set(api, outer, new_condition(api, outer), inner):
            raise BackendError("the engine cannot be captured")

    api.begin_capture(outer)
    with pytest.raises(BackendError, match="the engine cannot be captured"):
        capture()
    api.abandon_capture(outer)
    for stream in (outer, inner):
        api.begin_capture(stream)
        api.abandon_capture(stream)
    assert cuda.graphs == {}


def test_a_condition_needs_a_capture(api: Cuda, streams: list[int]) -> None:
    with pytest.raises(BackendError, match="nothing is being captured"):
        new_condition(api, streams[0])


def test_bindings_that_lack_a_call(api: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_no_conditions(api) is None
    monkeypatch.delattr(FakeCuda, "cudaGraphAddNode")
    assert "take cuda-bindings 13" in str(why_no_conditions(api))


def test_the_real_module_takes_what_is_given_to_it() -> None:
    """As far as that can be seen without a GPU: every argument is of a kind that the call accepts."""
    pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-python: pip install cuda-bindings")
    real = importlib.import_module("cuda.bindings.runtime")
    if real.cudaGetDeviceCount()[0] == real.cudaError_t.cudaSuccess:
        pytest.skip("this machine has a GPU, on which these calls must not be made")
    params = real.cudaGraphNodeParams()
    params.type = real.cudaGraphNodeType.cudaGraphNodeTypeConditional
    params.conditional.handle = real.cudaGraphConditionalHandle(7)
    params.conditional.type = real.cudaGraphConditionalNodeType.cudaGraphCondTypeIf
    params.conditional.size = 1
    (body,) = params.conditional.phGraph_out
    graph, node, edge = real.cudaGraph_t(), real.cudaGraphNode_t(), real.cudaGraphEdgeData()
    mode = real.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
    instead = real.cudaStreamUpdateCaptureDependenciesFlags.cudaStreamSetCaptureDependencies
    answers = [
        real.cudaGraphConditionalHandleCreate(graph, 0, 1),
        real.cudaGraphAddNode(graph, [node], None, 1, params),
        real.cudaGraphAddNode(graph, [node], [edge], 1, params),
        real.cudaStreamUpdateCaptureDependencies(0, [node], None, 1, instead),
        real.cudaStreamBeginCaptureToGraph(0, body, None, None, 0, mode),
    ]
    assert all(status != real.cudaError_t.cudaSuccess for status, *_ in answers)
    assert len(real.cudaStreamGetCaptureInfo(0)) == 7
