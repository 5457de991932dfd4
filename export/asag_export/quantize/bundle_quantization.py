"""Quantise a float32 bundle to an INT8 bundle: complete and measured, or not at all."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
from numpy.typing import NDArray

from asag_deploy import __version__
from asag_deploy.atomic import check_spares
from asag_deploy.backends import DEFAULT_BACKEND
from asag_deploy.bundle.bundle import Bundle, BundleWriter, write_bundle
from asag_deploy.detector import Detector
from asag_deploy.errors import BundleCorruptError, ConfigError, ParityError
from asag_deploy.images.reading import RgbImage
from asag_evaluation.data.coco import CocoDataset
from asag_export.quantize.calibration import check_detectable, stage_inputs
from asag_export.quantize.cost import (
    ACTIVATIONS,
    DEFAULT_MOST_LOSS,
    LEAST_SIGNAL_TO_NOISE,
    Activations,
    QuantizationReport,
    compare_accuracy,
    signal_to_noise,
)
from asag_export.quantize.graph_quantization import quantize_graph
from asag_export.quantize.placement import PLACEMENTS

_LEAST_SCORE = 0.05
_JUDGED_PICTURES = 8

Progress = Callable[[str], None]
"""Called with what is being done, once for each picture calibrated on and each image measured on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantization:
    """Result of a quantisation."""

    bundle: Bundle
    report: QuantizationReport


def check_quantizable(bundle: Bundle) -> None:
    """Raise ConfigError unless the bundle's graphs are float32."""
    precision = bundle.manifest.precision
    if precision == "int8":
        raise ConfigError(
            f"'{bundle.shown}' is quantised already; give the float32 bundle that it was made from"
        )
    if precision != "fp32":
        raise ConfigError(
            f"the graphs of '{bundle.shown}' are {precision}, and ranges are measured in float32; "
            "export the checkpoint again with `asag-export --precision fp32`"
        )


def quantize_bundle(
    bundle: Bundle,
    output_dir: str | os.PathLike[str],
    pictures: Sequence[RgbImage],
    *,
    activations: Activations = "int8",
    data: CocoDataset | None = None,
    backends: Sequence[str] = (DEFAULT_BACKEND,),
    most_loss: float = DEFAULT_MOST_LOSS,
    overwrite: bool = False,
    keep_failed: bool = False,
    progress: Progress = lambda step: None,
) -> Quantization:
    """Write the quantised bundle to `output_dir`, and measure what it costs.

    pictures: to calibrate on, from `read_pictures`; activations: what to make of them, see `Activations`;
    data: annotated images on which AP of both bundles is measured, with each of `backends`; most_loss: how
    much AP may fall, 0 to 1.

    The bundle appears only if what the stages give is near that in float32 and AP does not fall too far,
    unless `keep_failed`.  Raises ConfigError for a bundle that is not float32, an unknown kind of
    activations or another `most_loss`, DataError for pictures that do not suit the network, ExportError if a
    graph cannot be quantised, ParityError if it costs too much, OutputError if the bundle cannot be written
    or would replace the one that is read.
    """
    check_quantizable(bundle)
    check_spares(output_dir, bundle.path)
    if activations not in ACTIVATIONS:
        raise ConfigError(f"unknown activations '{activations}'; choose one of {', '.join(ACTIVATIONS)}")
    if not 0 <= most_loss <= 1:
        raise ConfigError(f"most_loss is {most_loss}; expected 0 to 1")
    with Detector.load(bundle) as detector:
        check_detectable(pictures, detector, _LEAST_SCORE)

    with write_bundle(output_dir, overwrite=overwrite) as writer:
        quantized = {}
        for name, placement in PLACEMENTS.items():
            inputs = _told(stage_inputs(bundle, name, pictures), progress, f"calibrating {name}")
            quantized[name] = quantize_graph(_read_graph(bundle, name), inputs, activations, placement)
        _copy_graphs(bundle, writer, quantized)
        manifest = dataclasses.replace(
            bundle.manifest, producer=f"asag-deploy {__version__}", precision="int8", graphs=()
        )
        made = writer.finish(manifest)
        report = QuantizationReport(
            activations=activations,
            pictures=len(pictures),
            convolutions=_quantized_nodes(quantized["backbone"], "Conv"),
            products=_quantized_nodes(quantized["decoder"], "MatMul"),
            signal_to_noise=_signal_to_noise(bundle, made, pictures[:_JUDGED_PICTURES]),
            least_signal_to_noise=LEAST_SIGNAL_TO_NOISE,
            accuracy=compare_accuracy(bundle, made, data, backends, lambda: progress("measuring AP"))
            if data is not None
            else (),
            most_loss=most_loss,
        )
        failures = report.failures()
        parity = {"passed": not failures, "quantization": report.to_dict(), "float32": bundle.manifest.parity}
        writer.finish(dataclasses.replace(manifest, parity=parity))
        if failures and not keep_failed:
            raise ParityError(_too_much(failures[0], output_dir))
    return Quantization(bundle=Bundle.open(Path(output_dir)), report=report)


def _quantized_nodes(model: onnx.ModelProto, operator: str) -> int:
    """Count the nodes of a type that multiply by weights of 8 bits."""
    linear = {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    return sum(node.op_type == operator and node.input[1] in linear for node in model.graph.node)


def _signal_to_noise(bundle: Bundle, made: Bundle, pictures: Sequence[RgbImage]) -> dict[str, float]:
    found: dict[str, float] = {}
    for stage in PLACEMENTS:
        found |= signal_to_noise(bundle, made, stage, stage_inputs(bundle, stage, pictures))
    return found


def _too_much(failure: str, output_dir: str | os.PathLike[str]) -> str:
    return (
        f"quantising costs too much: {failure}; calibrate on more pictures like those the network will see, "
        f"or keep the bundle with --keep-failed (nothing was written to '{output_dir}')"
    )


def _copy_graphs(bundle: Bundle, writer: BundleWriter, quantized: Mapping[str, onnx.ModelProto]) -> None:
    """Add all graphs: those that are quantised, and the others as they are, each with its precision."""
    for graph in bundle.manifest.graphs:
        made = quantized.get(graph.name)
        writer.add_graph(
            graph.name,
            bundle.graph_path(graph.name).read_bytes() if made is None else made.SerializeToString(),
            inputs=graph.inputs,
            outputs=graph.outputs,
            precision=bundle.manifest.precision_of(graph.name) if made is None else None,
        )


def _read_graph(bundle: Bundle, name: str) -> onnx.ModelProto:
    path = bundle.graph_path(name)
    try:
        return onnx.load(path)
    except Exception as error:  # protobuf's exceptions have no base of their own
        raise BundleCorruptError(
            f"'{path}' is not an ONNX graph; export the bundle again with `asag-export`"
        ) from error


def _told(
    inputs: Iterable[dict[str, NDArray[Any]]], progress: Progress, step: str
) -> Iterator[dict[str, NDArray[Any]]]:
    for given in inputs:
        yield given
        progress(step)
