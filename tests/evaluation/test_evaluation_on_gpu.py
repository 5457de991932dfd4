"""What asag-eval measures on an imaginary GPU is what `Detector.load` runs: its processing and its loop."""

from __future__ import annotations

import numpy as np
import pytest

from asag_deploy.bundle.bundle import Bundle
from asag_deploy.detections import Detections
from asag_deploy.detector import Detector
from asag_deploy.detector_options import DetectorOptions
from asag_evaluation.predictor import bundle_predictor
from support.bundle_edits import give_proposals
from support.simulated_gpu.fake_cuda import FakeCuda
from support.simulated_gpu.fake_gpu import write_engines
from support.simulated_gpu.fake_kernels import FakeKernels
from support.tiny_bundle import make_bundle, picture

PICTURES = [picture(0), picture(18, 6, 1, size=(100, 130)), picture(5, 2, size=(50, 80))]


@pytest.fixture(scope="module", params=[False, True], ids=["no proposals", "proposals"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("evaluation")
    made = make_bundle(folder / "bundle")
    if request.param:
        made = give_proposals(made, folder / "with proposals")
    write_engines(made)
    return made


def run(detector: Detector, cuda: FakeCuda, kernels: FakeKernels) -> tuple[list[Detections], object]:
    """What it finds image by image once it is warm, and what that took: kernels and graph launches."""
    found = [detector(image, channel_order="rgb") for image in PICTURES]
    kernels.calls.clear()
    launches = cuda.launches
    again = [detector(image, channel_order="rgb") for image in PICTURES]
    for one, other in zip(found, again, strict=True):
        np.testing.assert_array_equal(one.xyxy, other.xyxy)
    return again, (list(kernels.calls), cuda.launches - launches)


def test_a_predictor_runs_what_a_detector_runs(cuda: FakeCuda, kernels: FakeKernels, bundle: Bundle) -> None:
    with Detector.load(bundle, backend="tensorrt-rtx") as detector:
        expected, of_detector = run(detector, cuda, kernels)
    predictor = bundle_predictor(bundle, DetectorOptions(backend="tensorrt-rtx"))
    found, of_predictor = run(predictor.detector, cuda, kernels)
    assert of_predictor == of_detector
    assert of_predictor == (["preprocess", "postprocess"] * len(PICTURES), len(PICTURES))
    for one, other in zip(expected, found, strict=True):
        assert one.trace.to_dict() == other.trace.to_dict()
        for name in ("xyxy", "confidence", "class_id", "anchors"):
            np.testing.assert_array_equal(vars(one)[name], vars(other)[name])
        assert "loop" in other.times_ms
        assert "backbone" not in other.times_ms
    assert [one.trace.exit_level for one in found] == ["P5", "P3", "P3"]


def test_proposals_are_those_of_the_cpu(cuda: FakeCuda, kernels: FakeKernels, bundle: Bundle) -> None:
    on_gpu, on_cpu = (
        bundle_predictor(bundle, DetectorOptions(backend=name)) for name in ("tensorrt-rtx", None)
    )
    if on_gpu.proposals is None:
        assert on_cpu.proposals is None
        return
    assert on_cpu.proposals is not None
    for images in ([PICTURES[0]], PICTURES):
        counts = [one.trace.anchor_count for one in on_gpu.detector(images, channel_order="rgb")]
        assert counts == [one.trace.anchor_count for one in on_cpu.detector(images, channel_order="rgb")]
        for one, other in zip(on_gpu.proposals(counts), on_cpu.proposals(counts), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-6)
            assert len(one) > 0
