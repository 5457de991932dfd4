"""The packages beyond the four that everything needs, and which extra brings each of them."""

from __future__ import annotations

_OF_PROGRAM = {
    "asag-bench": ("bench", "export"),
    "asag-build": ("engines",),
    "asag-eval": ("evaluate", "train"),
    "asag-export": ("export", "engines"),
    "asag-quantize": ("quantize",),
    "asag-serve": ("serve",),
    "asag-train": ("train",),
    "demo": ("export",),
    "pack": ("train",),
}
"""By program, the extras to think of first."""

_EVALUATE = ("pycocotools", "matplotlib")
_TRAIN = (*_EVALUATE, "torch", "safetensors", "scipy")
_EXPORT = (*_TRAIN, "onnx", "onnxscript", "onnx_ir")
_BROUGHT = {
    "evaluate": _EVALUATE,
    "train": _TRAIN,
    "export": _EXPORT,
    "bench": _EXPORT,
    "quantize": ("onnx", "pycocotools"),
    "engines": ("tensorrt_rtx", "onnx"),
    "gpu": ("cuda",),
    "openvino": ("openvino",),
    "serve": ("starlette", "uvicorn"),
    "supervision": ("supervision",),
    "tensorboard": ("tensorboard",),
    "video": ("av",),
}
"""By extra, the modules that it brings, as pyproject.toml has it."""


def install(module: str, program: str = "") -> str:
    """Say in backticks what installs a module that `program` needs: the extra that brings it.

    What none brings by name belongs to a package of the program's own extra.
    """
    package = module.partition(".")[0]
    of_program = _OF_PROGRAM.get(program, ())
    bring_it = [extra for extra in (*of_program, *_BROUGHT) if package in _BROUGHT[extra]]
    extra = next(iter((*bring_it, *of_program)), None)
    return f"`pip install {package}`" if extra is None else f"`pip install 'asag-deploy[{extra}]'`"


def missing(error: ImportError, program: str = "", *, purpose: str = "this") -> str:
    """Say in one sentence which package an import failed for, and what installs it.

    purpose: what needs it, as the sentence begins.
    """
    package = (error.name or "").partition(".")[0]
    said = next(iter(error.msg.splitlines()), "")
    if not package:
        return f"{purpose} needs a package that cannot be used here: {said}"
    what = "is not installed" if isinstance(error, ModuleNotFoundError) else f"cannot be used ({said})"
    return f"{purpose} needs the package {package}, which {what}: install it with {install(package, program)}"


def is_own(error: ImportError) -> bool:
    """Tell whether an import failed for one of this project's modules, which no installation mends."""
    return (error.name or "").startswith("asag_")
