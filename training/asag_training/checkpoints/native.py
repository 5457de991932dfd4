"""Our own checkpoint: a .safetensors file that carries its settings and classes in the metadata."""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from asag_deploy._version import __version__
from asag_deploy.atomic import atomic_write
from asag_deploy.bundle.manifest import Category, Preprocessing
from asag_deploy.errors import CheckpointError, ConfigError
from asag_training.checkpoints.checkpoint import Checkpoint
from asag_training.checkpoints.reading import WeightFile, as_float32
from asag_training.network.config import AsagConfig

FORMAT_VERSION = 1
_VERSION_KEY = "asag_format_version"


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
        unfinished.write_bytes(save(state, _metadata(checkpoint, state)))


def is_native(file: WeightFile) -> bool:
    """Whether the file was written by `save_checkpoint`."""
    return file.metadata is not None and _VERSION_KEY in file.metadata


def native_checkpoint(path: Path, file: WeightFile) -> Checkpoint:
    """The checkpoint a file of ours holds (CheckpointError if it is damaged or of a newer release)."""
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
        return Checkpoint(
            config=_config(json.loads(metadata["config"])),
            state=as_float32(path, file.content),
            categories=tuple(
                Category(id=int(c["id"]), name=str(c["name"])) for c in json.loads(metadata["categories"])
            ),
            trained=bool(json.loads(metadata["trained"])),
            head=json.loads(metadata["head"]),
            epoch=json.loads(metadata["epoch"]),
            preprocessing=_preprocessing(json.loads(metadata.get("preprocessing", "null"))),
        )
    except (KeyError, TypeError, ValueError, ConfigError, CheckpointError) as error:
        raise CheckpointError(f"'{path}' is damaged ({error}): copy it again") from error


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
    """CRC-32 over the tensors by name; safetensors itself would not notice an altered byte."""
    value = 0
    for name in sorted(state):
        value = zlib.crc32(state[name].contiguous().numpy().data, value)
    return f"{value:08x}"


def _preprocessing(values: Mapping[str, Any] | None) -> Preprocessing | None:
    if values is None:
        return None
    mean, std = (tuple(float(v) for v in values[name]) for name in ("mean", "std"))
    sides = {name: int(values[name]) for name in ("shorter_side", "longer_side", "size_divisor")}
    if len(mean) != 3 or len(std) != 3 or min(*sides.values(), *std) <= 0:
        raise ValueError("its image sizes, mean or std are not possible")
    return Preprocessing(mean=mean, std=std, **sides)


_JSON_TYPES: dict[Any, tuple[type, ...]] = {
    "bool": (bool,),
    "int": (int,),
    "int | None": (int, type(None)),
    "float": (int, float),
    "float | None": (int, float, type(None)),
}


def _config(values: Mapping[str, Any]) -> AsagConfig:
    """The settings; those that this release added since have their default."""
    for field in dataclasses.fields(AsagConfig):
        if field.name in values and type(values[field.name]) not in _JSON_TYPES.get(field.type, (str,)):
            raise TypeError(f"setting {field.name} is {values[field.name]!r}")
    return AsagConfig(**values)
