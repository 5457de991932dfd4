"""What programs say before they load anything, and in which form."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest

from asag_deploy.backends import BACKENDS
from asag_deploy.command_line import say_warnings
from asag_deploy.detect.cli import main as detect
from asag_deploy.detector import Detector
from asag_deploy.engines.build import BuildReport, summary
from asag_deploy.errors import BackendError, Problem
from asag_deploy.playground.cli import main as play
from asag_deploy.serving.cli import main as serve
from support.tiny_bundle import make_bundle


@pytest.mark.parametrize("package", ["starlette", "uvicorn", "prometheus_client", "python_multipart"])
def test_packages_of_the_server_are_missed_before_the_bundle(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert serve(["nowhere/", "--port", "0"]) == 2
    said = f"asag-serve: error: serving needs the package {package}, which is not installed: "
    assert capsys.readouterr().err == f"{said}install it with `pip install 'asag-deploy[serve]'`\n"


def test_gradio_is_missed_before_the_bundle(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert play(["nowhere/", "--port", "0"]) == 2
    said = "asag-playground: error: the playground needs the package gradio, which is not installed: "
    assert capsys.readouterr().err == f"{said}install it with `pip install 'asag-deploy[playground]'`\n"


def test_a_backend_is_missed_before_the_bundle(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = Problem("OpenVINO is not installed", "install it")
    monkeypatch.setattr(type(BACKENDS["openvino"]), "problem", lambda backend: missing)
    with pytest.raises(
        BackendError, match="'openvino' cannot run on this machine: OpenVINO is not installed"
    ):
        Detector.load("nowhere/", backend="openvino")


def test_a_bundle_is_called_as_the_user_calls_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    monkeypatch.chdir(tmp_path)
    assert detect(["--doctor", "bundle/"]) == 0
    assert "bundle 'bundle' is sound: tiny" in capsys.readouterr().out
    engines = (bundle.path / "engines" / "tensorrt-rtx" / "sm86" / "decoder.engine",)
    report = BuildReport(library="TensorRT-RTX 1.7", built=engines, current=(), plugins=())
    assert summary(report, bundle, Path("bundle"))[-1] == "bundle/engines/tensorrt-rtx/sm86"
    assert summary(report, bundle, Path("hf:/somebody/bundle"))[-1] == str(engines[0].parent)


def test_a_warning_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        say_warnings("asag-detect")
        warnings.warn("what was fetched before is taken", RuntimeWarning, stacklevel=1)
        warnings.warn("of another package,\n  in two lines", UserWarning, stacklevel=1)
    first, second = capsys.readouterr().err.splitlines()
    assert first == "asag-detect: warning: what was fetched before is taken"
    assert second == "asag-detect: warning: of another package, in two lines"
