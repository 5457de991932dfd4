"""docs/export.md says which options and variants there are, and its Python runs."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest

from asag_deploy.bundle.manifest import Precision
from asag_deploy.bundle.manifest_json import export_again
from asag_deploy.engines.cli import add_engine_options
from support.tiny_bundle import make_bundle, tiny_manifest

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "export.md").read_text(encoding="utf-8")


def _flags(parser: argparse.ArgumentParser) -> set[str]:
    return {flag for flag in parser._option_string_actions if flag.startswith("--")}


def _mentioned(page: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*\w", page))


def test_every_option_is_there() -> None:
    cli = pytest.importorskip("asag_export.cli")
    engines = argparse.ArgumentParser(add_help=False)
    add_engine_options(engines)
    own = _flags(cli._parser()) - _flags(engines)
    assert own - _mentioned(PAGE) == {"--help", "--version"}
    other_page = (DOCS / "engines.md").read_text(encoding="utf-8")
    assert _flags(engines) <= _mentioned(other_page)


def test_every_option_of_quantising_is_there() -> None:
    cli = pytest.importorskip("asag_export.quantize.cli")
    page = (DOCS / "quantise.md").read_text(encoding="utf-8")
    assert _flags(cli._parser()) - _mentioned(page) == {"--help", "--version"}


def test_every_variant_is_there() -> None:
    config = pytest.importorskip("asag_training.network.config")
    named = set(re.findall(r"`(asag-[asd]-[\w-]+)`", PAGE))
    first = {name for name in config.VARIANTS if "-r101-" not in name or name.endswith("-100")}
    assert first <= named <= set(config.VARIANTS) | {"asag-a-bccd"}


@pytest.mark.parametrize(
    ("module", "precision"), [("asag_export.cli", "fp16"), ("asag_export.quantize.cli", "int8")]
)
def test_what_a_damaged_bundle_says_to_run_is_a_command(module: str, precision: Precision) -> None:
    cli = pytest.importorskip(module)
    manifest = dataclasses.replace(tiny_manifest(), precision=precision)
    (command,) = re.findall("`(.*)`", export_again(manifest))
    program, *words = shlex.split(command)
    assert program == cli.PROGRAM
    assert cli._parser().parse_args(words).output_dir == Path("DIR")


def test_what_a_damaged_bundle_says_is_quoted() -> None:
    assert export_again() in PAGE.replace("\n", " ")


def test_its_python_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    row = {"stage": "backbone", "output": "p2", "difference": 1e-6, "tolerance": 1e-4}
    parity = {"passed": True, "backend": "onnxruntime", "precision": "fp32", "stages": [row]}
    make_bundle(tmp_path / "bundle")
    manifest = tmp_path / "bundle" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "parity": parity}))
    (program,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(program, {})
    assert "backbone p2 1e-06 of 0.0001 allowed" in capsys.readouterr().out
