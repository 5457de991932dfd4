"""Who may import whom: asag_bench -> asag_export -> asag_training -> asag_deploy, and never the other way.

What a deployment machine installs (asag_deploy) must work without PyTorch, so nothing in it may as much as
mention torch; libraries that are not base dependencies are imported only where they are used.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "asag_deploy": ROOT / "asag_deploy",
    "asag_training": ROOT / "training" / "asag_training",
    "asag_export": ROOT / "export" / "asag_export",
    "asag_bench": ROOT / "benchmarks" / "asag_bench",
}
FORBIDDEN = {
    "asag_deploy": {"torch", "asag_training", "asag_export", "asag_bench"},
    "asag_training": {"asag_export", "asag_bench"},
    "asag_export": {"asag_bench"},
    "asag_bench": set[str](),
}
NOWHERE = {"torchvision"}
BASE_DEPENDENCIES = {"numpy", "cv2", "onnxruntime", "tqdm"}

IMPORT_EVERYTHING = """
import importlib, pkgutil, sys
for name in ("torch", "torchvision", "asag_training", "asag_export", "asag_bench", "supervision"):
    sys.modules[name] = None  # importing it now raises
import asag_deploy
for module in pkgutil.walk_packages(asag_deploy.__path__, "asag_deploy."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
print(sum(name.startswith("asag_deploy") for name in sys.modules))
"""


@pytest.mark.parametrize("package", PACKAGES)
def test_package_imports_only_what_lies_below_it(package: str) -> None:
    forbidden = FORBIDDEN[package] | NOWHERE
    found = [
        f"{file.relative_to(ROOT)}:{line} imports {name}"
        for file in _modules(package)
        for name, line, _ in _imports(file)
        if name in forbidden
    ]
    assert found == []


def test_asag_deploy_imports_only_base_dependencies_up_front() -> None:
    allowed = BASE_DEPENDENCIES | sys.stdlib_module_names | {"asag_deploy"}
    found = [
        f"{file.relative_to(ROOT)}:{line} imports {name}"
        for file in _modules("asag_deploy")
        for name, line, up_front in _imports(file)
        if up_front and name not in allowed
    ]
    assert found == []


def test_asag_deploy_imports_where_there_is_no_torch() -> None:
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", IMPORT_EVERYTHING], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) >= len(list(_modules("asag_deploy")))


def test_every_import_of_a_file_is_found(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text(
        "import a.b\nfrom c.d import e\nfrom . import f\n"
        "try:\n    import g\nexcept ImportError:\n    pass\n"
        "class A:\n    import h\n    def m(self):\n        import i\n"
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import j\n"
    )
    found = {name: up_front for name, _, up_front in _imports(file)}
    assert found == {"a": True, "c": True, "g": True, "h": True, "i": False, "typing": True, "j": False}


def _modules(package: str) -> Iterator[Path]:
    files = sorted(PACKAGES[package].rglob("*.py"))
    assert files, f"{package} is empty"
    yield from (file for file in files if file.name != "__main__.py")


def _imports(file: Path) -> Iterator[tuple[str, int, bool]]:
    """Top-level name, line, and whether it happens when the file is imported, for every import in it."""
    yield from _walk(ast.parse(file.read_text(encoding="utf-8")), up_front=True)


def _walk(node: ast.AST, *, up_front: bool) -> Iterator[tuple[str, int, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield alias.name.partition(".")[0], child.lineno, up_front
        elif isinstance(child, ast.ImportFrom):
            if child.level == 0 and child.module:
                yield child.module.partition(".")[0], child.lineno, up_front
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) or _is_type_checking(child):
            yield from _walk(child, up_front=False)
        else:
            yield from _walk(child, up_front=up_front)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
