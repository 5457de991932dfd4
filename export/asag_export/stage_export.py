"""Export one stage of a network as an ONNX model.

Every graph is dynamic in batch and image size and in nothing else: no shape depends on values.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator, Mapping

import onnx
import onnx_ir as ir
import torch
from onnxscript import optimizer
from torch import Tensor, nn

from asag_deploy.bundle.manifest import Precision, Probing, TensorSpec
from asag_deploy.errors import ConfigError, ExportError
from asag_export.choices import OPSETS
from asag_export.onnx_operators import DOMAIN, FUNCTIONS, function_of
from asag_training.network.body import FrozenBatchNorm2d
from asag_training.network.config import AsagConfig
from asag_training.network.model import Asag
from asag_training.network.operators import ONNX_VERSION
from asag_training.network.stages import StageModule

ExportedStage = tuple[onnx.ModelProto, tuple[TensorSpec, ...], tuple[TensorSpec, ...]]
"""A stage's model, its inputs and its outputs."""

FULL_PRECISION = ("normalize",)
"""Stages that compute in float32 whatever the network's weights are in."""

_EXAMPLE_BATCH = 2
_EXAMPLE_SIZE = (192, 256)
_EXAMPLE_PATCHES = 3
_EXAMPLE_QUERIES = 7

_FLOAT = {"fp32": torch.float32, "fp16": torch.float16}
_DTYPES: dict[str, torch.dtype] = {
    "uint8": torch.uint8,
    "int64": torch.int64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bool": torch.bool,
}


def prepare_for_export(model: Asag, precision: Precision) -> Asag:
    """Copy a network with BatchNorm folded into the convolutions and weights in one type.

    The weights decide the precision of what is computed; blocks of the network keep coordinates, logarithms
    and softmax in float32 by themselves.
    """
    prepared = copy.deepcopy(model).eval().requires_grad_(False)
    for module in list(prepared.modules()):
        fold_batch_norm(module)
    return prepared.to(_FLOAT[precision])


def fold_batch_norm(parent: nn.Module) -> None:
    """Fold every frozen BatchNorm among the children of `parent` into the convolution before it."""
    convolution: nn.Conv2d | None = None
    for name, child in parent.named_children():
        if isinstance(child, FrozenBatchNorm2d):
            assert convolution is not None, f"BatchNorm '{name}' follows no convolution"
            scale, shift = child.scale_and_shift()
            weight = convolution.weight * scale[:, None, None, None]
            convolution.weight = nn.Parameter(weight, requires_grad=False)
            convolution.bias = nn.Parameter(shift.clone(), requires_grad=False)
            setattr(parent, name, nn.Identity())
        convolution = child if isinstance(child, nn.Conv2d) else None


def export_stage(
    stage: StageModule,
    config: AsagConfig,
    probing: Probing,
    *,
    precision: Precision,
    opset: int,
    more: Mapping[str, TensorSpec] | None = None,
) -> ExportedStage:
    """Export one stage; returns the model and its inputs and outputs.

    more: what comes into it that comes into no stage of a bundle, such as the backbone's own maps.

    Raises ConfigError for an opset that is not supported, ExportError if the model cannot be made or is not
    valid ONNX.
    """
    check_opset(opset)
    inputs = stage_inputs(stage, config, probing, precision, more)
    outputs = stage_outputs(stage, config, probing, precision)
    arguments = tuple(_example(spec) for spec in inputs)
    proto = export_module(
        stage,
        stage.name,
        arguments,
        inputs,
        outputs,
        opset=opset,
        dynamic_shapes=_dynamic_axes(stage, inputs),
    )
    return proto, inputs, outputs


def export_module(
    module: nn.Module,
    name: str,
    arguments: tuple[Tensor, ...],
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    *,
    opset: int,
    dynamic_shapes: tuple[object, ...] | None = None,
) -> onnx.ModelProto:
    """Export any module, traced with `arguments`, as a valid ONNX model.

    name: what messages call it; dynamic_shapes: as `torch.onnx.export` takes them, None where every size is
    that of the arguments.  Raises ExportError if the model cannot be made or is not valid ONNX.
    """
    try:
        with _quiet():
            program = torch.onnx.export(
                module,
                arguments,
                input_names=[spec.name for spec in inputs],
                output_names=[spec.name for spec in outputs],
                dynamic_shapes=dynamic_shapes,
                opset_version=opset,
                dynamo=True,
                optimize=False,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise ExportError(f"PyTorch could not export the stage '{name}': {error}") from error
    assert program is not None
    model = program.model
    _add_functions(model, opset)
    with _quiet():
        optimizer.optimize_ir(model, inline=False)
    _tidy(model, inputs, outputs)
    proto = ir.serde.serialize_model(model)
    check(proto, name)
    return proto


def check_opset(opset: int) -> None:
    """Raise ConfigError for a version of ONNX's operators that graphs cannot be exported to."""
    if opset not in OPSETS:
        raise ConfigError(f"opset {opset} is not supported; choose {OPSETS.start} to {OPSETS.stop - 1}")


def check(model: onnx.ModelProto, name: str) -> None:
    """Raise ExportError unless the model is valid ONNX and its shapes can be inferred throughout."""
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the exported graph '{name}' is not valid ONNX: {error}") from error


def stage_inputs(
    stage: StageModule,
    config: AsagConfig,
    probing: Probing,
    precision: Precision,
    more: Mapping[str, TensorSpec] | None = None,
) -> tuple[TensorSpec, ...]:
    """List the inputs of a stage in order; more: as `export_stage` takes it."""
    known = _tensors(stage, config, probing, precision) | dict(more or {})
    return tuple(known[name] for name in stage.inputs)


def stage_outputs(
    stage: StageModule, config: AsagConfig, probing: Probing, precision: Precision
) -> tuple[TensorSpec, ...]:
    """List the outputs of a stage in order."""
    known = _tensors(stage, config, probing, precision) | _outputs(stage, config)
    return tuple(known[name] for name in stage.outputs)


def _tensors(
    stage: StageModule, config: AsagConfig, probing: Probing, precision: Precision
) -> dict[str, TensorSpec]:
    """Describe every tensor that may come into a stage, by name, and the feature maps."""
    feature = "float16" if precision == "fp16" else "float32"
    dim = config.hidden_dim
    capacity: dict[str, int] = {level.level: level.capacity for level in probing.levels}
    own_level = stage.name.removeprefix("probe_").upper()
    specs = [
        _spec("pixels", "uint8", "batch", "height", "width", 3),
        _spec("image", "float32", "batch", 3, "height", "width"),
        _spec("image_size", "int64", "batch", 2),
        *(_spec(f"p{i}", feature, "batch", f"height_p{i}", f"width_p{i}", dim) for i in (2, 3, 4, 5, 6)),
        _spec("feature", feature, "batch", "height_feature", "width_feature", dim),
        _spec("feature_size", "int64", 2),
        _spec("patches", "int64", "batch", capacity.get(own_level, 0), 2),
        _spec("patch_count", "int64", "batch"),
        _spec("slots", "int64", "patches"),
        _spec("anchors_p5", "float32", "batch", 5 * config.first_level_anchors, 5),
        _spec("selected_p5", "bool", "batch", 5 * config.first_level_anchors),
        _spec("anchors_p4", "float32", "batch", "anchors_p4", 5),
        _spec("selected_p4", "bool", "batch", "anchors_p4"),
        _spec("anchors_p3", "float32", "batch", "anchors_p3", 5),
        _spec("probed", "bool", "batch", len(probing.levels)),
        _spec("query_slots", "int64", "queries"),
    ]
    return {spec.name: spec for spec in specs}


def _outputs(stage: StageModule, config: AsagConfig) -> dict[str, TensorSpec]:
    """Describe every tensor that may come out of a stage, by name."""
    first = stage.name == "backbone"
    anchors: int | str = 5 * config.first_level_anchors if first else "anchors"
    specs = [
        _spec("selected", "bool", "batch", anchors),
        _spec("counts", "int64", "batch", 4),
        _spec("logits", "float32", "batch", "queries", config.num_classes),
        _spec("boxes", "float32", "batch", "queries", 4),
        _spec("anchor_count", "int64", "batch"),
        _spec("det_scores", "float32", "batch", "detections"),
        _spec("det_labels", "int64", "batch", "detections"),
        _spec("det_boxes", "float32", "batch", "detections", 4),
        _spec("proposal_scores", "float32", "batch", "queries"),
        _spec("proposal_boxes", "float32", "batch", "queries", 4),
        _spec("anchors", "float32", "batch", "queries", 4)
        if stage.name == "decoder"
        else _spec("anchors", "float32", "batch", anchors, 5),
    ]
    return {spec.name: spec for spec in specs}


def _spec(name: str, dtype: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape)


def _dynamic_axes(stage: StageModule, inputs: tuple[TensorSpec, ...]) -> tuple[object, ...]:
    """Mark the dynamic axes of each argument, as `torch.onnx.export` wants to know them."""
    axes = tuple(
        {i: torch.export.Dim.DYNAMIC for i, size in enumerate(spec.shape) if isinstance(size, str)}
        for spec in inputs
    )
    # The decoder takes its many inputs as *args, which the exporter sees as one argument.
    return (axes,) if stage.name == "decoder" else axes


def _example(spec: TensorSpec) -> Tensor:
    """Make a tensor to trace with.  Dynamic sizes differ from each other and from 1: none is specialised."""
    height, width = _EXAMPLE_SIZE
    sizes = {"batch": _EXAMPLE_BATCH, "height": height, "width": width, "patches": _EXAMPLE_PATCHES}
    sizes |= {"queries": _EXAMPLE_QUERIES, "anchors_p4": 40, "anchors_p3": 60}
    for i in (2, 3, 4, 5, 6):
        for maps in ("c", "p"):
            sizes |= {f"height_{maps}{i}": height >> i, f"width_{maps}{i}": width >> i}
    sizes |= {"height_feature": height >> 3, "width_feature": width >> 3}
    shape = [size if isinstance(size, int) else sizes[size] for size in spec.shape]
    if spec.name == "feature_size":
        return torch.tensor([sizes["height_feature"], sizes["width_feature"]])
    if spec.name == "image_size":
        return torch.tensor([[height, width]]).repeat(_EXAMPLE_BATCH, 1)
    if spec.name in ("slots", "query_slots"):
        return torch.arange(shape[0])
    return torch.zeros(shape, dtype=_DTYPES[spec.dtype])


def _add_functions(model: ir.Model, opset: int) -> None:
    """Give the model the bodies of the `asag` operators it uses."""
    used = [node for node in model.graph if node.domain == DOMAIN]
    for script in FUNCTIONS:
        calls = [ir.serde.serialize_node(node) for node in used if node.op_type == script.name]
        if calls:
            function = ir.serde.deserialize_function(function_of(script, calls, opset))
            function.doc_string = None  # rewording it would be another graph, and engines of it stale
            model.functions[function.identifier()] = function
    if used:
        model.opset_imports[DOMAIN] = ONNX_VERSION


def _tidy(model: ir.Model, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
    """Name the dynamic dimensions, and drop what the tracer noted about the machine it ran on."""
    for values, specs in ((model.graph.inputs, inputs), (model.graph.outputs, outputs)):
        for value, spec in zip(values, specs, strict=True):
            value.name = spec.name
            value.shape = ir.Shape(spec.shape)
    model.producer_name, model.producer_version = "asag-deploy", None
    model.doc_string = None
    model.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
    for function in model.functions.values():
        for node in function.all_nodes():
            node.doc_string = None
    for value in model.graph.initializers.values():
        value.metadata_props.clear()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress chatter and other libraries' warnings off the user's screen.

    So too the stack that PyTorch logs of whatever ends its tracing, such as Ctrl-C, which is raised as well.
    """
    error, critical = logging.ERROR, logging.CRITICAL
    least = {"torch.onnx": error, "onnxscript": error, "torch.__trace": error, "torch._subclasses": critical}
    loggers = [logging.getLogger(name) for name in least]
    levels = [logger.level for logger in loggers]
    for logger, level in zip(loggers, least.values(), strict=True):
        logger.setLevel(level)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
