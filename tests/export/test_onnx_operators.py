"""The operators' ONNX functions, as ONNX Runtime executes them, against their PyTorch references."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnxruntime
import onnxscript
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper

from asag_export.choices import OPSETS
from asag_export.onnx_operators import (
    DOMAIN,
    FUNCTIONS,
    AdaptiveMixing,
    DeformableSample,
    MultiscaleRoIAlign,
    PadAnchors,
    PyramidSample,
    function_of,
)
from asag_training.network.config import Activation
from asag_training.network.operators import (
    MIXING_ACTIVATIONS,
    ONNX_VERSION,
    adaptive_mixing,
    deformable_sample,
    multiscale_roi_align,
    pad_anchors,
    pyramid_sample,
)
from support import naive_operators as naive
from support.naive_operators import STRIDES, PadSettings

OPSET = 20
Arrays = Sequence[NDArray[Any]]
Spec = tuple[int, list[Any]]
"""Element type and shape of an input or output."""

PYRAMID = {f"p{i}": ["b", f"h{i}", f"w{i}", "c"] for i in (2, 3, 4, 5)}
PAD_INPUTS: dict[str, Spec] = {
    "anchors": (TensorProto.FLOAT, ["b", "n", 5]),
    "keep": (TensorProto.BOOL, ["b", "n"]),
    "image_size": (TensorProto.INT64, ["b", 2]),
    "slots": (TensorProto.INT64, ["q"]),
}
COUNT: Spec = (TensorProto.INT64, ["b"])


def model_of(
    function: onnxscript.OnnxFunction[Any, Any],
    inputs: Mapping[str, Spec],
    outputs: Mapping[str, Spec],
    attributes: Mapping[str, Any],
    opset: int = OPSET,
) -> onnx.ModelProto:
    """A model whose only node is the operator, and which carries its function."""
    node = helper.make_node(function.name, list(inputs), list(outputs), domain=DOMAIN, **attributes)
    proto = function_of(function, [node], opset)
    graph = helper.make_graph(
        [node],
        function.name,
        [helper.make_tensor_value_info(name, *spec) for name, spec in inputs.items()],
        [helper.make_tensor_value_info(name, *spec) for name, spec in outputs.items()],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, ONNX_VERSION)]
    return helper.make_model(graph, functions=[proto], opset_imports=imports, ir_version=10)


def runner(model: onnx.ModelProto) -> Callable[..., list[NDArray[Any]]]:
    """Runs one session, whatever the shapes that come."""
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]

    def run(*arrays: NDArray[Any]) -> list[NDArray[Any]]:
        return [np.asarray(out) for out in session.run(None, dict(zip(names, arrays, strict=True)))]

    return run


def roi_model(float_type: int, strides: Sequence[int] = STRIDES, opset: int = OPSET) -> onnx.ModelProto:
    inputs: dict[str, Spec] = {name: (float_type, list(shape)) for name, shape in PYRAMID.items()}
    inputs["boxes"] = (TensorProto.FLOAT, ["b", "q", 4])
    output: Spec = (float_type, ["b", "q", 7, 7, "c"])
    return model_of(MultiscaleRoIAlign, inputs, {"out": output}, {"strides": list(strides)}, opset)


def sample_model(float_type: int, strides: Sequence[int] = STRIDES, opset: int = OPSET) -> onnx.ModelProto:
    inputs: dict[str, Spec] = {name: (float_type, list(shape)) for name, shape in PYRAMID.items()}
    inputs["xy"] = (TensorProto.FLOAT, ["b", "q", "g", "p", 2])
    inputs["weight"] = (TensorProto.FLOAT, ["b", "q", "g", "p", 4])
    output: Spec = (float_type, ["b", "q", "g", "p", "width"])
    return model_of(PyramidSample, inputs, {"out": output}, {"strides": list(strides)}, opset)


def deformable_model(float_type: int, opset: int = OPSET) -> onnx.ModelProto:
    inputs: dict[str, Spec] = {name: (float_type, list(shape)) for name, shape in PYRAMID.items()}
    inputs["xy"] = (TensorProto.FLOAT, ["b", "q", "g", 4, "p", 2])
    inputs["weight"] = (TensorProto.FLOAT, ["b", "q", "g", 4, "p"])
    return model_of(DeformableSample, inputs, {"out": (float_type, ["b", "q", "c"])}, {}, opset)


def mixing_model(
    inputs: naive.MixingInputs, activation: Activation, float_type: int, opset: int = OPSET
) -> onnx.ModelProto:
    *_, groups, points, channels = inputs.sampled.shape
    attributes = {"groups": groups, "points": points, "channels": channels, "out_points": inputs.out_points}
    specs: dict[str, Spec] = {
        "sampled": (float_type, ["b", "q", groups, points, channels]),
        "parameters": (float_type, ["b", "q", inputs.parameters.shape[-1]]),
    }
    out: Spec = (float_type, ["b", "q", groups * inputs.out_points * channels])
    attributes["activation"] = MIXING_ACTIVATIONS.index(activation)
    return model_of(AdaptiveMixing, specs, {"out": out}, attributes, opset)


def pad_model(settings: PadSettings, opset: int = OPSET) -> onnx.ModelProto:
    outputs: dict[str, Spec] = {"queries": (TensorProto.FLOAT, ["b", "q", 4]), "count": COUNT}
    return model_of(PadAnchors, PAD_INPUTS, outputs, settings._asdict(), opset)


def torch_roi(features: Arrays, boxes: NDArray[Any], strides: Sequence[int] = STRIDES) -> NDArray[Any]:
    maps = [torch.from_numpy(feature) for feature in features]
    return multiscale_roi_align(maps, torch.from_numpy(boxes), strides).numpy()


def torch_sample(
    features: Arrays, xy: NDArray[Any], weight: NDArray[Any], strides: Sequence[int] = STRIDES
) -> NDArray[Any]:
    maps = [torch.from_numpy(feature) for feature in features]
    return pyramid_sample(maps, torch.from_numpy(xy), torch.from_numpy(weight), strides).numpy()


def torch_deformable(features: Arrays, xy: NDArray[Any], weight: NDArray[Any]) -> NDArray[Any]:
    maps = [torch.from_numpy(feature) for feature in features]
    return deformable_sample(maps, torch.from_numpy(xy), torch.from_numpy(weight)).numpy()


def torch_mixing(inputs: naive.MixingInputs, activation: Activation) -> NDArray[Any]:
    tensors = (torch.from_numpy(inputs.sampled), torch.from_numpy(inputs.parameters))
    return adaptive_mixing(*tensors, inputs.out_points, activation).numpy()


SIZES = [(203, 317, 2), (64, 96, 1), (33, 500, 3), (640, 480, 1), (7, 5, 2)]
"""Height, width and batch."""


@pytest.mark.parametrize("strides", [STRIDES, (8, 16, 32, 64)])
def test_roi_align(strides: tuple[int, ...]) -> None:
    run = runner(roi_model(TensorProto.FLOAT, strides))
    for height, width, batch in SIZES:
        features = naive.pyramid(0, height, width, batch=batch, channels=6)
        boxes = naive.roi_boxes(1, height, width, batch=batch)
        (actual,) = run(*features, boxes)
        expected = torch_roi(features, boxes, strides)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5, err_msg=f"{height}x{width}")


def test_roi_align_in_half_precision() -> None:
    run = runner(roi_model(TensorProto.FLOAT16))
    for height, width, batch in SIZES:
        features = naive.pyramid(2, height, width, batch=batch)
        boxes = naive.roi_boxes(3, height, width, batch=batch)
        (actual,) = run(*(feature.astype(np.float16) for feature in features), boxes)
        assert actual.dtype == np.float16
        # Coordinates stay in float32, so only features, weights and sums of 16 are rounded.
        worst = max(float(np.abs(feature).max()) for feature in features)
        np.testing.assert_allclose(
            actual.astype(np.float32), torch_roi(features, boxes), rtol=0, atol=4 * 2**-11 * worst
        )


@pytest.mark.parametrize("strides", [STRIDES, (8, 16, 32, 64)])
def test_pyramid_sample(strides: tuple[int, ...]) -> None:
    run = runner(sample_model(TensorProto.FLOAT, strides))
    for (height, width, batch), groups in zip(SIZES, (1, 2, 3, 4, 6), strict=True):
        features = naive.pyramid(4, height, width, batch=batch, channels=12)
        points = naive.sample_points(5, height, width, batch=batch, groups=groups, points=1 + groups % 6)
        (actual,) = run(*features, *points)
        # PyTorch first scales points to -1..1, whose rounding counts on steep maps.
        expected = torch_sample(features, *points, strides)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-4, err_msg=f"{height}x{width}")


def test_pyramid_sample_in_half_precision() -> None:
    run = runner(sample_model(TensorProto.FLOAT16))
    for height, width, batch in SIZES:
        features = naive.pyramid(6, height, width, batch=batch, channels=8)
        points = naive.sample_points(7, height, width, batch=batch)
        (actual,) = run(*(feature.astype(np.float16) for feature in features), *points)
        assert actual.dtype == np.float16
        worst = max(float(np.abs(feature).max()) for feature in features)
        np.testing.assert_allclose(
            actual.astype(np.float32), torch_sample(features, *points), rtol=0, atol=4 * 2**-11 * worst
        )


DEFORMABLE_SIZES = [*zip(SIZES, (1, 2, 3, 4, 6), strict=True), ((1, 1, 2), 12)]
"""Height, width and batch, and groups of 12 channels."""


def test_deformable_sample() -> None:
    run, in_openvino = runner(deformable_model(TensorProto.FLOAT)), openvino_runner()
    for (height, width, batch), groups in DEFORMABLE_SIZES:
        features = naive.pyramid(9, height, width, batch=batch, channels=12)
        given = naive.deformable_points(10, features, groups=groups, points=1 + groups % 4)
        expected = torch_deformable(features, *given)
        for actual in (run(*features, *given)[0], in_openvino(*features, *given)):
            np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4, err_msg=f"{height}x{width}")


def openvino_runner() -> Callable[..., NDArray[Any]]:
    """Runs deformable sampling by OpenVINO in float32, whatever the shapes that come."""
    openvino = pytest.importorskip("openvino")
    model = onnx.inliner.inline_local_functions(deformable_model(TensorProto.FLOAT))
    core = openvino.Core()
    exactly = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(core.read_model(model.SerializeToString()), "CPU", exactly)
    return lambda *arrays: np.array(compiled(list(arrays))[0])


def test_deformable_sample_of_no_queries() -> None:
    features = naive.pyramid(0, 64, 96, channels=4)
    given = naive.deformable_points(0, features, queries=0)
    (actual,) = runner(deformable_model(TensorProto.FLOAT))(*features, *given)
    assert actual.shape == (2, 0, 4)


def test_deformable_sample_in_half_precision() -> None:
    run = runner(deformable_model(TensorProto.FLOAT16))
    for (height, width, batch), groups in DEFORMABLE_SIZES:
        features = naive.pyramid(11, height, width, batch=batch, channels=12)
        halves = [feature.astype(np.float16) for feature in features]
        given = naive.deformable_points(12, features, groups=groups)
        (actual,) = run(*halves, *given)
        assert actual.dtype == np.float16
        # Only what comes out is rounded.
        expected = torch_deformable([half.astype(np.float32) for half in halves], *given)
        np.testing.assert_allclose(actual.astype(np.float32), expected, rtol=2**-11, atol=1e-4)


@pytest.mark.parametrize("activation", MIXING_ACTIVATIONS)
def test_adaptive_mixing(activation: Activation) -> None:
    inputs = naive.mixing_inputs(0, 2, 3, 2, 5, 6, 7)
    run = runner(mixing_model(inputs, activation, TensorProto.FLOAT))
    for queries in (3, 1, 0):
        sampled, parameters = inputs.sampled[:, :queries].copy(), inputs.parameters[:, :queries].copy()
        (actual,) = run(sampled, parameters)
        expected = torch_mixing(inputs._replace(sampled=sampled, parameters=parameters), activation)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5, err_msg=f"{queries} queries")
    assert expected.shape == (2, 0, 2 * 7 * 6)


@pytest.mark.parametrize("activation", MIXING_ACTIVATIONS)
def test_adaptive_mixing_in_half_precision(activation: Activation) -> None:
    inputs = naive.mixing_inputs(1, 2, 3, 2, 5, 6, 7)
    halves = [each.astype(np.float16) for each in inputs[:2]]
    (actual,) = runner(mixing_model(inputs, activation, TensorProto.FLOAT16))(*halves)
    assert actual.dtype == np.float16
    exact = inputs._replace(sampled=halves[0].astype(np.float32), parameters=halves[1].astype(np.float32))
    expected = torch_mixing(exact, activation)
    np.testing.assert_allclose(actual.astype(np.float32), expected, rtol=0, atol=2e-2)


PAD_SETTINGS = [PadSettings(), PadSettings(10, 10, 15), PadSettings(5, 1, 5), PadSettings(20, 7, 100)]


@pytest.mark.parametrize("settings", PAD_SETTINGS)
def test_pad_anchors(settings: PadSettings) -> None:
    run = runner(pad_model(settings))
    for name, anchors, keep, image_size, slots in naive.pad_inputs(settings):
        tensors = (torch.from_numpy(anchors), torch.from_numpy(keep), torch.from_numpy(image_size))
        expected = pad_anchors(*tensors, torch.arange(slots), **settings._asdict())
        outputs = run(anchors, keep, image_size, np.arange(slots))
        for actual, tensor in zip(outputs, expected, strict=True):
            np.testing.assert_array_equal(actual, tensor.numpy(), err_msg=name)


@pytest.mark.parametrize("opset", OPSETS)
def test_every_opset_is_enough_for_the_bodies(opset: int) -> None:
    padded = next(naive.pad_inputs(PadSettings()))
    arrays = (padded.anchors, padded.keep, padded.image_size, np.arange(padded.slots))
    queries, _ = runner(pad_model(PadSettings(), opset))(*arrays)
    np.testing.assert_array_equal(queries, runner(pad_model(PadSettings()))(*arrays)[0])

    features, boxes = naive.pyramid(0, 64, 96), naive.roi_boxes(1, 64, 96)
    (out,) = runner(roi_model(TensorProto.FLOAT, opset=opset))(*features, boxes)
    np.testing.assert_allclose(out, torch_roi(features, boxes), rtol=0, atol=1e-5)

    points = naive.sample_points(2, 64, 96, groups=5)
    (out,) = runner(sample_model(TensorProto.FLOAT, opset=opset))(*features, *points)
    np.testing.assert_allclose(out, torch_sample(features, *points), rtol=0, atol=1e-4)

    given = naive.deformable_points(2, features, groups=5)
    (out,) = runner(deformable_model(TensorProto.FLOAT, opset))(*features, *given)
    np.testing.assert_allclose(out, torch_deformable(features, *given), rtol=0, atol=1e-4)

    inputs = naive.mixing_inputs(0, 2, 3, 2, 5, 6, 7)
    for activation in MIXING_ACTIVATIONS:
        (out,) = runner(mixing_model(inputs, activation, TensorProto.FLOAT, opset))(*inputs[:2])
        np.testing.assert_allclose(out, torch_mixing(inputs, activation), rtol=0, atol=1e-5)


def test_functions_are_of_standard_operators() -> None:
    names = {function.name for function in FUNCTIONS}
    assert names == {
        "MultiscaleRoIAlign",
        "PyramidSample",
        "DeformableSample",
        "AdaptiveMixing",
        "PadAnchors",
    }
    for function in FUNCTIONS:
        proto = function.to_function_proto()
        assert proto.domain == DOMAIN
        assert {node.domain for node in proto.node} == {""}
        # Engines that lack these refuse the whole graph, and they make shapes depend on values.
        used = {node.op_type for node in proto.node}
        assert not used & {
            "Loop",
            "If",
            "Scan",
            "NonZero",
            "NonMaxSuppression",
            "RoiAlign",
            "Compress",
            "Unique",
        }
