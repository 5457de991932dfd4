"""The references that differ in who takes the stop decisions."""

from __future__ import annotations

from pathlib import Path

import pytest

from asag_bench.runners.references import open_reference
from asag_bench.runners.runner import DetectorRunner
from asag_deploy.backends import cutting, open_network
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.detector_options import DetectorOptions
from asag_deploy.errors import ConfigError
from asag_deploy.kernels.cpu import CPU_LIBRARY_VARIABLE
from support.simulated_gpu.fake_gpu import install_gpu, write_engines
from support.simulated_gpu.fake_kernels import install_kernels
from support.tiny_bundle import make_bundle, picture

IMAGES = [picture(0), picture(5, 0), picture(5, 2)]
EXITS = ("P5", "P4", "P3")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    made = make_bundle(tmp_path_factory.mktemp("references") / "bundle")
    write_engines(made)
    return made


def reference(name: str, bundle: Bundle, backend: str) -> DetectorRunner:
    network = open_network(backend, bundle)
    made = open_reference(name, bundle, network, DetectorOptions(backend=backend), None)
    assert isinstance(made, DetectorRunner)
    return made


def test_both_loops_stop_at_the_same_levels(
    monkeypatch: pytest.MonkeyPatch, host_library_path: Path, bundle: Bundle
) -> None:
    install_kernels(monkeypatch, install_gpu(monkeypatch), host_library_path)
    for name, stages in (("host-loop", True), ("device-loop", False)):
        runner = reference(name, bundle, "tensorrt-rtx")
        run = runner(IMAGES, None)
        assert (runner.name, run.exits) == (name, EXITS)
        assert ("probe_p3" in run.phases_ms) == stages  # the GPU runs them by itself
        assert [f.trace.exit_level for f in runner.detector()(IMAGES, channel_order="rgb")] == list(EXITS)


def test_graphs_that_run_whole(
    bundle: Bundle, host_library_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CPU_LIBRARY_VARIABLE, str(host_library_path))
    asked: list[object] = []
    monkeypatch.setattr(cutting, "cut", asked.append)
    assert reference("whole-graphs", bundle, "onnxruntime")(IMAGES, None).exits == EXITS
    opened = len(asked)
    open_network("onnxruntime", bundle)
    assert (opened, len(asked)) == (1, 2)  # `reference` opens another network before, which may be cut


def test_graphs_that_run_whole_anyway_are_no_reference(bundle: Bundle) -> None:
    with pytest.raises(ConfigError, match=r"graphs run whole here anyway.*ASAG_CPU_KERNELS_LIBRARY is empty"):
        reference("whole-graphs", bundle, "onnxruntime")


def test_a_backend_on_the_cpu_has_one_loop(bundle: Bundle) -> None:
    with pytest.raises(ConfigError, match="'host-loop' would be the first runner once more"):
        reference("host-loop", bundle, "onnxruntime")
    with pytest.raises(ConfigError, match="loop 'device' needs a backend that runs on a GPU"):
        reference("device-loop", bundle, "onnxruntime")
