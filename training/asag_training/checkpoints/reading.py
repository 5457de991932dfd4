"""Reading weight files of either kind without running anything they bring along."""

from __future__ import annotations

import argparse
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from asag_deploy.errors import CheckpointError

# What public checkpoints hold besides tensors and plain values.  None of these can do anything: a Namespace
# only takes attributes, and a NumPy scalar (a metric) is a few bytes.  NumPy 2 renamed the latter's module.
_SCALAR = np.float64(0).__reduce__()[0]
_HARMLESS: list[Any] = [
    argparse.Namespace,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("float32", "float64", "int64")),
    (_SCALAR, "numpy._core.multiarray.scalar"),
    (_SCALAR, "numpy.core.multiarray.scalar"),
]
_ZIP, _PICKLE = b"PK", b"\x80"
_GLOBAL = re.compile(r"GLOBAL (\S+)")


@dataclass(frozen=True, kw_only=True)
class WeightFile:
    """The content of a file."""

    content: Any
    """A .safetensors file's tensors by name, or whatever was saved in a .pth file."""
    metadata: Mapping[str, str] | None
    """Of a .safetensors file; None for a .pth file."""


def read_weight_file(path: Path) -> WeightFile:
    """Read a .pth or .safetensors file; which of them it is shows in its first bytes, not in its name.

    Raises CheckpointError for a file that is missing, damaged, neither of the two, or that would run code.
    """
    if path.is_dir():
        raise CheckpointError(f"'{path}' is a directory; give the checkpoint file in it")
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except FileNotFoundError:
        raise CheckpointError(f"there is no checkpoint file '{path}'") from None
    except OSError as error:
        raise CheckpointError(f"the checkpoint '{path}' cannot be read: {error.strerror}") from None
    if not start:
        raise CheckpointError(f"the checkpoint '{path}' is empty; copy or download it again")
    if start.startswith(_ZIP):
        return WeightFile(content=_read_torch(path, mmap=True), metadata=None)
    if start.startswith(_PICKLE):
        return WeightFile(content=_read_torch(path, mmap=False), metadata=None)
    if start.endswith(b"{"):
        return _read_safetensors(path)
    raise CheckpointError(f"'{path}' is not a checkpoint: it is neither a PyTorch nor a safetensors file")


def named_weights(path: Path, state: Any) -> dict[str, Tensor]:
    """Return the tensors of a state dict, without a wrapper's `module.` before their names and BatchNorm's
    counters.

    Raises CheckpointError where it is no state dict, or holds anything but floating point tensors.
    """
    if not isinstance(state, Mapping) or not state:
        raise CheckpointError(f"'{path}' is not a checkpoint: it holds no named weights")
    prefix = "module." if all(str(name).startswith("module.") for name in state) else ""
    weights = {}
    for name, tensor in state.items():
        if str(name).endswith("num_batches_tracked"):
            continue
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.layout != torch.strided:
            raise CheckpointError(
                f"'{path}' is not a checkpoint of weights: '{name}' is no floating point tensor"
            )
        weights[str(name).removeprefix(prefix)] = tensor.detach()
    return weights


def as_float32(path: Path, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies that do not depend on the file any more (CheckpointError if a value is not finite)."""
    for name, tensor in weights.items():
        extremes = torch.stack(torch.aminmax(tensor))  # much faster than asking every value
        if not torch.isfinite(extremes).all():
            raise CheckpointError(
                f"'{name}' of '{path}' holds infinite or undefined values: "
                f"take a checkpoint from before training diverged"
            )
    return {name: tensor.to(torch.float32, copy=True) for name, tensor in weights.items()}


def _read_torch(path: Path, *, mmap: bool) -> Any:
    try:
        # What torch warns of here (old formats) is dealt with below or of no concern to the user.
        with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals(_HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # damaged files make torch raise nearly anything
        code = _GLOBAL.search(str(error))
        if code is not None:
            raise CheckpointError(
                f"'{path}' holds pickled code ({code[1]}), which is never run: save its weights alone, "
                f"with torch.save(model.state_dict(), ...), where it was made"
            ) from None
        raise CheckpointError(
            f"'{path}' is not a checkpoint, or is truncated or damaged: copy or download it again"
        ) from error


def _read_safetensors(path: Path) -> WeightFile:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            return WeightFile(content=tensors, metadata=file.metadata() or {})
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"'{path}' is not a safetensors file, or is truncated or damaged: copy it again"
        ) from error
