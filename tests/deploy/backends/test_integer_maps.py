"""Feature maps that OpenVINO hands out as integers stand for what the graph would have put out as floats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from asag_deploy.backends.openvino.backend import _convert
from asag_deploy.backends.openvino.integer_maps import hand_out_integers, maps_for_the_decoder
from asag_deploy.bundle.bundle import Bundle

library = pytest.importorskip("openvino", reason="needs OpenVINO")


def quantised_map(folder: Path, zero_point: Any, scale: Any) -> Path:
    """A graph that quantises `image` and transposes it to the map `p2`, and hands on a copy as `p3`."""
    nodes = [
        helper.make_node("QuantizeLinear", ["image", "scale", "zero"], ["integers"]),
        helper.make_node("DequantizeLinear", ["integers", "scale", "zero"], ["floats"]),
        helper.make_node("Transpose", ["floats"], ["p2"], perm=[0, 2, 3, 1]),
        helper.make_node("Transpose", ["floats"], ["p3"], perm=[0, 2, 3, 1]),
        helper.make_node("Transpose", ["image"], ["p4"], perm=[0, 2, 3, 1]),
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
    graph = helper.make_graph(nodes, "maps", [image], maps, constants)
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


def test_integers_come_with_their_scale(tmp_path: Path) -> None:
    path = quantised_map(tmp_path, np.int8(0), np.float32(0.05))
    image = np.random.default_rng(0).uniform(-8, 8, (1, 3, 8, 6)).astype(np.float32)  # some of it saturates
    expected = run(_convert(path), image)
    model = _convert(path)
    hand_out_integers(model, {"p2", "p4"})
    found = run(model, image)
    assert {name: found[name].dtype for name in ("p2", "p3", "p4")} == {
        "p2": np.int8,
        "p3": np.float32,  # nobody asked for it
        "p4": np.float32,  # it is none
    }
    assert found["p2_scale"].tolist() == [np.float32(0.05)]
    np.testing.assert_array_equal(found["p2"] * found["p2_scale"], expected["p2"])
    assert len(np.unique(found["p2"])) > 50
    for name in ("p3", "p4"):
        np.testing.assert_array_equal(found[name], expected[name])


@pytest.mark.parametrize(
    ("zero_point", "scale"),
    [(np.int8(3), np.float32(0.05)), (np.uint8(0), np.float32(0.05))],
    ids=["of another zero", "without a sign"],
)
def test_other_integers_become_floats_in_the_graph(tmp_path: Path, zero_point: Any, scale: Any) -> None:
    path = quantised_map(tmp_path, zero_point, scale)
    image = np.random.default_rng(0).uniform(-8, 8, (1, 3, 8, 6)).astype(np.float32)
    expected = run(_convert(path), image)
    model = _convert(path)
    hand_out_integers(model, {"p2"})
    found = run(model, image)
    assert found.keys() == expected.keys()
    np.testing.assert_array_equal(found["p2"], expected["p2"])


def test_what_probes_read_stays_float(small_bundle: Bundle) -> None:
    assert maps_for_the_decoder(small_bundle.manifest) == {"p2", "p5"}
