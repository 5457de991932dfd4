"""The wheel that brings the compiled operators, so that users need no compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from asag_deploy.kernels.cpu import CPU_LIBRARY_VARIABLE, LIBRARY_NAME, PACKAGE
from support.plugin_builds import PLUGINS, missing_compiler, run

pytestmark = pytest.mark.slow
CMAKE = "needs CMake to build the wheel, which is not installed"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    missing = missing_compiler() or (None if shutil.which("cmake") else CMAKE)
    if missing is not None:
        pytest.skip(missing)
    folder = tmp_path_factory.mktemp("wheel")
    sources = folder / "plugins"
    shutil.copytree(PLUGINS, sources)  # so that nothing is written into the source tree
    options = ["--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--wheel-dir", str(folder)]
    run([sys.executable, "-m", "pip", "wheel", *options, sources])
    (found,) = folder.glob("*.whl")
    return found


def test_it_holds_the_library_and_runs_on_any_python(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert f"{PACKAGE}/{LIBRARY_NAME}" in names
    assert all(name.startswith((PACKAGE, "asag_deploy_kernels-")) for name in names)
    assert "-py3-none-" in wheel.name


def test_it_holds_the_licence(wheel: Path) -> None:
    """Which is the project's own."""
    licence = (PLUGINS.parent / "LICENSE").read_bytes()
    with zipfile.ZipFile(wheel) as archive:
        about = next(Path(name).parent for name in archive.namelist() if name.endswith("/METADATA"))
        assert archive.read(f"{about}/licenses/LICENSE") == licence
        told = archive.read(f"{about}/METADATA").decode()
    assert "\nLicense-Expression: Apache-2.0\n" in told
    assert "\nLicense-File: LICENSE\n" in told


def test_it_takes_nothing_that_distributions_do_not_have(wheel: Path) -> None:
    told = run([sys.executable, "-m", "auditwheel", "show", wheel])
    assert "manylinux_2_" in told.replace("\n", " ")


def test_installed_it_is_used(wheel: Path, tmp_path: Path) -> None:
    options = ["--no-deps", "--disable-pip-version-check", "--target", str(tmp_path / "site")]
    run([sys.executable, "-m", "pip", "install", "--quiet", *options, wheel])
    environment = {name: value for name, value in os.environ.items() if name != CPU_LIBRARY_VARIABLE}
    before = environment.get("PYTHONPATH")
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path / "site"), *([before] if before else [])])
    command = [sys.executable, "-m", "asag_deploy.detect.cli", "--doctor"]
    told = subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout
    assert f", from {tmp_path / 'site' / PACKAGE / LIBRARY_NAME}" in told
