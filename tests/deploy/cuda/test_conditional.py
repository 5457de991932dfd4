"""Conditional nodes: where they can be, and that the real module takes what is given to it."""

from __future__ import annotations

import importlib

import pytest

from asag_deploy.cuda import Cuda
from asag_deploy.cuda.graph import why_no_conditions
from support.simulated_gpu.fake_cuda import FakeCuda
from support.simulated_gpu.fake_graphs import FakeGraphs


@pytest.mark.parametrize("name", ["cudaGraphAddNode", "cudaStreamIsCapturing"])
def test_bindings_that_lack_a_call(api: Cuda, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    assert why_no_conditions(api) is None
    monkeypatch.delattr(FakeGraphs, name)
    assert "take cuda-bindings 13" in str(why_no_conditions(api))


@pytest.mark.parametrize(
    ("driver", "runtime", "message"),
    [
        (13000, 12080, r"take cuda-bindings 13, but the one here is for CUDA 12.8"),
        (12090, 13000, r"take a driver for CUDA 13, but the one here supports CUDA 12.9"),
    ],
)
def test_older_versions(cuda: FakeCuda, api: Cuda, driver: int, runtime: int, message: str) -> None:
    cuda.driver_version, cuda.runtime_version = driver, runtime
    assert message in str(why_no_conditions(api))


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
    assert int(body) == 0
    memset = real.cudaMemsetParams()
    memset.dst, memset.value = 4096, 0
    memset.elementSize, memset.width, memset.height, memset.pitch = 1, 8, 1, 0
    graph, node = 4096, real.cudaGraphNode_t(7)
    assert int(node) == 7
    answers = [
        real.cudaGraphCreate(0),
        real.cudaGraphConditionalHandleCreate(graph, 0, 1),
        real.cudaGraphAddNode(graph, [node], None, 1, params),
        real.cudaGraphAddChildGraphNode(graph, [node], 1, graph),
        real.cudaGraphAddMemsetNode(graph, [], 0, memset),
        real.cudaGraphGetNodes(graph, 0),
        real.cudaGraphNodeGetType(node),
        real.cudaGraphChildGraphNodeGetGraph(node),
        real.cudaGraphMemcpyNodeGetParams(node),
        real.cudaPointerGetAttributes(4096),
        real.cudaGraphInstantiate(graph, 0),
        real.cudaGraphDestroy(graph),
        real.cudaStreamIsCapturing(64),
    ]
    assert all(status != real.cudaError_t.cudaSuccess for status, *_ in answers)
    assert len(real.cudaGraphGetNodes(graph, 0)) == 3
    copy = real.cudaMemcpy3DParms()
    assert (int(copy.srcPtr.ptr or 0), int(copy.dstPtr.ptr or 0)) == (0, 0)
    assert hasattr(real.cudaPointerAttributes(), "type")
