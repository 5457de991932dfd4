"""The split of a call that prepares its images on the GPU."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from asag_bench.measuring.plan import Plan, bundles_on_backends
from asag_bench.measuring.run import _load_detectors
from asag_bench.result import Options
from asag_bench.runners.runner import PHASES, DetectorRunner
from asag_deploy.backends import open_network
from asag_deploy.detector import Detector
from asag_deploy.loop.stopping import stop_rule
from support.simulated_gpu.fake_gpu import install_gpu, write_engines
from support.simulated_gpu.fake_kernels import install_kernels
from support.tiny_bundle import make_bundle, picture


def test_a_network_that_is_timed_uses_the_kernels_too(
    host_library_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or what is measured would not be what is used."""
    kernels = install_kernels(monkeypatch, install_gpu(monkeypatch), host_library_path)
    bundle = make_bundle(tmp_path / "bundle")
    write_engines(bundle)
    network = open_network("tensorrt-rtx", bundle)
    rule = partial(stop_rule, bundle.manifest, None)
    runner = DetectorRunner("tiny", bundle.manifest, network, rule, "host")
    run = runner([picture(5, 2)], None)
    assert kernels.calls == ["preprocess", "patch_nms", "patch_nms", "postprocess"]
    assert run.exits == ("P3",)
    phases = run.phases_ms
    assert [name for name in PHASES if name in phases] == list(phases)
    assert {"preprocess", "normalize", "backbone", "probe_p4", "probe_p3", "decoder"} <= set(phases)
    assert phases["normalize"] > 0
    assert sum(phases.values()) <= run.total_ms * 1.01  # nothing counts twice


def test_what_is_timed_is_what_a_detector_runs(
    host_library_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop on the GPU too, and it is what the accuracy is measured with."""
    cuda = install_gpu(monkeypatch)
    kernels = install_kernels(monkeypatch, cuda, host_library_path)
    bundle = make_bundle(tmp_path / "bundle")
    write_engines(bundle)
    plan = Plan(
        command="tests", bundles=(bundle.path,), options=Options(backends=("tensorrt-rtx",)), quiet=True
    )
    (runner,) = _load_detectors(bundles_on_backends(plan, [bundle]), {}).detectors
    image = picture(5, 2)
    with Detector.load(bundle, backend="tensorrt-rtx") as loaded:
        expected = loaded(image, channel_order="rgb")
        found = runner.detector()(image, channel_order="rgb")
        assert found.trace.to_dict() == expected.trace.to_dict()
        np.testing.assert_array_equal(found.xyxy, expected.xyxy)
        np.testing.assert_array_equal(found.confidence, expected.confidence)
        runner([image], None)
        kernels.calls.clear()
        launches = cuda.launches
        run = runner([image], None)
        took = list(kernels.calls), cuda.launches - launches
        kernels.calls.clear()
        launches = cuda.launches
        loaded(image, channel_order="rgb")
        assert took == (kernels.calls, cuda.launches - launches) == (["preprocess", "postprocess"], 1)
    assert run.exits == ("P3",)
    assert "backbone" not in run.phases_ms
    assert run.phases_ms["loop"] > 0
