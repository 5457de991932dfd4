"""Feature maps as an INT8 graph hands them out in OpenVINO."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from asag_deploy.backends.openvino.map_ends import maps_for_the_decoder, shorten_ends
from asag_deploy.backends.openvino.models import convert
from asag_deploy.bundle.bundle import Bundle

library = pytest.importorskip("openvino", reason="needs OpenVINO")


def quantised_map(folder: Path, zero_point: Any, scale: Any) -> Path:
    """A graph that rounds `image` to the maps `p2` and `p3`, sums up the last, and gives itself as `p4`."""
    nodes = [
        helper.make_node("QuantizeLinear", ["image", "scale", "zero"], ["integers"]),
        helper.make_node("DequantizeLinear", ["integers", "scale", "zero"], ["floats"]),
        helper.make_node("Transpose", ["floats"], ["p2"], perm=[0, 2, 3, 1]),
        helper.make_node("Transpose", ["floats"], ["p3"], perm=[0, 2, 3, 1]),
        helper.make_node("Transpose", ["image"], ["p4"], perm=[0, 2, 3, 1]),
        helper.make_node("ReduceSum", ["p3"], ["sum"], keepdims=0),
    ]
    sides: list[list[int | str | None]] = [[1, 3, "h", "w"], [1, "h", "w", 3]]
    image, *maps = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, sides[name != "image"])
        for name in ("image", "p2", "p3", "p4")
    )
    constants = [
        numpy_helper.from_array(np.asarray(value), name)
        for name, value in (("scale", scale), ("zero", zero_point))
    ]
    total = helper.make_tensor_value_info("sum", TensorProto.FLOAT, [])
    graph = helper.make_graph(nodes, "maps", [image], [*maps, total], constants)
    path = folder / "maps.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)
    return path


def run(model: Any, image: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
    compiled = library.Core().compile_model(model, "CPU")
    request = compiled.create_infer_request()
    request.infer([image])
    return {
        name: np.array(request.get_output_tensor(i).data)
        for i, port in enumerate(compiled.outputs)
        for name in port.names
    }


IMAGE = np.random.default_rng(0).uniform(-8, 8, (1, 3, 8, 6)).astype(np.float32)  # of which some saturates
MAP = IMAGE.transpose(0, 2, 3, 1)


def test_integers_come_with_their_scale_and_others_as_they_were(tmp_path: Path) -> None:
    path = quantised_map(tmp_path, np.int8(0), np.float32(0.05))
    expected = run(convert(path), IMAGE)
    model = convert(path)
    shorten_ends(model, {"p2", "p4"})
    found = run(model, IMAGE)
    assert found.keys() == expected.keys() | {"p2_scale"}
    assert found["p2"].dtype == np.int8
    assert found["p2_scale"].tolist() == [np.float32(0.05)]
    np.testing.assert_array_equal(found["p2"] * found["p2_scale"], expected["p2"])
    assert np.abs(expected["p3"] - MAP).max() > 1  # of which the graph made less
    for name in ("p3", "p4"):
        np.testing.assert_array_equal(found[name], MAP)
    np.testing.assert_array_equal(found["sum"], expected["sum"])


@pytest.mark.parametrize("zero_point", [np.int8(3), np.uint8(0)], ids=["another zero", "without a sign"])
def test_other_integers_come_as_floats(tmp_path: Path, zero_point: Any) -> None:
    model = convert(quantised_map(tmp_path, zero_point, np.float32(0.05)))
    shorten_ends(model, {"p2"})
    found = run(model, IMAGE)
    assert "p2_scale" not in found
    np.testing.assert_array_equal(found["p2"], MAP)


def test_what_probes_read_stays_float(small_bundle: Bundle) -> None:
    assert maps_for_the_decoder(small_bundle.manifest) == {"p2", "p5"}
    of_a_peer = dataclasses.replace(small_bundle.manifest, graphs=())
    assert maps_for_the_decoder(of_a_peer) == frozenset()
