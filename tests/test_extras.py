"""What `asag_deploy/extras.py` says of the extras is what pyproject.toml has."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from asag_deploy import extras

PYPROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))
WANTED: dict[str, list[str]] = PYPROJECT["project"]["optional-dependencies"]
OF_DEVELOPERS = {"dev", "test"}
LIKE_OTHERS = {"tensorrt", "tensorrt-rtx"}
"""Whose packages other extras bring under a name that says what they are for."""
BROUGHT_ALONG = {"onnx-ir"}
"""Imported by name, and required by another package that is."""
MODULES = {
    "cuda-bindings": "cuda",
    "mkdocstrings-python": "mkdocstrings_handlers",
    "onnxruntime-gpu": "onnxruntime",
    "python-multipart": "python_multipart",
    "PyYAML": "yaml",
}
"""By package, the module that is imported, where its name is another."""


def packages(extra: str, *, within: bool = True) -> set[str]:
    """Return the modules of the packages that an extra asks for, `within` it those of other extras too."""
    found = set()
    for requirement in WANTED[extra]:
        others = re.match(r"asag-deploy\[([\w,-]+)\]", requirement)
        if others and within:
            found |= {module for name in others[1].split(",") for module in packages(name)}
        elif not others:
            name = re.split(r"[<>=\[]", requirement)[0]
            found.add(MODULES.get(name, name.replace("-", "_")))
    return found


def test_every_extra_is_there() -> None:
    assert set(extras._BROUGHT) == set(WANTED) - OF_DEVELOPERS - LIKE_OTHERS
    assert {name for names in extras._OF_PROGRAM.values() for name in names} <= set(WANTED)


@pytest.mark.parametrize("extra", sorted(extras._BROUGHT))
def test_an_extra_brings_what_is_said(extra: str) -> None:
    always = set(extras._ALWAYS)  # onnxruntime-gpu brings a module that is there in any case
    along = {name.replace("-", "_") for name in BROUGHT_ALONG}
    said = set(extras._BROUGHT[extra]) - along
    # `peers` names its own alone: what it shares with `bench` is that one's to bring.
    assert said == packages(extra, within=extra != "peers") - always


def test_modules_are_those_of_their_packages() -> None:
    installed = packages_distributions()
    known = {package: module for package, module in MODULES.items() if module in installed}
    assert {"PyYAML": "yaml"}.items() <= known.items()
    for package, module in known.items():
        names = {name.lower().replace("_", "-") for name in installed[module]}
        assert package.lower() in names or package == "onnxruntime-gpu"
