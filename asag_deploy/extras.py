"""The packages beyond the four that everything needs, and which extra brings each of them."""

from __future__ import annotations

_OF_PROGRAM = {
    "asag-batch": ("ray",),
    "asag-bench": ("bench", "export", "peers"),
    "asag-build": ("engines",),
    "asag-data": ("yolo",),
    "asag-eval": ("evaluate", "train"),
    "asag-export": ("export", "engines"),
    "asag-paper": ("bench", "export", "peers"),
    "asag-playground": ("playground",),
    "asag-quantize": ("quantize",),
    "asag-serve": ("serve",),
    "asag-train": ("train",),
    "demo": ("export",),
    "docs": ("docs",),
    "pack": ("train",),
}
"""By program, the extras to think of first."""

_EVALUATE = ("faster_coco_eval", "matplotlib", "msgspec")
_TRAIN = (*_EVALUATE, "torch", "safetensors", "scipy")
_EXPORT = (*_TRAIN, "onnx", "onnxscript", "onnx_ir")
_BROUGHT = {
    "evaluate": _EVALUATE,
    "train": _TRAIN,
    "export": _EXPORT,
    "bench": _EXPORT,
    "docs": ("ipykernel", "mkdocstrings_handlers", "nbclient", "nbconvert", "nbformat", "zensical"),
    "quantize": ("onnx", "faster_coco_eval"),
    "engines": ("tensorrt_rtx", "onnx"),
    "gpu": ("cuda",),
    "hub": ("huggingface_hub",),
    "openvino": ("openvino",),
    "peers": ("transformers",),
    "playground": ("gradio",),
    "ray": ("ray", "pyarrow", "pandas"),
    "serve": ("starlette", "uvicorn", "prometheus_client", "python_multipart"),
    "supervision": ("supervision",),
    "tensorboard": ("tensorboard",),
    "video": ("av",),
    "yolo": ("yaml",),
}
"""By extra, the modules that it brings, as pyproject.toml has it."""
_ALWAYS = {
    "cv2": "opencv-python-headless",
    "numpy": "numpy",
    "onnxruntime": "onnxruntime",
    "tqdm": "tqdm",
}
"""What everything needs: by module, what pip calls it."""


def install(module: str, program: str = "") -> str:
    """Say in backticks what installs a module that `program` needs: the extra that brings it.

    What none brings by name belongs to a package of the program's own extra.
    """
    package = module.partition(".")[0]
    of_program = _OF_PROGRAM.get(program, ())
    bring_it = [extra for extra in (*of_program, *_BROUGHT) if package in _BROUGHT[extra]]
    own = () if package in _ALWAYS else of_program
    extra = next(iter((*bring_it, *own)), None)
    wanted = _ALWAYS.get(package, package) if extra is None else f"'asag-deploy[{extra}]'"
    return f"`pip install {wanted}`"


def missing(error: ImportError, program: str = "", *, purpose: str = "this") -> str:
    """Say in one sentence which package an import failed for, and what installs it.

    purpose: what needs it, as the sentence begins.
    """
    package = (error.name or _raised_in(error)).partition(".")[0]
    said = next(iter(error.msg.splitlines()), "")
    if not package:
        return f"{purpose} needs a package that cannot be used here: {said}"
    needs, pip = f"{purpose} needs the package {package}, which", install(package, program)
    if isinstance(error, ModuleNotFoundError):
        return f"{needs} is not installed: install it with {pip}"
    again = pip.replace("pip install", "pip install --force-reinstall")
    return f"{needs} cannot be used ({said}): install it anew with {again}"


def _raised_in(error: ImportError) -> str:
    """Return the module that has raised an error which names none, as some do of a library that they lack."""
    frame, name = error.__traceback__, ""
    while frame is not None:
        name = frame.tb_frame.f_globals.get("__name__", "")
        frame = frame.tb_next
    return "" if name.startswith(("asag_", "__main__")) else name


def is_own(error: ImportError) -> bool:
    """Tell whether an import failed for one of this project's modules, which no installation mends."""
    return (error.name or "").startswith("asag_")
