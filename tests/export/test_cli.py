"""`asag-export`: what it makes of its options, and what it says when it cannot."""

from __future__ import annotations

import dataclasses
import errno
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from asag_deploy.bundle.bundle import Bundle
from asag_deploy.bundle.manifest import Preprocessing
from asag_export import bundle_export
from asag_export.cli import main
from asag_export.gate.parity import ParityReport
from asag_training.checkpoints import save_checkpoint
from asag_training.network.config import MANUAL_STOPS
from support.small_network import small_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "small.safetensors"
    save_checkpoint(path, dataclasses.replace(small_checkpoint(), trained=True))
    return path


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Where a bundle is asked for; its parent is empty."""
    parent = tmp_path / "bundles"
    parent.mkdir()
    return parent / "bundle"


def fail(parity: ParityReport) -> None:
    parity.stages[0] = dataclasses.replace(parity.stages[0], difference=3.0, passed=False)


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int = 2) -> str:
    """Run into an error, and return the one sentence about it."""
    assert main(arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    prefix = "asag-export: error: "
    assert line.startswith(prefix)
    return line.removeprefix(prefix)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--head aux_3", "there is no head 'aux_3' in the checkpoint; it has aux_0, aux_1, aux_2, main"),
        ("--levels p2-p6", "unknown levels 'p2-p6'; choose one of p3-p6, p4-p6, p5-p6"),
        ("--mode quick", "unknown mode 'quick'; choose exact or fast"),
        ("--precision int8", "unknown precision 'int8'; choose one of fp32, fp16"),
        ("--format engine", "unknown format 'engine'; choose one of onnx"),
        ("--opset 17", "--opset is 17; it must be a whole number from 18 to 23"),
        ("--opset latest", "--opset is latest; it must be a whole number from 18 to 23"),
        ("--variant asag-b", "unknown variant 'asag-b'; the variants are asag-a-r50-100, "),
        ("--variant asag-s-r50-300", "is not a checkpoint of asag-s-r50-300"),
        ("--shorter-side 900 --longer-side 800", "image sides 900 and 800 make no sense"),
        ("--shorter-side 31", "--shorter-side is 31; it must be"),
        ("--colour red", "unrecognized arguments: --colour red"),
        ("--untrained", "not allowed with argument"),
        ("--weights mean", "argument --weights: invalid choice: 'mean' (choose from"),
        ("--weights ema", "holds no averaged weights (EMA), only the model's"),
    ],
)
def test_option_that_makes_no_sense(
    checkpoint: Path, output: Path, capsys: pytest.CaptureFixture[str], options: str, message: str
) -> None:
    arguments = ["--checkpoint", str(checkpoint), "--output-dir", str(output), *options.split()]
    assert message in refused(capsys, arguments)
    assert not list(output.parent.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output-dir", "OUT"], "one of the arguments --checkpoint --untrained is required"),
        (["--checkpoint", "missing.pth"], "the following arguments are required: --output-dir"),
        (
            ["--untrained", "--output-dir", "OUT"],
            "--untrained needs to know which network: give --variant NAME",
        ),
        (["--untrained", "--variant", "asag-b", "--output-dir", "OUT"], "unknown variant 'asag-b'"),
        (["--checkpoint", "missing.pth", "--output-dir", "OUT"], "missing.pth"),
    ],
)
def test_source_or_target_that_is_missing(
    output: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert message in refused(capsys, [str(output) if word == "OUT" else word for word in arguments])
    assert not list(output.parent.iterdir())


def test_file_that_is_no_checkpoint(output: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    junk = tmp_path / "junk.pth"
    junk.write_bytes(b"not a checkpoint at all")
    assert str(junk) in refused(capsys, ["--checkpoint", str(junk), "--output-dir", str(output)])
    assert not list(output.parent.iterdir())


@pytest.mark.usefixtures("parity")
class TestOutputDirectory:
    def export(self, checkpoint: Path, output: Path, *options: str) -> list[str]:
        return ["--checkpoint", str(checkpoint), "--output-dir", str(output), "--quiet", *options]

    def test_that_holds_something_else(
        self, checkpoint: Path, output: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        output.mkdir()
        (output / "thesis.tex").write_text("years of work")
        arguments = self.export(checkpoint, output, "--overwrite")
        assert "holds files but no manifest.json" in refused(capsys, arguments)
        assert [path.name for path in output.iterdir()] == ["thesis.tex"]
        assert list(output.parent.iterdir()) == [output]

    def test_that_is_a_file(self, checkpoint: Path, output: Path, capsys: pytest.CaptureFixture[str]) -> None:
        output.write_text("a file")
        assert "exists and is not a directory" in refused(capsys, self.export(checkpoint, output))
        assert output.read_text() == "a file"

    def test_that_cannot_be_made(
        self, checkpoint: Path, output: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        output.write_text("a file")
        message = refused(capsys, self.export(checkpoint, output / "below"))
        assert message.startswith(f"could not write '{output / 'below'}'")

    def test_that_holds_a_bundle(
        self, checkpoint: Path, output: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(self.export(checkpoint, output, "--head", "aux_0")) == 0
        assert "already exists" in refused(capsys, self.export(checkpoint, output))
        assert Bundle.open(output).manifest.head == "aux_0"
        assert main(self.export(checkpoint, output, "--overwrite")) == 0
        assert Bundle.open(output).manifest.head == "main"
        assert list(output.parent.iterdir()) == [output]

    def test_that_is_empty(self, checkpoint: Path, output: Path) -> None:
        output.mkdir()
        assert main(self.export(checkpoint, output)) == 0
        assert Bundle.open(output).manifest.head == "main"

    def test_whose_parents_do_not_exist(self, checkpoint: Path, output: Path) -> None:
        assert main(self.export(checkpoint, output / "a" / "b")) == 0
        assert Bundle.open(output / "a" / "b").manifest.trained

    def test_on_a_disk_that_is_full(
        self,
        checkpoint: Path,
        output: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        write = Path.write_bytes

        def until_full(path: Path, data: Any) -> int:
            if path.name == "decoder.onnx":
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(path, data)

        monkeypatch.setattr(Path, "write_bytes", until_full)
        message = refused(capsys, self.export(checkpoint, output))
        assert message == f"could not write '{output}': no space left on device"
        assert not list(output.parent.iterdir())


def test_options_reach_the_bundle(checkpoint: Path, output: Path, parity: ParityReport) -> None:
    options = "--head aux_1 --levels p4-p6 --mode fast --precision fp16 --opset 22 --shorter-side 480 --quiet"
    assert main(["--checkpoint", str(checkpoint), "--output-dir", str(output), *options.split()]) == 0
    manifest = Bundle.open(output).manifest
    assert (manifest.head, manifest.precision, manifest.opset) == ("aux_1", "fp16", 22)
    assert (manifest.probing.mode, [level.level for level in manifest.probing.levels]) == ("fast", ["P4"])
    assert manifest.preprocessing == Preprocessing(shorter_side=480)
    assert (manifest.variant, manifest.trained) == ("asag-a-r50-100", True)
    assert [graph.name for graph in manifest.graphs] == ["normalize", "backbone", "probe_p4", "decoder"]
    assert manifest.parity == json.loads(json.dumps(parity.to_dict()))


@pytest.mark.usefixtures("parity")
def test_images_are_resized_as_in_training(output: Path, tmp_path: Path) -> None:
    path = tmp_path / "own.safetensors"
    trained_with = Preprocessing(shorter_side=320, longer_side=500, mean=(1.0, 2.0, 3.0))
    save_checkpoint(path, dataclasses.replace(small_checkpoint(), preprocessing=trained_with))
    arguments = ["--checkpoint", str(path), "--output-dir", str(output), "--quiet", "--overwrite"]
    assert main(arguments) == 0
    assert Bundle.open(output).manifest.preprocessing == trained_with
    assert main([*arguments, "--longer-side", "400"]) == 0
    expected = dataclasses.replace(trained_with, longer_side=400)
    assert Bundle.open(output).manifest.preprocessing == expected


@pytest.mark.usefixtures("parity")
def test_what_is_printed(checkpoint: Path, output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--checkpoint", str(checkpoint), "--output-dir", str(output)]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert "decoder    logits" in captured.out
    assert captured.out.splitlines()[-1] == f"{output}: asag-a-r50-100, fp32, ready for asag-detect"
    (note,) = captured.err.splitlines()
    assert (
        "small.safetensors': the file does not say how images are prepared: without other options, 800"
        in note
    )
    assert main([*arguments, "--overwrite", "--quiet"]) == 0
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


@pytest.mark.usefixtures("parity")
def test_which_head_of_a_public_file_is_meant(
    tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ASAG_A_r50_1x_100.pth"
    torch.save({"model": dict(small_checkpoint(heads=4).state)}, path)
    arguments = ["--checkpoint", str(path), "--output-dir", str(output), "--overwrite"]
    assert main(arguments) == 0
    said = capsys.readouterr().err
    assert (
        "decoders 'main' is taken, but its published AP, 42.6, is of 'aux_2': --head aux_2 takes that" in said
    )
    assert Bundle.open(output).manifest.head == "main"
    assert main([*arguments, "--head", "aux_2"]) == 0
    assert "decoders" not in capsys.readouterr().err
    assert Bundle.open(output).manifest.head == "aux_2"


@pytest.mark.usefixtures("parity")
@pytest.mark.parametrize("levels", MANUAL_STOPS)
def test_progress_on_a_terminal(
    checkpoint: Path,
    output: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    levels: str,
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    arguments = ["--checkpoint", str(checkpoint), "--output-dir", str(output), "--levels", levels]
    assert main(arguments) == 0
    steps = 4 + len(MANUAL_STOPS[levels])
    lines = capsys.readouterr().err.split("\r")
    # A slow machine is shown more lines of one step than a fast one; its first line is always there.
    first = next(line for line in lines if line.startswith("comparing with PyTorch"))
    assert f" {steps - 1}/{steps} " in first


def test_bundle_that_fails_the_gate(
    checkpoint: Path, output: Path, parity: ParityReport, capsys: pytest.CaptureFixture[str]
) -> None:
    fail(parity)
    arguments = ["--checkpoint", str(checkpoint), "--output-dir", str(output), "--quiet"]
    message = refused(capsys, arguments, code=1)
    assert "output 'logits' of graph 'decoder' differs by 3 where 1 is allowed" in message
    assert "nothing was written" in message
    assert not list(output.parent.iterdir())

    message = refused(capsys, [*arguments, "--keep-failed"], code=1)
    assert message == f"the bundle at '{output}' was kept although it failed the parity gate"
    assert Bundle.open(output).manifest.parity["passed"] is False


def test_runs_that_differ_fail_too(
    checkpoint: Path, output: Path, parity: ParityReport, capsys: pytest.CaptureFixture[str]
) -> None:
    parity.runs[0] = dataclasses.replace(parity.runs[0], same_stops=False, passed=False)
    arguments = ["--checkpoint", str(checkpoint), "--output-dir", str(output), "--quiet"]
    assert "the loop's stops or the detections differ end to end" in refused(capsys, arguments, code=1)


def test_failing_bundle_does_not_replace_a_good_one(
    checkpoint: Path, output: Path, parity: ParityReport, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--checkpoint", str(checkpoint), "--output-dir", str(output), "--quiet"]
    assert main(arguments) == 0
    fail(parity)
    refused(capsys, [*arguments, "--overwrite", "--head", "aux_0"], code=1)
    assert Bundle.open(output).manifest.head == "main"
    assert Bundle.open(output).manifest.parity["passed"] is True
    assert list(output.parent.iterdir()) == [output]


@pytest.mark.usefixtures("parity")
def test_interrupt(checkpoint: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bundle_export, "run_gate", interrupted)
    assert main(["--checkpoint", str(checkpoint), "--output-dir", str(output), "--quiet"]) == 130
    assert not list(output.parent.iterdir())


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "--checkpoint FILE" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("asag-export ")


@pytest.mark.slow
def test_bundle_made_by_the_command(half_bundle: Bundle) -> None:
    manifest = half_bundle.manifest
    assert (manifest.variant, manifest.head, manifest.precision) == ("asag-a-r50-100", "aux_1", "fp16")
    assert [level.level for level in manifest.probing.levels] == ["P4"]
    assert manifest.trained is False
    assert manifest.parity["passed"] is True
    assert manifest.parity["precision"] == "fp16"
    assert manifest.graph("decoder").inputs[0].dtype == "float16"
    assert {spec.dtype for spec in manifest.graph("decoder").outputs} == {"float32", "int64"}
    assert {path.name for path in half_bundle.path.iterdir()} == {
        *(f"{name}.onnx" for name in ("normalize", "backbone", "probe_p4", "decoder")),
        "README.md",
        "manifest.json",
    }
