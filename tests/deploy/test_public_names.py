"""What `import asag_deploy` gives, and what it costs."""

from __future__ import annotations

import inspect
import subprocess
import sys

import asag_deploy
from asag_deploy import errors


def test_all_is_exact_and_sorted() -> None:
    submodules = {name for name, value in vars(asag_deploy).items() if inspect.ismodule(value)}
    public = {name for name in vars(asag_deploy) if not name.startswith("_")} - submodules
    assert set(asag_deploy.__all__) == public | {"__version__"}
    assert asag_deploy.__all__ == sorted(asag_deploy.__all__)


def test_every_exception_is_public() -> None:
    classes = {name: value for name, value in vars(errors).items() if inspect.isclass(value)}
    exceptions = {name for name, value in classes.items() if issubclass(value, Exception)}
    assert len(exceptions) > 10
    assert exceptions <= set(asag_deploy.__all__)
    assert all(issubclass(classes[name], errors.AsagError) for name in exceptions)


def test_import_loads_no_inference_library() -> None:
    code = "import sys, asag_deploy; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = run.stdout.split()
    assert "asag_deploy" in loaded
    assert not {"onnxruntime", "onnx", "torch", "tqdm", "supervision"} & set(loaded)
