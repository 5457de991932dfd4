"""Reading weight files of any kind without running anything they bring along."""

from __future__ import annotations

import argparse
import datetime
import json
import pathlib
import pickle
import re
import types
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from asag_deploy.errors import CheckpointError
from asag_deploy.scratch import path_in_utf8
from asag_training.checkpoints.foreign_files import HEAD_BYTES, what_archive, what_else, what_folder
from asag_training.checkpoints.pickles import is_never_read, longest_word, newer_protocol, refused_class


class Unread:
    """Stands for an object of another library, whose content is not looked at."""

    def __init__(self, *given: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


class _AsDict:
    """Stands for another library's kind of dictionary, and becomes a plain one."""

    def __new__(cls, *given: object) -> Any:
        return OrderedDict[Any, Any]()


class _AsList:
    """Stands for another kind of list, and becomes a plain one."""

    def __new__(cls, *given: object) -> Any:
        return []


# What checkpoints hold besides tensors and plain values.  None of these can do anything: a Namespace only
# takes attributes, a NumPy scalar or array (a metric) is a few bytes, a path only text.  NumPy 2 renamed the
# module of its own.  Paths are read as such that touch no disk, whatever system they were written on.
_SCALAR = np.float64(0).__reduce__()[0]
_ARRAY = np.zeros(1).__reduce__()[0]
_NUMPY_TYPES = "?bBhHiIlLqQefdgFDGSUmMVO"
_HARMLESS: list[Any] = [
    argparse.Namespace,
    torch.torch_version.TorchVersion,
    datetime.datetime,
    datetime.date,
    datetime.timedelta,
    datetime.timezone,
    types.SimpleNamespace,
    np.dtype,
    np.ndarray,
    *dict.fromkeys(type(np.dtype(kind)) for kind in _NUMPY_TYPES),
    *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("_core", "core")),
    *((_ARRAY, f"numpy.{core}.multiarray._reconstruct") for core in ("_core", "core")),
    *(
        (pathlib.PureWindowsPath if "Windows" in kind else pathlib.PurePosixPath, f"{module}.{kind}")
        for module in ("pathlib", "pathlib._local")
        for kind in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
    ),
    *(
        (kind, f"{module}.{kind.__name__}")
        for module in ("builtins", "__builtin__")
        for kind in (bool, int, float, complex, str, list, tuple, dict, set, frozenset, range, slice)
    ),
    (_AsDict, "collections.defaultdict"),
    (_AsList, "collections.deque"),
]
# Settings and records of other tools.  Nothing of them is needed but what a dictionary holds, and the
# libraries themselves are never imported.
_DICTIONARIES = (
    *("yacs.config.CfgNode", "fvcore.common.config.CfgNode", "detectron2.config.config.CfgNode"),
    *("addict.addict.Dict", "mmengine.config.config.ConfigDict", "mmcv.utils.config.ConfigDict"),
    *("easydict.EasyDict", "timm.utils.misc.AttrDict", "lightning.fabric.utilities.data.AttributeDict"),
    *(f"{name}.utilities.parsing.AttributeDict" for name in ("lightning.pytorch", "pytorch_lightning")),
    "lightning_fabric.utilities.data.AttributeDict",
)
_OBJECTS = (
    *("omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig"),
    *(f"omegaconf.base.{name}" for name in ("ContainerMetadata", "Metadata", "SCMode")),
    *(f"omegaconf.nodes.{name}Node" for name in ("Any", "String", "Integer", "Float", "Boolean")),
    *(f"omegaconf.nodes.{name}Node" for name in ("Path", "Bytes", "Enum", "Value")),
    *(f"typing.{name}" for name in ("Any", "Dict", "List", "Optional", "Union")),
    "mmengine.config.config.Config",
    "mmengine.logging.history_buffer.HistoryBuffer",
    "mmengine.logging.message_hub.MessageHub",
)
_ALLOWED = [*_HARMLESS, *((_AsDict, name) for name in _DICTIONARIES), *((Unread, name) for name in _OBJECTS)]
_ZIP, _PICKLE = b"PK", b"\x80"
_SAFETENSORS = b"\0\0\0\0{"
"""The upper half of the length of a header, and what the header begins with."""
_GLOBAL = re.compile(r"GLOBAL (\S+)")
_NOT_TORCHS = "magic number"
"""In what PyTorch says of other pickles."""
_INDEX = "weight_map"
_SHARD = ".distcp"
_MOST_UNKNOWN = 32
"""Kinds of objects that nobody knows here and are passed over."""


@dataclass(frozen=True, kw_only=True)
class WeightFile:
    """The content of a file."""

    content: Any
    """A .safetensors file's tensors by name, or whatever was saved in a .pth file."""
    metadata: Mapping[str, str] | None
    """Of a .safetensors file; None for a .pth file."""
    unread: tuple[str, ...] = ()
    """The names of classes of which it holds objects that were passed over."""


def read_weight_file(path: Path) -> WeightFile:
    """Read a PyTorch or safetensors file, or the parts that an index lists.

    Which of them it is shows in its first bytes, not in its name.  Raises CheckpointError for anything else,
    saying what it is, and for a file that is missing, damaged, or would run code.
    """
    start = _start(path)
    if start[4:9] == _SAFETENSORS:  # first: the length of its header may begin as archives and pickles do
        return _read_safetensors(path)
    if start.startswith(_ZIP):
        what = what_archive(path)
        if what is not None:
            raise CheckpointError(f"'{path}' is no checkpoint but {what}")
        if path.suffix == _SHARD:
            raise CheckpointError(
                f"'{path}' is one part of a checkpoint in shards: give the folder, to see how"
            )
        return _read_torch(path, mmap=True)
    if start.startswith(_PICKLE):
        return _read_torch(path, mmap=False)
    if start[8:9] == b"{":
        return _read_safetensors(path)
    what = what_else(start)
    if what is not None:
        raise CheckpointError(f"'{path}' is no checkpoint but {what}")
    if start.lstrip().startswith(b"{"):
        return _read_index(path)
    raise CheckpointError(f"'{path}' is not a checkpoint: it is neither a PyTorch nor a safetensors file")


def _start(path: Path) -> bytes:
    """Return how the file begins (CheckpointError if it cannot be read, or is empty)."""
    try:
        if path.is_dir():
            raise CheckpointError(f"'{path}' is {what_folder(path)}")
        if path.exists() and not path.is_file():
            raise CheckpointError(f"'{path}' is no regular file: a checkpoint is read from a file")
        with path.open("rb") as file:
            start = file.read(HEAD_BYTES)
    except FileNotFoundError:
        raise CheckpointError(f"there is no checkpoint file '{path}'") from None
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(f"the checkpoint '{path}' cannot be read: {reason}") from None
    if not start:
        raise CheckpointError(f"the checkpoint '{path}' is empty; copy or download it again")
    return start


def _read_torch(path: Path, *, mmap: bool) -> WeightFile:
    """Read what torch.save wrote, with stand-ins for objects of classes that are not known here.

    They are as harmless as all else: nothing is imported or called, and whatever they hold is passed over.
    """
    length = longest_word(path)
    if length is not None:
        raise CheckpointError(
            f"'{path}' is damaged, or no checkpoint: it has a text of {length} characters without a space; "
            "copy or download it again, or save its weights alone, where it was made"
        )
    unread: list[str] = []
    while True:
        try:
            content = _load_torch(path, mmap, unread)
        except Exception as error:  # damaged files make torch raise nearly anything
            code = _GLOBAL.search(str(error))
            if code is None or is_never_read(code[1]) or code[1] in unread or len(unread) == _MOST_UNKNOWN:
                name = unread[0] if unread else code and code[1]
                raise CheckpointError(_why_unread(path, error, mmap, name)) from error
            unread.append(code[1])
        else:
            return WeightFile(content=content, metadata=None, unread=tuple(unread))


def _load_torch(path: Path, mmap: bool, unread: Sequence[str]) -> Any:
    stand_ins: list[Any] = [(type("Unread", (Unread,), {}), name) for name in unread]
    # What torch warns of here (old formats) is dealt with below or of no concern to the user.
    with (
        warnings.catch_warnings(action="ignore"),
        torch.serialization.safe_globals([*_ALLOWED, *stand_ins]),
        path_in_utf8(path) as known,
    ):
        return torch.load(known, map_location="cpu", weights_only=True, mmap=mmap)


def _why_unread(path: Path, error: Exception, mmap: bool, name: str | None) -> str:
    """Say why PyTorch cannot read a file; `name`: of the first class in it that is not known here."""
    if name is not None:
        return refused_class(path, name)
    protocol = newer_protocol(path)
    if protocol is not None:
        return (
            f"'{path}' was saved in pickle protocol {protocol}, and only 2, torch.save's own, is read: "
            "save it again where it was made, with torch.save(torch.load(...), ...)"
        )
    if _NOT_TORCHS in str(error).lower():
        return (
            f"'{path}' is a pickle that torch.save did not write: save its weights with it, as tensors "
            "by name, where it was made"
        )
    if mmap and isinstance(error, pickle.UnpicklingError):  # of a whole archive, whose checksums are right
        return (
            f"'{path}' holds more than weights and plain values, which is not read: save its weights "
            "alone, with torch.save(model.state_dict(), ...), where it was made"
        )
    return f"'{path}' is not a checkpoint, or is truncated or damaged: copy or download it again"


def _read_safetensors(path: Path) -> WeightFile:
    try:
        with path_in_utf8(path) as known, safe_open(known, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            return WeightFile(content=tensors, metadata=file.metadata() or {})
    except (SafetensorError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"'{path}' is not a safetensors file, or is truncated or damaged: copy it again"
        ) from error


def _read_index(path: Path) -> WeightFile:
    """Read all parts of a checkpoint that a JSON index lists: {'weight_map': {tensor: file}}."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        files = sorted(set(content[_INDEX].values()))
        places = [path.parent / Path(name).name for name in files]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(
            f"'{path}' is not a checkpoint but JSON, and no index of weight files: give the weights"
        ) from None
    tensors: dict[str, Any] = {}
    for place in places:
        start = _start(place)
        if start[8:9] != b"{" and start.lstrip().startswith(b"{"):
            raise CheckpointError(f"'{place}', which '{path}' lists, is no part but an index: copy it again")
        part = read_weight_file(place).content
        if not isinstance(part, Mapping):
            raise CheckpointError(f"'{place}', which '{path}' lists, holds no named weights: copy it again")
        tensors |= part
    return WeightFile(content=tensors, metadata=None)


def as_float32(path: Path, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies that do not depend on the file any more (CheckpointError if a value is not finite)."""
    for name, tensor in weights.items():
        extremes = torch.stack(torch.aminmax(tensor))  # much faster than asking every value
        if not torch.isfinite(extremes.float()).all():
            raise CheckpointError(
                f"'{name}' of '{path}' holds infinite or undefined values: "
                f"take a checkpoint from before training diverged"
            )
    return {name: tensor.to(torch.float32, copy=True) for name, tensor in weights.items()}
