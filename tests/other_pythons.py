"""Run the quick tests with other versions of Python than the one of `.venv`, where they are on this machine.

    python tests/other_pythons.py 3.11 3.12 3.13

Each gets an environment of its own, `.venv-VERSION`.  Where a CPU build of PyTorch can be had for it, it
gets all that `.venv` has; else all but PyTorch, and the tests that need PyTorch are left out.  A
version that is not here, or is that of `.venv`, is named and left out.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_WITH_PYTORCH = "dev"
_WITHOUT_PYTORCH = "test"


def main(versions: list[str]) -> int:
    """Run the tests with each version, and return 0 if all passed."""
    failed = []
    for version in versions:
        if version == f"{sys.version_info.major}.{sys.version_info.minor}":
            print(f"Python {version}: that of this environment, which `make test` tests", flush=True)
            continue
        interpreter = find_python(version)
        if interpreter is None:
            print(f"Python {version}: not on this machine, so not tested", flush=True)
            continue
        print(f"Python {version}: {interpreter}", flush=True)
        python = _environment(version, interpreter)
        command = [str(python), "-m", "pytest", "-n", "2", "--dist", "worksteal", "-m", "not slow", "-q"]
        if subprocess.run(command, cwd=ROOT).returncode != 0:
            failed.append(version)
    if failed:
        print(f"failed with Python {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def find_python(version: str) -> Path | None:
    """Find an interpreter of this version on the path, or among pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    on_path = shutil.which(f"python{version}")
    candidates = [Path(on_path)] if on_path else []
    candidates += sorted(pyenv.glob(f"{version}.*/bin/python"), reverse=True)
    return next((path for path in candidates if _version(path) == version), None)


def _version(python: Path) -> str | None:
    """Ask an interpreter what it is; None if it does not run (pyenv's shims may stand for nothing)."""
    code = "import sys, venv; print('%d.%d' % sys.version_info[:2])"
    try:
        run = subprocess.run([python, "-c", code], capture_output=True, text=True)
    except OSError:
        return None
    return run.stdout.strip() if run.returncode == 0 else None


def _environment(version: str, interpreter: Path) -> Path:
    """Make or renew the environment of a version, and return its interpreter."""
    folder = ROOT / f".venv-{version}"
    python = folder / "bin" / "python"
    if _version(python) != version:
        subprocess.run([interpreter, "-m", "venv", "--clear", folder], check=True)
    extra = _WITH_PYTORCH if _has_cpu_build_of_pytorch(python) else _WITHOUT_PYTORCH
    if extra == _WITHOUT_PYTORCH:
        print(f"Python {version}: no CPU build of PyTorch to be had, so what needs PyTorch is not tested")
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, "-c", "constraints.txt", "-e", f".[{extra}]"], cwd=ROOT, check=True)
    return python


def _has_cpu_build_of_pytorch(python: Path) -> bool:
    """Whether pip would install a CPU build; the plain build for Linux brings gigabytes of CUDA libraries."""
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = next(line for line in constraints if line.startswith("torch=="))
    ask = [str(python), "-m", "pip", "install", "--dry-run", "--quiet", "--no-deps", "--report", "-", pinned]
    run = subprocess.run(ask, capture_output=True, text=True)
    return run.returncode == 0 and "%2Bcpu" in run.stdout.replace("+", "%2B")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
