"""The split of a call that prepares its images on the GPU."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from asag_bench.phases import PHASES
from asag_bench.subjects import DetectorSubject
from asag_deploy.backends import open_network
from asag_deploy.detector import stop_rule
from fake_gpu import install_gpu, write_engines
from fake_kernels import install_kernels
from tiny_bundle import make_bundle, picture


def test_a_network_that_is_timed_uses_the_kernels_too(
    host_library_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or what is measured would not be what is used."""
    kernels = install_kernels(monkeypatch, install_gpu(monkeypatch), host_library_path)
    bundle = make_bundle(tmp_path / "bundle")
    write_engines(bundle)
    network = open_network("tensorrt-rtx", bundle)
    rule = partial(stop_rule, bundle.manifest, None)
    subject = DetectorSubject("tiny", bundle.manifest, network, rule, "host")
    run = subject([picture(5, 2)], None)
    assert kernels.calls == ["preprocess", "postprocess"]
    assert run.exits == ("P3",)
    phases = run.phases_ms
    assert [name for name in PHASES if name in phases] == list(phases)
    assert {"preprocess", "normalize", "backbone", "probe_p4", "probe_p3", "decoder"} <= set(phases)
    assert phases["normalize"] > 0
    assert sum(phases.values()) <= run.total_ms * 1.01  # nothing counts twice
