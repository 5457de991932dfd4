"""The state of a run, `state.pt`, which a resumed run takes up, and what makes it the same run."""

from __future__ import annotations

import dataclasses
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from asag_deploy.atomic import atomic_write
from asag_deploy.errors import OutputError, TrainingError
from asag_deploy.typed_json import read_fields
from asag_evaluation.data.coco import CocoDataset
from asag_training.checkpoints.pickles import longest_word

LAST, BEST, STATE = "last.safetensors", "best.safetensors", "state.pt"


@dataclass(frozen=True, kw_only=True)
class Position:
    """The progress of a run."""

    epoch: int = 0
    """The epoch that is under way, or comes next."""
    update: int = 0
    """Updates done in it."""
    step: int = 0
    """Updates done in all."""
    evaluated: int = 0
    """Epochs that were done when the network was last evaluated."""
    best: float = -1.0
    """The best AP so far; -1 before there is one."""
    best_on: str | None = None
    """What that was measured on, in words."""


def write_file(path: Path, content: Mapping[str, Any]) -> None:
    """Write what `torch.save` can, wholly or not at all (OutputError if that fails)."""
    with atomic_write(path) as temporary:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:  # what torch makes of a full disk
            raise OutputError(f"could not write '{path}': is the disk full?") from error


def write_state(
    folder: Path, identity: Mapping[str, Any], position: Position, parts: Mapping[str, Any]
) -> None:
    """Write `state.pt`; parts: by name, the states of network, optimiser and the like."""
    write_file(folder / STATE, {"run": identity, "position": asdict(position), **parts})


@contextmanager
def reading_state(
    folder: Path, identity: Mapping[str, Any], defaults: Mapping[str, Any], device: torch.device
) -> Iterator[dict[str, Any]]:
    """Read `state.pt`, which the body takes up.

    identity: of this run; defaults: of the settings in it, for those that a release added after the run was
    saved.  Raises TrainingError if it is another run's, or if it is damaged, the body finding so included.
    """
    path = folder / STATE
    try:
        if longest_word(path) is not None:
            raise ValueError("a text that no run has saved")
        with warnings.catch_warnings(action="ignore"):  # what torch warns of is damage
            state = torch.load(path, map_location=device, weights_only=True)
        other = differences(state["run"], identity, defaults)
        if not other:
            yield state
            return
    except Exception as error:  # a damaged file makes torch raise nearly anything
        raise TrainingError(
            f"cannot resume from '{path}', which is damaged ({type(error).__name__}): start anew in "
            f"another output folder, from {LAST} with --init"
        ) from error
    raise TrainingError(
        f"'{folder}' holds another run ({other[0]}): resume it with the options it was started with, or give "
        "another output folder"
    )


def is_of_asag_train(content: object) -> bool:
    """Return whether the content of a `recipe.json` is that of a run of `asag-train`."""
    return isinstance(content, dict) and content.keys() >= {"network", "schedule", "seed"}


def is_of_train_peer(content: object) -> bool:
    """Return whether the content of a `recipe.json` is that of a run of `asag-bench train-peer`."""
    return isinstance(content, dict) and content.keys() >= {"recipe", "categories", "seed"}


def position_in(folder: Path) -> Position | None:
    """Return how far the run in a folder has come; None if nothing there tells, or can be read."""
    path = folder / STATE
    try:
        if longest_word(path) is not None:
            return None
        with warnings.catch_warnings(action="ignore"):
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        position: Position = read_fields(Position, state["position"])
    except Exception:  # a damaged file makes torch raise nearly anything
        return None
    return position


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by their whole names, e.g. `schedule.epochs`."""
    named: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            named |= flat(value, f"{prefix}{name}.")
        else:
            named[prefix + name] = value
    return named


def default_settings(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Return by whole name the default of every setting in nested dataclasses that has one."""
    named: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            named |= default_settings(value, f"{prefix}{field.name}.")
        elif field.default is not dataclasses.MISSING:
            named[prefix + field.name] = field.default
    return named


def data_in_words(dataset: CocoDataset, orientation: str) -> str:
    """Say what there is to train on: images, objects, a checksum of all that is annotated, and how images
    are turned."""
    value = 0
    for record in dataset.records:
        size = np.array([record.image_id, record.height, record.width], dtype=np.int64)
        for array in (size, record.boxes, record.labels):
            value = zlib.crc32(np.ascontiguousarray(array).data, value)
    found = f"{dataset.counts.images} images with {dataset.counts.objects} objects"
    return f"{found} (checksum {value:08x}, orientation {orientation})"


def differences(saved: Mapping[str, Any], own: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """Say in words where a saved run is another than this one.

    Settings that a release added after the run was saved had their default then.
    """
    before = {name: saved.get(name, defaults.get(name)) for name in {**own, **saved}}
    names = [name for name, value in before.items() if value != own.get(name)]
    return [f"its {name} is {before[name]}, not {own.get(name)}" for name in names]
