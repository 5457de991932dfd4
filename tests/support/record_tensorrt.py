"""Records what a TensorRT's Python module offers: names, arguments, members of enumerations.

    python tests/support/record_tensorrt.py tensorrt_rtx OUT.json
    python tests/support/record_tensorrt.py tensorrt_bindings OUT.json \\
        --path UNPACKED --empty-libraries 11

The second is for TensorRT itself: its bindings (`tensorrt_cu12_bindings` and the like, a wheel that can be
unpacked anywhere) come without its libraries, but describe themselves once they are loaded.  So they are
loaded against empty libraries of the right names, which takes a C compiler.  Nothing in them can be called.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CLASSES = (
    *(
        "Builder",
        "IBuilderConfig",
        "INetworkDefinition",
        "IOptimizationProfile",
        "IHostMemory",
        "ITimingCache",
    ),
    *("OnnxParser", "ParserError", "ILogger", "IPluginRegistry", "Runtime", "ICudaEngine"),
    *("IExecutionContext", "EngineInspector"),
)
ENUMERATIONS = (
    *("BuilderFlag", "NetworkDefinitionCreationFlag", "HardwareCompatibilityLevel", "ComputeCapability"),
    *("DataType", "TensorIOMode", "LayerInformationFormat", "ProfilingVerbosity"),
)
FUNCTIONS = ("get_plugin_registry", "init_libnvinfer_plugins")

EMPTY_LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
SYMBOLS = (
    *("createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL"),
    *("createNvOnnxParser_INTERNAL", "createNvOnnxParserRefitter_INTERNAL", "getBuilderPluginRegistry"),
    *("getNvOnnxParserVersion", "getPluginRegistry", "initLibNvInferPlugins"),
)


def record(module: Any) -> dict[str, Any]:
    """The description of a module, as JSON can hold it."""
    return {
        "version": module.__version__,
        "functions": {name: signatures(getattr(module, name)) for name in FUNCTIONS if hasattr(module, name)},
        "enumerations": {
            name: sorted(getattr(module, name).__members__) for name in ENUMERATIONS if hasattr(module, name)
        },
        "classes": {name: _members(getattr(module, name)) for name in CLASSES if hasattr(module, name)},
    }


def signatures(function: Any) -> list[str]:
    """The signatures of a function, of which pybind11 writes one line each, without the module's own name."""
    lines = (function.__doc__ or "").splitlines()
    name = function.__name__
    found = [line.strip() for line in lines if re.match(rf"\s*(\d+\. )?{name}\(", line)]
    found = [re.sub(r"^\d+\. ", "", line) for line in found if "*args, **kwargs" not in line]
    return [re.sub(r"\b(?:\w+\.)+(?=[A-Z])", "", line) for line in found]


def _members(cls: Any) -> dict[str, list[str] | None]:
    """Every public member and the constructor: signatures of a method, None for a property."""
    members: dict[str, list[str] | None] = {}
    for name in sorted(dir(cls)):
        member = getattr(cls, name)
        if name == "__init__":
            members[name] = signatures(member)
        elif not name.startswith("_"):
            members[name] = signatures(member) if callable(member) else None
    return members


def load_empty_libraries(major: int) -> None:
    """Compile and load libraries without content, so that the bindings can be loaded that name them."""
    source = "".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in SYMBOLS)
    folder = Path(tempfile.mkdtemp())
    (folder / "empty.c").write_text(source, encoding="utf-8")
    for library in EMPTY_LIBRARIES:
        name = f"lib{library}.so.{major}"
        command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(folder / name)]
        subprocess.run([*command, str(folder / "empty.c")], check=True)
        ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)


def main() -> None:
    """Write the record of one module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("module")
    parser.add_argument("output", type=Path)
    parser.add_argument("--path", type=Path, help="a folder to import it from")
    parser.add_argument("--empty-libraries", type=int, metavar="MAJOR")
    options = parser.parse_args()
    if options.path is not None:
        sys.path.insert(0, str(options.path))
    if options.empty_libraries is not None:
        load_empty_libraries(options.empty_libraries)
    found = record(importlib.import_module(options.module))
    options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
