"""Graphs that only comparisons need, made of a bundle's own: the pyramid alone, and everything in one.

They are run by the same backends: wrapped as a bundle, which is not opened but handed straight to the
backend.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx.compose
import onnx.inliner
import onnx.utils
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from asag_bench.runners.patch_nms import patch_nms_model
from asag_deploy.bundle.bundle import Bundle, stage_names
from asag_deploy.bundle.manifest import GraphSpec, ProbeLevel, Probing, TensorSpec
from asag_deploy.errors import ConfigError
from asag_deploy.loop.probing import patch_limit, stage_name
from asag_deploy.loop.stages import features_among
from asag_deploy.loop.stopping import StopRule

PYRAMID, UNSPLIT = "pyramid", "unsplit"
RESULTS = ("det_scores", "det_labels", "det_boxes", "anchors", "anchor_count")
_READS = re.compile(
    r"neck\.inner_blocks\.(?P<lateral>\d+)\.|neck\.input_proj\.(?P<projected>\d+)\.|body\.layer2\.0\.conv1\."
)
"""The weights of what reads the backbone's maps: a feature pyramid, the neck of ASAG-D (which reads the last
twice), and of C2 the ResNet itself."""


def feature_pyramid(bundle: Bundle) -> ModelProto:
    """Cut out the part of the backbone graph that computes P2..P5, without the anchors of the first level.

    It takes `image`, and `image_size` where the maps depend on it, as an encoder's do.
    """
    whole = onnx.load(bundle.graph_path("backbone"))
    features = features_among(tensor.name for tensor in bundle.manifest.graph("backbone").outputs)
    return onnx.utils.Extractor(whole).extract_model(_inputs_of(whole, features), list(features))


def _inputs_of(model: ModelProto, outputs: Iterable[str]) -> list[str]:
    """Return the inputs of a model that these of its outputs depend on."""
    makers = {output: node for node in model.graph.node for output in node.output}
    needed, open_ends = set[str](), [*outputs]
    while open_ends:
        name = open_ends.pop()
        if name not in needed:
            needed.add(name)
            open_ends += makers[name].input if name in makers else ()
    return [value.name for value in model.graph.input if value.name in needed]


def maps_graph(bundle: Bundle, names: Sequence[str]) -> ModelProto:
    """Cut out the part of the backbone graph that computes maps of the backbone (`c3`, ...), or the pyramid.

    Raises ConfigError if the graph does not say where the backbone's maps are.
    """
    if not names[0].startswith("c"):
        return feature_pyramid(bundle)
    whole = onnx.load(bundle.graph_path("backbone"))
    found = _backbone_maps(whole)
    if not found.keys() >= set(names):
        raise ConfigError(
            f"the bundle at '{bundle.shown}' does not say which maps its neck reads; export it again"
        )
    cut = onnx.utils.Extractor(whole).extract_model(["image"], [found[name] for name in names])
    for name, value in zip(names, cut.graph.output, strict=True):
        cut.graph.node.append(helper.make_node("Identity", [value.name], [name]))
        value.name = name
    return cut


def _backbone_maps(whole: ModelProto) -> dict[str, str]:
    """Return what the maps of the backbone, `c2` to `c5`, are called in its graph: as far as weights tell."""
    made_by = {output: node for node in whole.graph.node for output in node.output}
    found, laterals = {}, {}
    for node in whole.graph.node:
        weight = _weight_of(node, made_by) or ""
        read = _READS.search(weight)
        if read is None:
            continue
        if read["lateral"] is not None:
            laterals[int(read["lateral"])] = node.input[0]
        elif read["projected"] is not None:
            found[f"c{min(3 + int(read['projected']), 5)}"] = node.input[0]
        else:
            found["c2"] = node.input[0]
    coarsest = len(laterals) - 1
    return found | {f"c{5 - coarsest + i}": name for i, name in laterals.items()}


def _weight_of(node: NodeProto, made_by: Mapping[str, NodeProto]) -> str | None:
    """Return the name of a convolution's weight, or of what an INT8 weight is read from."""
    if node.op_type != "Conv":
        return None
    weight: str = node.input[1]
    return str(made_by[weight].input[0]) if weight in made_by else weight


def pyramid_bundle(bundle: Bundle, folder: Path) -> Bundle:
    """Write `feature_pyramid` to a folder, as a bundle."""
    return several_graphs({PYRAMID: feature_pyramid(bundle)}, bundle, folder)


def unsplit_bundle(bundle: Bundle, folder: Path) -> Bundle:
    """Join the whole network into one graph, and write it to a folder as a bundle.

    It cannot stop early: every level runs, on every image.  It has what the loop decides inside the graph: as
    many patches as the fullest image asks for (at least one), and always room for the most anchors that the
    decoder takes.
    """
    probing = bundle.manifest.probing
    parts = _parts(bundle)
    nodes: list[NodeProto] = []
    weights: list[TensorProto] = []
    for name, part in parts.items():
        nodes += [*_wires(name, part, probing, weights), *part.graph.node]
        weights += part.graph.initializer
    last = parts["decoder"].graph
    outputs = [value for value in last.output if value.name.removeprefix("decoder/") in RESULTS]
    model = helper.make_model(
        helper.make_graph(nodes, UNSPLIT, list(parts["normalize"].graph.input), outputs, weights),
        opset_imports=parts["backbone"].opset_import,
        ir_version=parts["backbone"].ir_version,
    )
    _rename(model, {value.name: value.name.rpartition("/")[2] for value in (*model.graph.input, *outputs)})
    onnx.checker.check_model(model)
    return several_graphs({UNSPLIT: model}, bundle, folder)


def _parts(bundle: Bundle) -> dict[str, ModelProto]:
    """Return the stages and the steps between them, in order, without functions.

    All names in a part begin with the part's own.
    """
    manifest = bundle.manifest
    steps = {stage_name(level): level for level in manifest.probing.levels}
    parts = {}
    for name in stage_names([level.level for level in manifest.probing.levels]):
        if name in steps:
            step = patch_nms_model(manifest.probing, steps[name], manifest.opset)
            parts[_step(steps[name])] = onnx.compose.add_prefix(step, f"{_step(steps[name])}/")
        whole = onnx.inliner.inline_local_functions(onnx.load(bundle.graph_path(name)))
        parts[name] = onnx.compose.add_prefix(whole, f"{name}/")
    return parts


def _step(level: ProbeLevel) -> str:
    return f"select_{level.level.lower()}"


def _wires(name: str, part: ModelProto, probing: Probing, weights: list[TensorProto]) -> Iterable[NodeProto]:
    """Yield the nodes that give the part `name` its inputs; their constants are added to `weights`."""

    def constant(label: str, value: object, dtype: type = np.int64) -> str:
        weights.append(numpy_helper.from_array(np.array(value, dtype=dtype), f"{name}/{label}"))
        return f"{name}/{label}"

    def same(source: str, target: str) -> NodeProto:
        return helper.make_node("Identity", [source], [f"{name}/{target}"])

    if name == "normalize":
        return
    yield same("normalize/image_size", "image_size")
    if name == "backbone":
        yield same("normalize/image", "image")
        return
    levels = [level.level.lower() for level in probing.levels]
    if name == "decoder":
        features = features_among(value.name.removeprefix("decoder/") for value in part.graph.input)
        yield from (same(f"backbone/{feature}", feature) for feature in features)
        yield from (same(f"{_stage(level)}/anchors", f"anchors_{level}") for level in ("p5", *levels))
        yield from (same(f"{_stage(level)}/selected", f"selected_{level}") for level in ("p5", *levels)[:-1])
        constant("query_slots", np.arange(probing.anchor_cap))
        if levels:
            batch = f"{name}/wire_batch"
            yield helper.make_node("Shape", ["normalize/image_size"], [batch], start=0, end=1)
            all_levels = [batch, constant("wire_levels", [len(levels)])]
            yield helper.make_node("Concat", all_levels, [f"{name}/wire_shape"], axis=0)
            everywhere = [constant("wire_yes", True, np.bool_), f"{name}/wire_shape"]
            yield helper.make_node("Expand", everywhere, [f"{name}/probed"])
        return
    kind, _, level = name.partition("_")
    number = levels.index(level)
    if kind == "select":
        before = _stage(("p5", *levels)[number])
        yield from (same(f"{before}/{output}", output) for output in ("anchors", "selected"))
        return
    step = _step(probing.levels[number])
    limit = patch_limit(StopRule(max_patches=probing.max_patches), probing.levels[number])
    yield same(f"backbone/{level}", "feature")
    yield helper.make_node("Shape", [f"backbone/{level}"], [f"{name}/feature_size"], start=1, end=3)
    yield same(f"{step}/origins", "patches")
    most = [f"{step}/patches", constant("wire_limit", limit)]
    yield helper.make_node("Min", most, [f"{name}/patch_count"])
    yield helper.make_node("ReduceMax", [f"{name}/patch_count"], [f"{name}/wire_fullest"], keepdims=0)
    one = constant("wire_one", 1)
    yield helper.make_node("Max", [f"{name}/wire_fullest", one], [f"{name}/wire_slots"])
    span = [constant("wire_zero", 0), f"{name}/wire_slots", one]
    yield helper.make_node("Range", span, [f"{name}/slots"])


def _stage(level: str) -> str:
    return "backbone" if level == "p5" else f"probe_{level}"


def _rename(model: ModelProto, names: Mapping[str, str]) -> None:
    """Give values other names throughout the top level of a graph."""
    graph = model.graph
    for value in (*graph.input, *graph.output):
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]


def several_graphs(models: Mapping[str, ModelProto | None], bundle: Bundle, folder: Path) -> Bundle:
    """Write graphs to `folder`, as a bundle with all else that `bundle` says.

    models: graphs by name; None is the bundle's own graph of that name.
    """
    graphs = []
    for name, model in models.items():
        said = bundle.manifest.graph(name) if model is None else model.graph
        content = bundle.graph_path(name).read_bytes() if model is None else model.SerializeToString()
        (folder / f"{name}.onnx").write_bytes(content)
        graphs.append(
            GraphSpec(
                name=name,
                file=f"{name}.onnx",
                sha256=hashlib.sha256(content).hexdigest(),
                inputs=said.inputs if isinstance(said, GraphSpec) else _specs(said.input),
                outputs=said.outputs if isinstance(said, GraphSpec) else _specs(said.output),
            )
        )
    return Bundle(path=folder, manifest=dataclasses.replace(bundle.manifest, graphs=tuple(graphs)))


def _specs(values: Iterable[ValueInfoProto]) -> tuple[TensorSpec, ...]:
    """Describe the inputs or outputs of a graph as a manifest does."""
    return tuple(
        TensorSpec(
            name=value.name,
            dtype=helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name,
            shape=tuple(
                size.dim_value if size.HasField("dim_value") else size.dim_param
                for size in value.type.tensor_type.shape.dim
            ),
        )
        for value in values
    )
