"""Where CUDA's and cuDNN's libraries lie, for ONNX Runtime: its own search knows one folder only.

A library is taken from one place: two copies of cuDNN in a process do not agree.  What is loaded already, by
PyTorch for example, stays; then the first place that has it is taken.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

_MAPS = Path("/proc/self/maps")
_INSTALLATIONS = Path("/usr/local")
_CUDNN = "libcudnn.so.9"


def load_cuda_libraries() -> None:
    """Load what ONNX Runtime's CUDA provider is linked with; what lies nowhere is left to the loader."""
    import onnxruntime

    preload = getattr(onnxruntime, "preload_dlls", None)  # from 1.21 on
    if preload is None:
        return
    major = str(getattr(onnxruntime, "cuda_version", "")).partition(".")[0]
    beside = Path(onnxruntime.__file__).parent.parent
    for library, part in ((f"libcublasLt.so.{major}", "cuda"), (_CUDNN, "cudnn")):
        asked = {"cuda": part == "cuda", "cudnn": part == "cudnn"}
        for folder in [] if _is_loaded(library) else place_of(library, places(beside)):
            _quietly(preload, **asked, directory=str(folder))
        if not _is_loaded(library):
            _quietly(preload, **asked)


def places(beside: Path) -> Iterator[list[Path]]:
    """Yield groups of folders that belong together, in the order in which to look at them.

    The wheels of NVIDIA beside ONNX Runtime (`beside` is the folder that holds its package) and on
    `sys.path`, PyTorch, the CUDA installation that the environment names, the loader's path, `/usr/local`.
    """
    for folder in dict.fromkeys([beside, *(Path(entry) for entry in sys.path)]):
        yield sorted((folder / "nvidia").glob("*/lib"))
    torch = importlib.util.find_spec("torch")
    if torch is not None and torch.origin is not None:
        yield [Path(torch.origin).parent / "lib"]
    named = (os.environ.get(variable) for variable in ("CUDA_HOME", "CUDA_PATH"))
    installed = sorted(_INSTALLATIONS.glob("cuda*"), key=_version, reverse=True)
    for root in (*(Path(name) for name in named if name), *installed):
        yield [root / "lib64", root / "lib", root / "targets" / "x86_64-linux" / "lib"]
    for name in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep):
        if name:
            yield [Path(name)]


def place_of(library: str, groups: Iterable[list[Path]]) -> list[Path]:
    """Return the folders of the first group that has a file of that name, beginning with the file's own."""
    for group in groups:
        holding = [folder for folder in group if (folder / library).is_file()]
        if holding:
            rest = [folder for folder in group if folder not in holding and folder.is_dir()]
            return [*holding[:1], *rest]
    return []


def _version(folder: Path) -> tuple[int, ...]:
    """Read `cuda-13.0` as (13, 0), so that the newest comes first."""
    return tuple(
        int(part) for part in folder.name.removeprefix("cuda").strip("-").split(".") if part.isdigit()
    )


def _is_loaded(library: str) -> bool:
    """Tell whether this process has loaded a library of that name."""
    try:
        return f"/{library}" in _MAPS.read_text(encoding="utf-8", errors="replace")
    except OSError:  # not on Linux
        return False


def _quietly(preload: Callable[..., None], **asked: Any) -> None:
    """Call `preload` without its output: the system's loader may find what it complains about."""
    with contextlib.suppress(Exception), contextlib.redirect_stdout(io.StringIO()):
        preload(**asked)
