"""`Detector.forward` over exported bundles computes what the public implementation computes."""

from __future__ import annotations

import hashlib
import itertools
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from asag_deploy import Detector
from asag_deploy.bundle.bundle import Bundle, write_bundle
from asag_deploy.bundle.manifest import Level, Manifest, Preprocessing
from asag_deploy.engines.adapter import open_library
from asag_export.choices import DEFAULT_OPSET
from asag_export.stage_export import ExportedStage, export_stage, prepare_for_export
from asag_training.network.config import default_categories
from asag_training.network.model import build
from asag_training.network.stage_plan import build_stages, postprocessing_plan, probing_plan
from asag_training.network.stages import StageModule
from reference_cases import BOXES, LOGITS, NAMES, ReferenceCase, load_case, load_more_case
from support.rtx_engines import HAS_RTX, assert_can_be_captured, compile_stage
from support.small_network import what_matters

pytestmark = pytest.mark.slow

# Cases that share their weights share a bundle; the manual stop is chosen when it is loaded.
MORE = ("batch_of_odd_sizes", "r101_300", "s_crowdhuman")
CASES = {name: load_case(name) for name in NAMES} | {name: load_more_case(name) for name in MORE}
SIZES = sorted({case.config.variant.rpartition("-")[2] for case in CASES.values()})
"""Such as `100`, of which both kinds of decoder, and both backbones, have the other stages in common."""
BACKENDS = ("onnxruntime", "openvino")


def stages_of(case: ReferenceCase) -> list[StageModule]:
    model = prepare_for_export(build(case.config, case.state()), "fp32")
    return build_stages(model, probing_plan(case.config))


def swap_weights(model: onnx.ModelProto, before: StageModule, after: StageModule) -> None:
    """Put the weights of one network where those of another are in a graph that was exported of that one.

    Weights that the exporter has folded into another form are known by their values.
    """
    old, new = ({name: p.detach().numpy() for name, p in m.named_parameters()} for m in (before, after))
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    sizes = {value.size for name, value in values.items() if name not in old}
    folded = {
        digest(form): (name, i)
        for name in old
        for i, form in enumerate(forms(old[name]))
        if form.size in sizes
    }
    for tensor in model.graph.initializer:
        value = values[tensor.name]
        name, i = (tensor.name, 0) if tensor.name in old else folded.get(digest(value), ("", 0))
        if name:
            swapped = next(itertools.islice(forms(new[name]), i, None)).reshape(value.shape)
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(swapped), tensor.name))
        else:
            weightless = value.dtype != np.float32 or value.size <= 256 or np.ptp(value) == 0
            assert weightless, tensor.name


def forms(weight: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """A weight as it is, in every other order of its axes, likewise each third of it, and its rows."""
    yield weight
    if weight.ndim < 3 or weight.size < 2**18:
        for part in (weight, *(np.split(weight, 3) if len(weight) % 3 == 0 else ())):
            yield from (part.transpose(axes) for axes in itertools.permutations(range(part.ndim)))
    if weight.ndim == 2:
        yield from weight


def digest(array: NDArray[Any]) -> bytes:
    return hashlib.sha256(array.tobytes()).digest()


def manifest_of(case: ReferenceCase) -> Manifest:
    return Manifest(
        producer="test",
        variant=case.config.variant,
        head="main",
        precision="fp32",
        opset=DEFAULT_OPSET,
        trained=False,
        categories=default_categories(case.config),
        preprocessing=Preprocessing(),
        probing=probing_plan(case.config),
        postprocessing=postprocessing_plan(case.config),
        graphs=(),
    )


def write(case: ReferenceCase, graphs: Mapping[str, ExportedStage], path: Path) -> Bundle:
    """The bundle alone: the comparison that follows is stricter than the exporter's own."""
    with write_bundle(path) as writer:
        for name, (proto, inputs, outputs) in graphs.items():
            writer.add_graph(name, proto.SerializeToString(), inputs=inputs, outputs=outputs)
        writer.finish(manifest_of(case))
    return Bundle.open(path)


@pytest.mark.parametrize("size", SIZES)
def test_forward_of_bundles(size: str, tmp_path: Path) -> None:
    """Every stage is exported once; weights of other cases take the place of those it was exported with.

    Those that are exported compile to engines, too, but for the stages of `MORE`.
    """
    library = open_library("tensorrt-rtx") if HAS_RTX else None
    groups: dict[Any, list[str]] = {}
    for name, case in CASES.items():
        if case.config.variant.endswith(f"-{size}"):
            groups.setdefault((case.config.variant, case.seed, case.score_bias), []).append(name)
    made: dict[Any, tuple[StageModule, ExportedStage]] = {}
    for names in groups.values():
        case = CASES[names[0]]
        graphs = {}
        for stage in stages_of(case):
            kind = what_matters(stage.name, case.config)
            if kind in made:
                before, graph = made[kind]
                swap_weights(graph[0], before, stage)
            else:
                probing = probing_plan(case.config)
                graph = export_stage(stage, case.config, probing, precision="fp32", opset=DEFAULT_OPSET)
                if library is not None and names[0] not in MORE:
                    engine = compile_stage(library, stage.name, graph, manifest_of(case))
                    assert_can_be_captured(stage.name, engine)
            made[kind] = stage, graph
            graphs[stage.name] = graph
        bundle = write(case, graphs, tmp_path / names[0])
        for name in names:
            for backend in BACKENDS:
                assert_forward(CASES[name], bundle, backend, f"{name}, {backend}")
        shutil.rmtree(bundle.path)  # some 200 MB each


def assert_forward(case: ReferenceCase, bundle: Bundle, backend: str, message: str) -> None:
    level: Level | None = case.max_level  # type: ignore[assignment]
    with Detector.load(bundle, backend=backend, max_level=level) as detector:
        output = detector.forward(case.images(), case.sizes)
    side, expected = case.sizes[:, None, [1, 0, 1, 0]], case.arrays
    np.testing.assert_array_equal(output.anchor_count, expected["anchors_valid"].sum(axis=1), message)
    np.testing.assert_allclose(output.anchors / side, expected["anchors"] / side, atol=BOXES, err_msg=message)
    real = expected["anchors_valid"]  # what the others are is nobody's business
    for found, name, atol in ((output.logits, "main_logits", LOGITS), (output.boxes, "main_boxes", BOXES)):
        np.testing.assert_allclose(found[real], expected[name][real], atol=atol, err_msg=message)
    if "patches" in expected:  # of the whole batch
        levels = [level for trace in output.trace for level in trace.levels]
        of_batch = [sum(level.patches for level in levels if level.level == name) for name in ("P4", "P3")]
        assert of_batch == expected["patches"].tolist(), message
        return
    for image, trace in enumerate(output.trace):
        patches = {level.level: level.patches for level in trace.levels[1:]}
        asked = {
            level: int((expected[f"level{i}_image"] == image).sum())
            for level, i in (("P4", 2), ("P3", 3))
            if f"level{i}_image" in expected
        }
        assert patches == asked, message
