"""What a package index gets: its page, what it holds, and that it runs with the four base packages."""

from __future__ import annotations

import email
import importlib.util
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest

from support.tiny_bundle import make_bundle

ROOT = Path(__file__).parent.parent
PACKAGES = {"asag_deploy", "asag_evaluation", "asag_training", "asag_export", "asag_bench"}
BASE = {"numpy", "onnxruntime", "opencv-python-headless", "tqdm"}
_DEAD = re.compile(r"""(?:href|src)=["'](?!https?:|mailto:)""")


def run(*command: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True)


@pytest.fixture(scope="module")
def hook() -> ModuleType:
    pytest.importorskip("hatchling", reason="hatchling builds the distribution")
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the wheel and the source distribution, built without a network."""
    pytest.importorskip("hatchling", reason="hatchling builds the distribution")
    folder = tmp_path_factory.mktemp("dist")
    done = run(sys.executable, "-m", "hatchling", "build", "--directory", folder, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (found,) = built.glob("*.whl")
    return found


def test_links_lead_somewhere_or_are_text(hook: ModuleType) -> None:
    text = (
        "[a](docs/a.md) [b](#part) [c](https://x.y/z) `code`\n\n![P](docs/p.png)\n\n*What it\nshows, "
        "*here*.*\n\n"
        "End [d [1]](d.md#e).\n"
    )
    assert hook.page(text) == "a b [c](https://x.y/z) `code`\n\nEnd d [1].\n"
    there = hook.page(text, "https://host/me/it/")
    assert "[a](https://host/me/it/blob/main/docs/a.md) b [c](https://x.y/z)" in there
    assert "![P](https://host/me/it/raw/main/docs/p.png)" in there
    assert "[d [1]](https://host/me/it/blob/main/d.md#e)" in there


def test_the_page_of_this_project(hook: ModuleType) -> None:
    page = hook.page((ROOT / "README.md").read_text(encoding="utf-8"))
    assert re.findall(r"\]\((?!https?:)[^)]*\)", page) == []
    assert "](" in page
    assert len(page) > 1000


@pytest.mark.slow
def test_the_index_takes_it(built: Path) -> None:
    pytest.importorskip("twine", reason="twine checks distributions")
    done = run(sys.executable, "-m", "twine", "check", "--strict", *sorted(built.iterdir()))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASSED") == 2


@pytest.mark.slow
def test_its_page_as_the_index_shows_it(wheel: Path) -> None:
    markdown = pytest.importorskip("markdown_it", reason="markdown-it-py shows Markdown as indexes do")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata["License-Expression"] == "Apache-2.0"
    page = markdown.MarkdownIt("commonmark").enable("table").render(str(metadata.get_payload()))
    assert "<table>" in page
    assert _DEAD.findall(page) == []
    required = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert {re.split(r"[<>=]", line)[0] for line in required} == BASE


@pytest.mark.slow
def test_what_it_holds(built: Path, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        size = sum(info.compress_size for info in archive.infolist())
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == PACKAGES
    assert not [name for name in names if "test" in Path(name).parts[0] or "__pycache__" in name]
    assert "asag_deploy/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert size < 60 * 2**20, "indexes take 100 MB"
    (source,) = built.glob("*.tar.gz")
    with tarfile.open(source) as tar:
        inside = {"/".join(name.split("/")[1:]) for name in tar.getnames()}
    assert {"pyproject.toml", "hatch_build.py", "README.md", "LICENSE", "tests/test_house.py"} <= inside
    assert not [name for name in inside if name.startswith((".ci", ".git/", ".hypothesis", ".venv"))]


@pytest.mark.slow
def test_installed_alone_it_detects(wheel: Path, tmp_path: Path) -> None:
    python = tmp_path / "venv" / "bin" / "python"
    assert run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv").returncode == 0
    pip: list[str | Path] = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "--disable-pip-version-check",
        "--quiet",
    ]
    pip += ["--retries", "0", "--timeout", "20", "install", "--no-compile"]
    pins = ROOT / "constraints.txt"
    wanted = run(*pip, "--constraint", pins, *sorted(BASE))
    if wanted.returncode != 0:
        pytest.skip(f"the base packages cannot be had here: {wanted.stderr.strip().splitlines()[-1]}")
    done = run(*pip, "--no-index", wheel)
    assert done.returncode == 0, done.stderr
    make_bundle(tmp_path / "bundle")
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((64, 64, 3), np.uint8))
    program = python.parent / "asag-detect"
    doctor = run(program, "--doctor", tmp_path / "bundle", cwd=tmp_path)
    assert doctor.returncode == 0, doctor.stderr
    assert "is sound" in doctor.stdout
    found = run(program, "bundle", "a.png", "--json", "found.json", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert (tmp_path / "found.json").is_file()
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    for name in scripts:
        helped = run(python.parent / name, "--help", cwd=tmp_path)
        assert helped.returncode == 0, helped.stderr
