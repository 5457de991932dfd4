"""Quantise one graph with ONNX Runtime's quantiser, which adds QuantizeLinear and DequantizeLinear nodes."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    create_calibrator,
    quantize_static,
    save_tensors_data,
)

from asag_deploy.errors import ExportError
from asag_deploy.scratch import scratch_folder
from asag_export.quantize.cost import Activations
from asag_export.quantize.placement import Placement, name_nodes, rectified, settle_weights

_TYPES = {"int8": QuantType.QInt8, "uint8": QuantType.QUInt8}


def quantize_graph(
    model: onnx.ModelProto,
    inputs: Iterable[Mapping[str, NDArray[Any]]],
    activations: Activations,
    placement: Placement,
) -> onnx.ModelProto:
    """Quantise what `placement` chooses of a graph.

    Weights are int8, symmetric, per output channel; activations get the range that they have over all
    `inputs`.  A tensor that goes through a ReLU gets the range of what comes out, so that the half of the
    values below zero costs no precision.  Raises ConfigError if there is nothing to choose, ExportError if
    the quantiser fails.
    """
    source = onnx.ModelProto()
    source.CopyFrom(model)
    settle_weights(source)
    name_nodes(source)
    nodes = placement.choose(source)
    with scratch_folder() as folder, _quiet():
        try:
            ranges = _calibrate(source, inputs, placement, folder)
            for tensor, result in rectified(source, nodes).items():
                ranges.data[tensor] = ranges.data[result]
            cache, output = folder / "ranges.json", folder / "quantized.onnx"
            save_tensors_data(ranges, cache)
            quantize_static(
                source,
                output,
                calibration_cache_path=cache,
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=list(placement.operators),
                nodes_to_quantize=[node.name for node in nodes],
                per_channel=True,
                activation_type=_TYPES[activations],
                weight_type=QuantType.QInt8,
                extra_options=_options(activations, placement),
            )
            quantized = onnx.load(output)
        except (ValueError, RuntimeError, TypeError, KeyError, onnx.checker.ValidationError) as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise ExportError(f"ONNX Runtime could not quantise the graph: {reason[0]}") from error
    _tidy(quantized, model)
    return quantized


def _options(activations: Activations, placement: Placement) -> dict[str, Any]:
    symmetric = activations == "int8"
    return {
        "ActivationSymmetric": symmetric,
        "WeightSymmetric": True,
        # TensorRT adds biases in float32; ONNX Runtime quantises them itself when it loads the graph.
        "QuantizeBias": not symmetric,
        "OpTypesToExcludeOutputQuantization": [] if placement.results else list(placement.operators),
    }


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    """Inputs one by one, as the calibrator asks for them."""

    def __init__(self, inputs: Iterable[Mapping[str, NDArray[Any]]]) -> None:
        self._inputs: Iterator[Mapping[str, NDArray[Any]]] = iter(inputs)

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        """Return the next inputs, or None when there are no more."""
        inputs = next(self._inputs, None)
        return None if inputs is None else dict(inputs)


def _calibrate(
    model: onnx.ModelProto,
    inputs: Iterable[Mapping[str, NDArray[Any]]],
    placement: Placement,
    folder: Path,
) -> Any:
    """Measure the least and greatest value of every tensor that may be quantised."""
    path = folder / "float.onnx"
    onnx.save(model, path)
    calibrator = create_calibrator(
        path,
        list(placement.operators),
        augmented_model_path=str(folder / "watched.onnx"),
        calibrate_method=CalibrationMethod.MinMax,
    )
    calibrator.collect_data(_Reader(inputs))
    ranges = calibrator.compute_data()
    for name, found in ranges.data.items():
        if not all(np.isfinite(value).all() for value in found.range_value):
            raise ExportError(
                f"the tensor '{name}' is not finite in some calibration picture, so it has no range; "
                "check the bundle with `asag-detect`"
            )
    return ranges


def _tidy(quantized: onnx.ModelProto, model: onnx.ModelProto) -> None:
    """Name the producer as in the bundle's other graphs, and drop the quantiser's notes."""
    quantized.producer_name, quantized.producer_version = model.producer_name, model.producer_version
    del quantized.metadata_props[:]
    quantized.metadata_props.extend(model.metadata_props)
    onnx.checker.check_model(quantized)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the quantiser's advice, to fold constants and infer shapes, off the screen: that has been done."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
