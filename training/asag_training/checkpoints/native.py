"""Our own checkpoint: a .safetensors file that carries its settings and classes in the metadata."""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import save
from torch import Tensor

from asag_deploy._version import __version__
from asag_deploy.atomic import atomic_write
from asag_deploy.bundle.manifest import Category, Preprocessing
from asag_deploy.errors import CheckpointError, FieldError
from asag_deploy.typed_json import read_fields
from asag_training.checkpoints.checkpoint import CLASSES_UNNAMED, Checkpoint, preparation_assumed
from asag_training.checkpoints.reading import WeightFile, as_float32
from asag_training.network.config import AsagConfig, are_made_up
from asag_training.settings import check_preprocessing

FORMAT_VERSION = 1
_VERSION_KEY = "asag_format_version"
_METADATA = "__metadata__"
_LONGEST_HEADER = 100_000_000
"""Bytes, as safetensors has it."""


def save_checkpoint(path: str | Path, checkpoint: Checkpoint, *, half: bool = False) -> None:
    """Write the checkpoint to `path`, wholly or not at all; with `half` rounded to float16.

    Raises OutputError when it cannot be written; a file that was there before is then untouched.
    """
    stored = torch.float16 if half else torch.float32
    state = {
        name: tensor.detach().to("cpu", stored).clone(memory_format=torch.contiguous_format)
        for name, tensor in checkpoint.state.items()
    }
    with atomic_write(path) as unfinished:
        # Not safetensors' own save_file, which leaves a file that only its owner can read.
        unfinished.write_bytes(_ordered(save(state, _metadata(checkpoint, state))))


def _ordered(content: bytes) -> bytes:
    """Return a safetensors file with its metadata in order, so that equal checkpoints are equal files;
    safetensors itself puts them in another order every time."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header[_METADATA] = dict(sorted(header[_METADATA].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join((len(text).to_bytes(8, "little"), text, memoryview(content)[end:]))


def is_native(file: WeightFile) -> bool:
    """Return whether the file was written by `save_checkpoint`."""
    return file.metadata is not None and _VERSION_KEY in file.metadata


def is_native_file(path: Path) -> bool:
    """Return whether a file, of whatever kind, was written by `save_checkpoint`."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        start = file.read(min(length, _LONGEST_HEADER))
    try:
        header = json.loads(start)
    except (ValueError, RecursionError):
        return False
    metadata = header.get(_METADATA) if isinstance(header, dict) else None
    return isinstance(metadata, dict) and _VERSION_KEY in metadata


def native_checkpoint(path: Path, file: WeightFile) -> Checkpoint:
    """Return the checkpoint that a file of ours holds (CheckpointError if it is damaged or of a newer
    release)."""
    metadata = file.metadata or {}
    version = metadata[_VERSION_KEY]
    if version.isdecimal() and int(version) > FORMAT_VERSION:
        raise CheckpointError(
            f"'{path}' was written by a newer release (format {version}, this one reads {FORMAT_VERSION}): "
            f"upgrade asag-deploy"
        )
    try:
        if int(version) < 1:
            raise ValueError(f"there is no format {version}")
        if _checksum(file.content) != metadata["checksum"]:
            raise ValueError("the weights are not those that were saved")
        said = _read_metadata(metadata)
        named = not are_made_up(said.categories)
        assumed = (
            said.preprocessing is None and preparation_assumed(said.config),
            not named and CLASSES_UNNAMED,
        )
        return Checkpoint(
            config=said.config,
            state=as_float32(path, file.content),
            categories=said.categories,
            trained=said.trained,
            head=said.head,
            epoch=said.epoch,
            preprocessing=said.preprocessing,
            named=named,
            assumed=tuple(sentence for sentence in assumed if sentence),
        )
    except (KeyError, TypeError, ValueError, RecursionError, FieldError, CheckpointError) as error:
        raise CheckpointError(f"'{path}' is damaged ({error}): copy it again") from error


@dataclass(frozen=True, kw_only=True)
class _Metadata:
    """The metadata beside the weights: an entry of JSON for each field."""

    config: AsagConfig
    categories: tuple[Category, ...]
    trained: bool
    head: str | None
    epoch: int | None
    preprocessing: Preprocessing | None


def _read_metadata(metadata: Mapping[str, str]) -> _Metadata:
    """Read the entries strictly; settings that this release added since have their default."""
    entries = {"preprocessing": "null", **metadata}
    values = {field.name: json.loads(entries[field.name]) for field in dataclasses.fields(_Metadata)}
    defaults = {
        field.name: field.default
        for field in dataclasses.fields(AsagConfig)
        if field.default is not dataclasses.MISSING
    }
    values["config"] = {**defaults, **values["config"]}
    said = cast(_Metadata, read_fields(_Metadata, values))
    if said.preprocessing is not None:
        check_preprocessing(said.preprocessing)
    return said


def _metadata(checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> dict[str, str]:
    return {
        _VERSION_KEY: str(FORMAT_VERSION),
        "producer": f"asag-deploy {__version__}",
        "config": json.dumps(checkpoint.config.to_dict()),
        "categories": json.dumps([dataclasses.asdict(category) for category in checkpoint.categories]),
        "heads": json.dumps(checkpoint.head_names),
        "head": json.dumps(checkpoint.head),
        "trained": json.dumps(checkpoint.trained),
        "epoch": json.dumps(checkpoint.epoch),
        "preprocessing": json.dumps(
            checkpoint.preprocessing and dataclasses.asdict(checkpoint.preprocessing)
        ),
        "checksum": _checksum(state),
    }


def _checksum(state: Mapping[str, Tensor]) -> str:
    """Return the CRC-32 over the tensors by name; safetensors itself would not notice an altered byte."""
    value = 0
    for name in sorted(state):
        value = zlib.crc32(state[name].contiguous().numpy().data, value)
    return f"{value:08x}"
