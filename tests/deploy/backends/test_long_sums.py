"""INT8 products whose sums are long, as OpenVINO runs them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from asag_deploy.backends.openvino.long_sums import int8_weights, split_long_sums
from asag_deploy.backends.openvino.products import multiply_in_bfloat16

openvino = pytest.importorskip("openvino", reason="needs OpenVINO")
operators = pytest.importorskip("openvino.opset13", reason="needs OpenVINO")

COLUMNS = 8
ROWS = 5


def layer(terms: int, *, floats: bool = False, transposed: bool = False, by_row: bool = False) -> Any:
    """A model of `integers @ weights`, whose sums have so many terms; its result is called `sums`."""
    rng = np.random.default_rng(0)
    given = operators.parameter([-1, terms], np.float32, name="given")
    rounded = operators.fake_quantize(
        given, np.float32(-4), np.float32(3.96875), np.float32(-4), np.float32(3.96875), 256
    )
    weights = rng.integers(-127, 128, (terms, COLUMNS)).astype(np.int8)
    scale = rng.uniform(0.5, 1.5, (terms, 1) if by_row else (1, COLUMNS)).astype(np.float32) / 1000
    if transposed:
        weights, scale = np.ascontiguousarray(weights.T), np.ascontiguousarray(scale.T)
    if floats:
        factor = operators.constant(weights.astype(np.float32) * scale)
    else:
        zero = operators.convert(operators.constant(np.zeros((1, 1), np.int8)), np.float32)
        shifted = operators.subtract(operators.convert(operators.constant(weights), np.float32), zero)
        factor = operators.multiply(shifted, operators.constant(scale))
    product = operators.matmul(rounded, factor, False, transposed)
    product.output(0).set_names({"sums"})
    return openvino.Model([product], [given], "layer")


def run(model: Any, given: NDArray[np.float32]) -> NDArray[np.float32]:
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert compiled.output(0).names == {"sums"}
    return np.array(compiled(given)[0])


def products(model: Any) -> list[Any]:
    return [node for node in model.get_ops() if node.get_type_name() == "MatMul"]


def test_long_sums_are_taken_in_parts_of_8192_terms() -> None:
    given = np.random.default_rng(1).uniform(-4, 4, (ROWS, 32768)).astype(np.float32)
    expected = run(layer(32768), given)
    model = split_long_sums(layer(32768))
    sizes = [node.input_value(1).get_partial_shape().to_shape() for node in products(model)]
    assert [list(size) for size in sizes] == [[8192, COLUMNS]] * 4
    np.testing.assert_allclose(run(model, given), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"terms": 8192},  # short
        {"terms": 20000},  # not a multiple
        {"terms": 32768, "floats": True},
        {"terms": 32768, "transposed": True},
        {"terms": 32768, "by_row": True},  # what is cut off would need scales of its own
    ],
    ids=str,
)
def test_other_products_stay_whole(options: dict[str, Any]) -> None:
    assert len(products(split_long_sums(layer(**options)))) == 1


def test_products_of_integers_are_not_rounded_to_bfloat16() -> None:
    """In bfloat16 they would take twice as long as in INT8."""
    (integers,) = products(multiply_in_bfloat16(layer(8192)))
    assert int8_weights(integers.input_value(1)) is not None
    assert integers.get_element_type() == openvino.Type.f32
    (floats,) = products(multiply_in_bfloat16(layer(8192, floats=True)))
    assert int8_weights(floats.input_value(1)) is None
    assert floats.get_element_type() == openvino.Type.bf16
