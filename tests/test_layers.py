"""Who may import whom: the contracts of `[tool.importlinter]` in pyproject.toml, and what they cannot say.

What a deployment machine installs must work without PyTorch, so nothing in asag_deploy, asag_evaluation and
asag_export.quantize may import it; libraries that are not base dependencies are imported only where they are
used.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).parent.parent
BASE_DEPENDENCIES = {"numpy", "cv2", "onnxruntime", "tqdm"}

IMPORT_EVERYTHING = """
import importlib, pkgutil, sys
for name in ("torch", "torchvision", "supervision"):
    sys.modules[name] = None  # importing it now raises
package = importlib.import_module(sys.argv[1])
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    importlib.import_module(module.name)
print(sum(name.startswith(package.__name__) for name in sys.modules))
"""


def test_imports_keep_to_the_house(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    # It would silence the loggers that other tests read.
    monkeypatch.setattr("importlinter.cli.logging_config.dictConfig", lambda _: None)
    code = lint_imports(no_cache=True)
    assert code == 0, capsys.readouterr().out


def test_the_runtime_imports_only_base_dependencies_up_front() -> None:
    allowed = BASE_DEPENDENCIES | sys.stdlib_module_names | {"asag_deploy"}
    found = [
        f"{file.relative_to(ROOT)}:{line} imports {name}"
        for file in _modules(ROOT / "asag_deploy")
        for name, line, up_front in _imports(file)
        if up_front and name not in allowed
    ]
    assert found == []


@pytest.mark.parametrize(
    ("package", "folder"),
    [
        ("asag_deploy", "asag_deploy"),
        ("asag_evaluation", "training/asag_evaluation"),
        ("asag_export.quantize", "export/asag_export/quantize"),
    ],
)
def test_package_imports_where_there_is_no_torch(package: str, folder: str) -> None:
    command = [sys.executable, "-W", "error", "-c", IMPORT_EVERYTHING, package]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) >= len(_modules(ROOT / folder))


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


def _modules(folder: Path) -> list[Path]:
    files = sorted(folder.rglob("*.py"))
    assert files, f"{folder} is empty"
    return files


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
