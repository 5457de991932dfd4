"""The page about serving says what there is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from asag_deploy.serving import cli
from asag_deploy.serving.endpoints import ENDPOINTS
from asag_deploy.serving.metrics import Metrics
from asag_deploy.serving.options import PARAMETERS
from asag_deploy.serving.tensors import OUTPUTS
from support.tiny_bundle import tiny_manifest

PAGE = (Path(__file__).parents[3] / "docs" / "serve.md").read_text(encoding="utf-8")


def figures() -> dict[str, Any]:
    """Every figure's own name, as Prometheus has it, and what kind it is."""
    text = Metrics(tiny_manifest(), backend="b", bundle="c", threshold=0.3).text()[0].decode()
    families = [f for f in text_string_to_metric_families(text) if f.name.startswith("asag_")]
    names = {f.name + ("_total" if f.type == "counter" else ""): f.type for f in families}
    return {name: kind for name, kind in names.items() if not name.endswith("_created")}


def test_every_figure_is_explained() -> None:
    table = PAGE.partition("## Metrics")[2].partition("**An alarm")[0]
    assert set(re.findall(r"`(asag_\w+)`", table)) == set(figures())


def test_every_parameter_output_and_path_is_there() -> None:
    for parameter in PARAMETERS:
        assert f"| `{parameter.name}` |" in PAGE
    for spec in OUTPUTS:
        assert f"| `{spec.name}` | {spec.datatype} [" in PAGE
    for endpoint in ENDPOINTS:
        path = endpoint.path.replace("{model}", "NAME").replace("{version}", "1")
        assert endpoint.path.startswith("/v2/models/{model}/versions") or f"{endpoint.method} {path}" in PAGE


def test_options_are_the_commands() -> None:
    known = set(cli._parser()._option_string_actions)
    others = {"--data-binary", "--only-good", "--bundle", "--pictures", "--serve", "--json"}
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", PAGE)) - others <= known
