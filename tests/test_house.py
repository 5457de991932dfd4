"""What every file of the project keeps to.  (ruff and mypy run beside the tests, in `make test`.)"""

from __future__ import annotations

import importlib
import os
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ("asag_deploy", "training", "export", "benchmarks", "docs", "tests")
SKIPPED_FOLDERS = {
    *(".git", ".venv", "__pycache__", "build", "dist"),
    *("demo-output", "bench-output", "gpu-report", "runs"),
}
MAX_LINES = 600
# Spelt so that this file does not hold them itself.
UNFINISHED = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X")) + r")\b")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def python_files() -> list[Path]:
    return [file for folder in SOURCES for file in sorted((ROOT / folder).rglob("*.py"))]


def text_files() -> list[Path]:
    """Every file of the tree that is text, whatever its kind."""
    files = []
    for folder, subfolders, names in os.walk(ROOT):
        subfolders[:] = [name for name in subfolders if not _is_skipped(name)]
        files += [path for path in (Path(folder, name) for name in names) if _is_text(path)]
    return sorted(files)


def test_no_file_is_too_long() -> None:
    lengths = {
        str(f.relative_to(ROOT)): len(f.read_text(encoding="utf-8").splitlines()) for f in python_files()
    }
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


def test_nothing_is_left_unfinished() -> None:
    found = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()}"
        for file in text_files()
        for number, line in enumerate(
            file.read_text(encoding="utf-8", errors="replace").splitlines(), start=1
        )
        if UNFINISHED.search(line)
    ]
    assert found == []


@pytest.mark.parametrize(("script", "target"), PYPROJECT["project"]["scripts"].items())
def test_console_script_exists(script: str, target: str) -> None:
    module, _, function = target.partition(":")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        pytest.skip("no PyTorch")
    assert callable(getattr(found, function)), script


def test_one_version_for_all() -> None:
    version = importlib.import_module("asag_deploy._version").__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+([a-z]+\d+)?", version)
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("folder", PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"])
def test_installed_package_is_typed(folder: str) -> None:
    assert (ROOT / folder / "__init__.py").is_file()
    assert (ROOT / folder / "py.typed").is_file()


def test_what_the_tests_run_with_is_pinned() -> None:
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert [line for line in pins if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
    pinned = {_normalised(line.partition("==")[0]) for line in pins}
    wanted = set()
    extras = PYPROJECT["project"]["optional-dependencies"]
    for requirement in PYPROJECT["project"]["dependencies"] + [
        r for e in extras if e != "gpu" for r in extras[e]
    ]:
        wanted.add(_normalised(re.split(r"[<>=\[]", requirement)[0]))
    assert wanted - pinned - {"asag-deploy"} == set()


def _is_skipped(folder: str) -> bool:
    return folder in SKIPPED_FOLDERS or folder.startswith(".venv") or folder.endswith("_cache")


def _is_text(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return b"\0" not in file.read(1024)


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
