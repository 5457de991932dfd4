"""The script for a GPU machine: what it says where there is none, and its steps on an imaginary GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import pytest

from asag_deploy.backends import BACKENDS
from asag_deploy.errors import BackendError, ConfigError, ParityError
from asag_deploy.kernels import LIBRARY_VARIABLE
from fake_cuda import FakeCuda
from fake_gpu import install_cuda, install_tensorrt, write_engines
from fake_kernels import FakeKernels, install_kernels
from tiny_bundle import make_bundle

SCRIPT = Path(__file__).parent.parent / "scripts" / "gpu_check.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """With TensorRT-RTX alone."""
    cuda = FakeCuda()
    install_cuda(monkeypatch, cuda)
    install_tensorrt(monkeypatch, cuda)
    return cuda


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    if BACKENDS["tensorrt-rtx"].available() is None:
        pytest.skip("there is a GPU on this machine")
    command = [sys.executable, str(SCRIPT), "--output-dir", str(tmp_path / "report")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.startswith("gpu_check: error: there is nothing to check without a GPU: ")
    assert len(run.stderr.splitlines()) == 1
    assert run.stdout == ""
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize("shape", ["800", "800x", "0x32", "800x1090", "32x32x32", "axb"])
def test_shapes_that_are_none(script: ModuleType, shape: str) -> None:
    with pytest.raises(ConfigError, match=rf"the shape is '{shape}'; expected HxW in multiples of 32"):
        script.parse_shape(shape)


def test_what_goes_wrong_in_a_step_is_its_result(script: ModuleType) -> None:
    def skip() -> dict[str, Any]:
        raise script.Skip("no compiler")

    def fail() -> dict[str, Any]:
        raise BackendError("the GPU is on fire")

    def crash() -> dict[str, Any]:
        return {"nothing": 1 / 0}

    found = [script.do("step", action) for action in (skip, fail, crash, lambda: {"detail": "fine", "n": 1})]
    assert [(step.state, step.detail) for step in found] == [
        ("skipped", "no compiler"),
        ("failed", "the GPU is on fire"),
        ("failed", "ZeroDivisionError: division by zero"),
        ("passed", "fine"),
    ]
    assert found[-1].data == {"n": 1}


def test_a_program_that_fails_is_quoted(script: ModuleType) -> None:
    with pytest.raises(BackendError, match="ended with 3: last words"):
        script.shell([sys.executable, "-c", "print('last words'); raise SystemExit(3)"])


def test_the_loop_is_timed_to_every_level(script: ModuleType, gpu: FakeCuda, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    write_engines(bundle)
    found = script.time_backend("tensorrt-rtx", bundle.path, (64, 96), 3)
    assert list(found["levels"]) == ["P5", "P4", "P3"]
    for row in found["levels"].values():
        assert sum(row["exits"].values()) == 3
        assert row["total_ms"]["p50"] >= row["backbone_ms"]["p50"] >= 0
        assert set(row) >= {"rest_ms", "overhead_ms", "rest_share_of_backbone"}


def test_a_backend_that_is_missing_is_skipped(script: ModuleType, tmp_path: Path) -> None:
    step = script.do("time", lambda: script.time_backend("tensorrt", tmp_path, (64, 64), 1))
    if BACKENDS["tensorrt"].available() is None:
        pytest.skip("TensorRT is installed here")
    assert step.state == "skipped"
    assert "tensorrt is not installed" in step.detail


def test_a_whole_run_leaves_a_report(
    script: ModuleType, gpu: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the steps that start programs left out."""
    bundle = make_bundle(tmp_path / "bundle")
    write_engines(bundle)

    def no_program(command: object, environment: object = None) -> str:
        raise script.Skip("not in this test")

    monkeypatch.setattr(script, "shell", no_program)
    monkeypatch.setattr(script, "WARM_UPS", 1)
    output = tmp_path / "report"
    options = [
        "--output-dir",
        str(output),
        "--bundle",
        str(bundle.path),
        "--repeats",
        "2",
        "--shape",
        "64x64",
    ]
    assert script.main(options) == 0
    report = json.loads((output / "gpu_check.json").read_text())
    assert report["machine"]["gpu"] == "Imaginary GPU"
    states = {step["name"]: step["state"] for step in report["steps"]}
    assert states["time tensorrt-rtx"] == "passed"
    assert states["batches with tensorrt-rtx"] == "passed"
    assert states["pictures with tensorrt-rtx"] == "skipped"  # there are no kernels
    assert states["tests on the GPU"] == "skipped"
    assert "failed" not in states.values()
    text = (output / "gpu_check.md").read_text()
    assert text.startswith("# GPU check\n\nImaginary GPU (sm86)")
    assert "## time tensorrt-rtx: fp32, [64, 64], batch 1" in text


def test_pictures_are_compared_to_the_bit(
    script: ModuleType,
    gpu: FakeCuda,
    host_library_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    write_engines(bundle)
    folder, build = tmp_path / "photographs", tmp_path / "build"
    folder.mkdir()
    build.mkdir()
    (build / "libasag_kernels.so").touch()
    for i, size in enumerate([(90, 130), (40, 30)]):
        picture = np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8)
        assert cv2.imwrite(str(folder / f"{i}.png"), picture)
    install_kernels(monkeypatch, gpu, host_library_path)
    monkeypatch.delenv(LIBRARY_VARIABLE, raising=False)
    found = script.check_pictures(bundle.path, "tensorrt-rtx", build, folder)
    assert found["pictures"] == 2
    assert found["detail"].startswith("2 are equal; ")
    assert LIBRARY_VARIABLE not in os.environ

    run = FakeKernels.run

    def one_off(self: FakeKernels, operator: str, arguments: Any, stream: int = 0) -> None:
        if operator == "preprocess":
            arguments.mean[1] += 1e-5
        run(self, operator, arguments, stream)

    monkeypatch.setattr(FakeKernels, "run", one_off)
    with pytest.raises(ParityError, match=r"entries that differ from the CPU's: {'inputs': [1-9]"):
        script.check_pictures(bundle.path, "tensorrt-rtx", build, folder)


def test_the_loop_on_the_device_is_compared_with_the_hosts(
    script: ModuleType,
    gpu: FakeCuda,
    host_library_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_engines(make_bundle(tmp_path / "bundle"))
    install_kernels(monkeypatch, gpu, host_library_path)
    monkeypatch.setenv(LIBRARY_VARIABLE, str(host_library_path))
    arguments = (tmp_path / "bundle", "tensorrt-rtx", tmp_path, (64, 64), 2)
    found = script.check_loops(*arguments)
    assert list(found["total_ms"]) == ["host", "device", "always probing"]
    assert len(found["differences"]) == 8  # fast, and exact to three levels; alone and in a batch
    assert not any(found["differences"].values())
    original = FakeKernels._work

    def stop_at_once(self: FakeKernels, operator: str, arguments: Any) -> Any:
        if operator == "decide":
            arguments.min_selected = 1000
        return original(self, operator, arguments)

    monkeypatch.setattr(FakeKernels, "_work", stop_at_once)
    monkeypatch.setattr(
        script, "picture", lambda shape: (np.full((1, 3, *shape), 5.0, np.float32), np.array([shape]))
    )
    with pytest.raises(BackendError, match="has probed other levels than the host would have"):
        script.check_loops(*arguments)


def test_pictures_need_the_kernels(
    script: ModuleType, gpu: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    write_engines(bundle)
    monkeypatch.delenv(LIBRARY_VARIABLE, raising=False)
    with pytest.raises(script.Skip, match="since the kernels were not compiled"):
        script.check_pictures(bundle.path, "tensorrt-rtx", tmp_path, None)


def test_a_failed_step_is_a_failed_run(
    script: ModuleType, gpu: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_program(command: object, environment: object = None) -> str:
        raise script.Skip("not in this test")

    monkeypatch.setattr(script, "shell", no_program)
    nothing = ["--bundle", str(tmp_path / "nothing"), "--shape", "64x64"]
    assert script.main(["--output-dir", str(tmp_path / "report"), *nothing]) == 1
    report = json.loads((tmp_path / "report" / "gpu_check.json").read_text())
    (step,) = (step for step in report["steps"] if step["name"] == "time tensorrt-rtx")
    assert step["state"] == "failed"
    assert "there is no bundle" in step["detail"]
