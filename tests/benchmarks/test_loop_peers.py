"""The peers that differ in who takes the stop decisions."""

from __future__ import annotations

from pathlib import Path

import pytest

from asag_bench.runners.peers import open_peer
from asag_bench.runners.subjects import DetectorSubject
from asag_deploy.backends import open_network
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.errors import ConfigError
from support.simulated_gpu.fake_gpu import install_gpu, write_engines
from support.simulated_gpu.fake_kernels import install_kernels
from support.tiny_bundle import make_bundle, picture

IMAGES = [picture(0), picture(5, 0), picture(5, 2)]
EXITS = ("P5", "P4", "P3")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    made = make_bundle(tmp_path_factory.mktemp("peers") / "bundle")
    write_engines(made)
    return made


def peer(name: str, bundle: Bundle, backend: str) -> DetectorSubject:
    network = open_network(backend, bundle)
    options = {"backend": backend, "mode": None, "threads": None, "checkpoint": None}
    made = open_peer(name, bundle, network=network, **options)  # type: ignore[arg-type]
    assert isinstance(made, DetectorSubject)
    return made


def test_both_loops_stop_at_the_same_levels(
    monkeypatch: pytest.MonkeyPatch, host_library_path: Path, bundle: Bundle
) -> None:
    install_kernels(monkeypatch, install_gpu(monkeypatch), host_library_path)
    for name, stages in (("host-loop", True), ("device-loop", False)):
        subject = peer(name, bundle, "tensorrt-rtx")
        run = subject(IMAGES, None)
        assert (subject.name, run.exits) == (name, EXITS)
        assert ("probe_p3" in run.phases_ms) == stages  # the GPU runs them by itself
        assert [f.trace.exit_level for f in subject.detector()(IMAGES, channel_order="rgb")] == list(EXITS)


def test_a_backend_on_the_cpu_has_one_loop(bundle: Bundle) -> None:
    assert peer("host-loop", bundle, "onnxruntime")(IMAGES, None).exits == EXITS
    with pytest.raises(ConfigError, match="loop 'device' needs a backend that runs on a GPU"):
        peer("device-loop", bundle, "onnxruntime")
