"""`Detector.forward` over exported bundles computes what the public implementation computes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from asag_deploy import Detector
from asag_deploy.bundle.bundle import Bundle, write_bundle
from asag_deploy.bundle.manifest import Level, Manifest, Preprocessing
from asag_export.stage_export import DEFAULT_OPSET, export_stage, prepare_for_export
from asag_training.network.config import default_categories
from asag_training.network.model import build
from asag_training.network.stage_plan import build_stages, postprocessing_plan, probing_plan
from reference_cases import BOXES, LOGITS, NAMES, ReferenceCase, load_case

pytestmark = pytest.mark.slow

# Cases that share their weights share a bundle; the manual stop is chosen when it is loaded.
WEIGHTS = {
    name: (case.config.variant, case.seed, case.score_bias) for name in NAMES for case in [load_case(name)]
}
GROUPS = sorted({key: name for name, key in reversed(WEIGHTS.items())}.values())


def export_ungated(case: ReferenceCase, path: Path) -> Bundle:
    """The bundle alone: the comparison that follows is stricter than the exporter's own."""
    probing = probing_plan(case.config)
    stages = build_stages(prepare_for_export(build(case.config, case.state()), "fp32"), probing)
    with write_bundle(path) as writer:
        for stage in stages:
            proto, inputs, outputs = export_stage(
                stage, case.config, probing, precision="fp32", opset=DEFAULT_OPSET
            )
            writer.add_graph(stage.name, proto.SerializeToString(), inputs=inputs, outputs=outputs)
        writer.finish(
            Manifest(
                producer="test",
                variant=case.config.variant,
                head="main",
                precision="fp32",
                opset=DEFAULT_OPSET,
                trained=False,
                categories=default_categories(case.config),
                preprocessing=Preprocessing(),
                probing=probing,
                postprocessing=postprocessing_plan(case.config),
                graphs=(),
            )
        )
    return Bundle.open(path)


@pytest.fixture(scope="module", params=GROUPS)
def bundle(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Bundle]]:
    path = tmp_path_factory.mktemp("reference") / request.param
    yield request.param, export_ungated(load_case(request.param), path)
    shutil.rmtree(path)  # some 200 MB each


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_forward(bundle: tuple[str, Bundle], backend: str) -> None:
    group, opened = bundle
    names = [name for name in NAMES if WEIGHTS[name] == WEIGHTS[group]]
    assert names
    for name in names:
        case = load_case(name)
        level: Level | None = case.max_level  # type: ignore[assignment]
        with Detector.load(opened, backend=backend, max_level=level) as detector:
            output = detector.forward(case.images(), case.sizes)
        side = case.sizes[:, None, [1, 0, 1, 0]]
        np.testing.assert_array_equal(output.anchor_count, case.arrays["anchors_valid"].sum(axis=1))
        np.testing.assert_allclose(output.anchors / side, case.arrays["anchors"] / side, atol=BOXES)
        np.testing.assert_allclose(output.logits, case.arrays["main_logits"], atol=LOGITS)
        np.testing.assert_allclose(output.boxes, case.arrays["main_boxes"], atol=BOXES)
        for image, trace in enumerate(output.trace):
            patches = {level.level: level.patches for level in trace.levels[1:]}
            expected = {
                level: int((case.arrays[f"level{i}_image"] == image).sum())
                for level, i in (("P4", 2), ("P3", 3))
                if f"level{i}_image" in case.arrays
            }
            assert patches == expected
