"""Finding a network's weights in what another tool saved: the right one of its dictionaries, and their names.

Tools put weights under a key of their own choosing (`model`, `state_dict`, ...), put wrappers' names before
or between those of the tensors (`module.`, `_orig_mod.`), and keep averaged weights (EMA) beside the others.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from asag_deploy.errors import CheckpointError, ConfigError, first_line, plural
from asag_training.checkpoints.pickles import refused_class
from asag_training.checkpoints.reading import WeightFile
from asag_training.settings import WEIGHTS_CHOICES, WeightsChoice

_DEEPEST = 4
"""Dictionaries within dictionaries are looked into so far."""
_IN_A_LIST = 16
"""Lists of so many at most: of the states of a network and its optimiser."""
_NEVER_WEIGHTS = ("optimizer", "optim", "scheduler", "scaler", "args", "hyper_parameters", "loops")
_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.|(?<=\.)module\."
)
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_AVERAGED = frozenset(("ema", "averaged", "average", "avg", "swa", "teacher", "shadow", "polyak"))
"""Words in the name of an average: `model_ema`, `emaModel`, `ema-model`."""
_MMCV = "ema_"
"""What mmcv puts before names, whose points it makes underscores."""
_AVERAGED_MODEL, _HOW_MANY = "module.", "n_averaged"
"""What torch.optim.swa_utils puts before names, and has beside them."""
_COUNTERS = ("num_batches_tracked", "_extra_state", "total_ops", "total_params")
"""What PyTorch, and thop where it has counted operations, keep in modules beside their weights."""
_STATISTICS = ("running_mean", "running_var")
_USUAL = (((), ""), (("model",), ""))
"""Where the public training script and a bare state dict have the weights."""
_NAMED = 3

Root = Callable[[str], int]
"""Says at which character of a tensor's name the network's own name for it begins; -1 if at none."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The weights of a network, as they were found in a file."""

    tensors: Mapping[str, Tensor]
    """By the network's own names; floating point, but for what has no business there."""
    names: tuple[str, ...]
    """The names of all that lay beside them, as the file has them."""
    notes: tuple[str, ...] = ()
    """Sentences about what else there was, and what was done."""


@dataclass(frozen=True)
class _Group:
    """Tensors of one dictionary that have the same words before their names."""

    keys: tuple[str, ...]
    """Of the dictionaries, from the outermost."""
    prefix: str
    tensors: Mapping[str, Any]
    names: tuple[str, ...]
    swapped: bool = False
    """Whether it is averaged if its name says that it is not, and the other way round."""
    counted: bool = False
    """Whether a number beside it says of how many it is the average."""

    @property
    def averaged(self) -> bool:
        return (self.counted or _is_average(".".join((*self.keys, self.prefix)))) != self.swapped

    @property
    def name(self) -> str:
        """What a message calls it."""
        key = ".".join(self.keys)
        names = f"names that begin with '{self.prefix}'" if self.prefix else ""
        return (
            " under ".join(part for part in (names, f"'{key}'" if key else "") if part) or "the file itself"
        )


def find_weights(path: Path, file: WeightFile, root: Root, choice: WeightsChoice = "model") -> Weights:
    """Return the weights in what a file holds, under the network's own names.

    root: knows the network's names.  choice: which of those that were trained and their average (EMA) to
    take, where there are both; where there is one it is taken whatever it is.

    Raises CheckpointError where there are no weights, or no average where one is asked for.
    """
    if choice not in WEIGHTS_CHOICES:
        raise ConfigError(f"unknown weights '{choice}'; choose {' or '.join(WEIGHTS_CHOICES)}")
    try:
        return _find_weights(path, file, root, choice)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise CheckpointError(
            f"'{path}' holds tensors of a kind that cannot be read ({first_line(error)}): save its weights "
            "as plain float32 tensors, where it was made"
        ) from error


def _find_weights(path: Path, file: WeightFile, root: Root, choice: WeightsChoice) -> Weights:
    content = file.content
    swapped = _swapped(content)
    groups = [
        dataclasses.replace(group, swapped=group.swapped or group.keys[:1] in swapped)
        for keys, found in _dictionaries(content, ())
        for group in _split(keys, found, root)
    ]
    if not groups and file.unread:
        raise CheckpointError(refused_class(path, file.unread[0]))
    if not groups:
        raise CheckpointError(f"'{path}' is not a checkpoint: it holds no named weights{_instead(content)}")
    known = [group for group in groups if any(root(name) >= 0 for name in group.tensors)] or groups
    plain = _largest([group for group in known if not group.averaged])
    average = _largest([group for group in known if group.averaged])
    nameless = None if average is not None else _nameless_average(content, ())
    if choice == "ema" and average is None:
        if nameless is not None:
            raise CheckpointError(
                f"'{path}' {nameless}: give the model those, where it was made, and save it"
            )
        raise CheckpointError(
            f"'{path}' holds no averaged weights (EMA) but those of {plain and plain.name}: take the model's"
        )
    taken = average if plain is None or (choice == "ema" and average is not None) else plain
    assert taken is not None, "there is a group, and it is averaged or not"
    beside = plain if taken is average else average
    notes = []
    if file.unread:
        others = f" and {len(file.unread) - 1} other kinds" if len(file.unread) > 1 else ""
        notes.append(f"objects of {file.unread[0]}{others} were passed over, for no code in a file is run")
    if taken is average:
        notes.append(f"averaged weights (EMA) were taken, from {taken.name}")
    elif (taken.keys, taken.prefix) not in _USUAL:
        notes.append(f"weights were taken from {taken.name}")
    rivals = [
        each.name
        for each in known
        if each.averaged == taken.averaged and each is not taken and len(each.tensors) == len(taken.tensors)
    ]
    if rivals:
        notes.append(f"weights are not those of {' or '.join(rivals)}, which holds as many as {taken.name}")
    if beside is not None:
        other = "averaged weights (EMA)" if beside is average else "weights"
        notes.append(
            f"there are {other} too, in {beside.name}: `--weights {'ema' if beside is average else 'model'}` "
            "takes them"
        )
    if nameless is not None:
        notes.append(f"it {nameless}")
    found = dict(taken.tensors)
    if beside is not None:
        lacking = {
            name: value
            for name, value in beside.tensors.items()
            if name not in found and name.endswith(_STATISTICS)
        }
        if lacking:
            found |= lacking
            one, other = ("average", "model") if taken is average else ("model", "average")
            taken_over = plural(len(lacking), "tensor is", "tensors are")
            notes.append(f"the {one} has no BatchNorm statistics, so {taken_over} the {other}'s")
    tensors, more = _as_tensors(path, found)
    return Weights(tensors=tensors, names=taken.names, notes=(*notes, *more))


def _swapped(content: Any) -> tuple[tuple[str, ...], ...]:
    """Return the keys of dictionaries that hold the average if their names do not say so, and the reverse.

    Some tools put the average where everybody looks for weights, and those that were trained beside it:
    Lightning's WeightAveraging, and OpenMMLab's EMAHook, which calls them `ema_state_dict`.
    """
    if not isinstance(content, Mapping):
        return ()
    if {"state_dict", "current_model_state", "averaging_state"} <= content.keys():
        return (("state_dict",),)
    meta = content.get("meta")
    is_openmmlab = isinstance(meta, Mapping) and "mmengine_version" in meta
    return (("state_dict",), ("ema_state_dict",)) if is_openmmlab and "ema_state_dict" in content else ()


def settings_of(content: Any, *names: str) -> Mapping[str, Any]:
    """Return the first dictionary of settings that a container has under one of these names, or nothing."""
    if isinstance(content, Mapping):
        for name in names:
            value = content.get(name)
            found = value if isinstance(value, Mapping) else getattr(value, "__dict__", None)
            if found:
                inner = found.get("args")
                return inner if isinstance(inner, Mapping) else getattr(inner, "__dict__", None) or found
    return {}


def _dictionaries(content: Any, keys: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """Yield every dictionary that holds tensors by name, outermost first."""
    if isinstance(content, (list, tuple)) and len(content) <= _IN_A_LIST:
        content = {str(place): value for place, value in enumerate(content) if isinstance(value, Mapping)}
    if not isinstance(content, Mapping) or len(keys) > _DEEPEST:
        return
    if any(isinstance(name, str) and _is_weight(value) for name, value in content.items()):
        yield keys, content
    for name, value in content.items():
        if isinstance(value, (Mapping, list, tuple)) and not str(name).lower().startswith(_NEVER_WEIGHTS):
            yield from _dictionaries(value, (*keys, str(name)))


def _nameless_average(content: Any, keys: tuple[str, ...]) -> str | None:
    """Say where averaged weights are that are a list, as some tools keep them; None if there are none."""
    if not isinstance(content, Mapping) or len(keys) > _DEEPEST:
        return None
    for name, value in content.items():
        within = (*keys, str(name))
        listed = isinstance(value, (list, tuple)) and value and all(map(_is_weight, value))
        if listed and _is_average(".".join(within)):
            return (
                f"has averaged weights (EMA) in '{'.'.join(within)}', which are a list without names and "
                "cannot be taken"
            )
        found = _nameless_average(value, within)
        if found is not None:
            return found
    return None


def _is_weight(value: Any) -> bool:
    return (isinstance(value, Tensor) or (isinstance(value, np.ndarray) and value.dtype.kind in "fiu")) and (
        value.ndim > 0
    )


def _split(keys: tuple[str, ...], found: Mapping[str, Any], root: Root) -> list[_Group]:
    """Group tensors by what stands before the network's own names; the others are one if there is none."""
    groups: dict[str, dict[str, Any]] = {}
    others: dict[str, Any] = {}
    for full, value in found.items():
        if not isinstance(full, str) or full.endswith(_COUNTERS):
            continue
        name = _WRAPPERS.sub("", full)
        start = root(name)
        if start < 0:
            others[name] = value
        elif isinstance(value, (Tensor, np.ndarray)):
            groups.setdefault(name[:start], {})[name[start:]] = value
    names = tuple(map(str, found))
    if not groups:
        weights = {name: value for name, value in others.items() if _is_weight(value)}
        return [_Group(keys, "", weights, names)] if weights else []
    split = []
    for prefix, tensors in groups.items():
        beside = _before_the_average(prefix, tensors, others)
        swapped = bool(beside)
        split.append(_Group(keys, prefix, tensors, names, swapped, _is_counted(prefix, found)))
        split += [_Group(keys, _MMCV, beside, names, swapped)] if beside else []
    return split


def _before_the_average(
    prefix: str, tensors: Mapping[str, Any], others: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Return the weights that were trained where mmcv has put the average in their place."""
    flat = {name: _MMCV + (prefix + name).replace(".", "_") for name in tensors}
    return {name: others[other] for name, other in flat.items() if other in others}


def _is_average(name: str) -> bool:
    return not _AVERAGED.isdisjoint(word.lower() for word in _WORD.findall(name))


def _is_counted(prefix: str, found: Mapping[str, Any]) -> bool:
    return prefix.endswith(_AVERAGED_MODEL) and prefix.removesuffix(_AVERAGED_MODEL) + _HOW_MANY in found


def _largest(groups: list[_Group]) -> _Group | None:
    return max(groups, key=lambda group: len(group.tensors), default=None)


def _as_tensors(path: Path, found: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[str]]:
    """Return what can be computed with, in float32 where it was in a type that nothing computes in."""
    tensors, narrow = {}, dict[str, None]()
    for name, value in found.items():
        tensor = _as_tensor(path, name, value)
        if tensor.is_floating_point() and tensor.dtype.itemsize < 2:
            narrow[_type(tensor)] = None
            tensor = tensor.float()
        elif tensor.is_quantized:
            narrow[_type(tensor)] = None
            tensor = tensor.dequantize()
        if not tensor.is_floating_point():
            raise CheckpointError(
                f"'{path}' is not a checkpoint of weights: '{name}' is no floating point tensor but "
                f"{_type(tensor)}"
            )
        tensors[name] = tensor.detach()
    said = [f"weights in {' and '.join(narrow)} were made float32; what their few digits lost stays lost"]
    return tensors, said if narrow else []


def _as_tensor(path: Path, name: str, value: Any) -> Tensor:
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(value, value.dtype.newbyteorder("=")))
    tensor: Tensor = value
    if tensor.is_nested:
        raise CheckpointError(f"'{path}' is not a checkpoint of weights: '{name}' is a nested tensor")
    if tensor.is_meta:
        raise CheckpointError(
            f"'{path}' holds the shapes of weights but no values ('{name}' is a meta tensor)"
        )
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    return tensor


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _instead(content: Any) -> str:
    """Say what a container has, where it has no weights."""
    if isinstance(content, Mapping) and content:
        names = [str(name) for name in content]
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        return f", only {', '.join(names[:_NAMED])}{more}"
    return "" if isinstance(content, Mapping) else f", only a {type(content).__name__}"
