"""`asag-build`: what it prints, and its one sentence where it cannot."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from asag_deploy.bundle.bundle import Bundle
from asag_deploy.engines.cli import main
from support.recorded_tensorrt import RTX, RecordedModule

SM86 = ("--gpu", "sm86")


@pytest.fixture(autouse=True)
def rtx(install: Callable[[str], RecordedModule], no_gpu: None) -> RecordedModule:
    return install(RTX)


def run(bundle: Bundle, *options: str) -> int:
    return main([str(bundle.path), *options])


def test_what_was_built_is_said(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(bundle, *SM86, "--gpu", "8.9") == 0
    out, err = capsys.readouterr()
    folder = bundle.path / "engines" / "tensorrt-rtx"
    assert out == f"built 6 engines with TensorRT-RTX 1.7.1.116\n{folder / 'sm86'}\n{folder / 'sm89'}\n"
    assert err == ""


def test_the_second_time_there_is_nothing_to_do(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(bundle, *SM86) == 0
    capsys.readouterr()
    assert run(bundle, *SM86) == 0
    assert capsys.readouterr().out.startswith(
        f"nothing to do: all 3 engines of '{bundle.path}' are current\n"
    )
    assert run(bundle, *SM86, "--force") == 0
    assert capsys.readouterr().out.startswith("built 3 engines")


def test_quiet(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(bundle, *SM86, "--quiet") == 0
    assert capsys.readouterr() == ("", "")


def test_options_reach_the_builder(bundle: Bundle, rtx: RecordedModule) -> None:
    options = "--max-batch 8 --usual-batch 2 --tf32 --optimization-level 4 --shared --gpu sm86 --gpu sm120"
    assert run(bundle, *options.split()) == 0
    shape = next(call for call in rtx.called("IOptimizationProfile.set_shape") if call["input"] == "image")
    assert (shape["opt"][0], shape["max"][0]) == (2, 8)
    assert not rtx.called("IBuilderConfig.clear_flag")
    assert rtx.called("IBuilderConfig.builder_optimization_level =")[0] == {"value": 4}
    assert rtx.called("IBuilderConfig.num_compute_capabilities =")[0] == {"value": 2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--gpu", "rtx3090"), "unknown GPU 'rtx3090'; name its compute capability"),
        (
            ("--gpu", "sm90"),
            "TensorRT-RTX 1.7.1.116 cannot build for sm90 (H100, H200); it builds for sm75, sm80,",
        ),
        (("--format", "onnx"), "unknown engine format 'onnx'; choose one of tensorrt-rtx, tensorrt"),
        (("--precision", "fp16"), "are fp32, and an engine computes in the types of its graph"),
        (("--max-batch", "0"), "--max-batch is 0; it must be"),
        (("--max-batch", "many"), "--max-batch is many; it must be"),
        (("--plugins", "p.so"), "TensorRT-RTX has no plugins"),
    ],
)
def test_one_sentence(
    bundle: Bundle, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    assert run(bundle, *options) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("asag-build: error: ")
    assert message in err
    assert err.count("\n") == 1


def test_no_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none")]) == 2
    assert "there is no bundle" in capsys.readouterr().err


def test_a_graph_that_does_not_compile(
    bundle: Bundle, rtx: RecordedModule, capsys: pytest.CaptureFixture[str]
) -> None:
    rtx.answers |= {"OnnxParser.parse": False, "OnnxParser.num_errors": 1}
    rtx.answers |= {"ParserError.node_name": "n7", "ParserError.node_operator": "NonZero"}
    rtx.answers["ParserError.desc"] = "not supported"
    assert run(bundle, *SM86) == 2
    assert "could not read the stage 'normalize' at the node 'n7' (NonZero)" in capsys.readouterr().err


def test_neither_torch_nor_a_library_is_imported_for_the_help() -> None:
    code = (
        "import sys\n"
        "from asag_deploy.engines.cli import main\n"
        "assert main(['--help']) == 0\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.splitlines()[-1].split()
    assert "asag_deploy" in loaded
    assert not {"torch", "tensorrt_rtx", "tensorrt", "onnx", "onnxruntime"} & set(loaded)
