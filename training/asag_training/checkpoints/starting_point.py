"""Starting a training run from a checkpoint: of the same classes, of some of them, or of none.

What depends on the classes are a few last layers, one row for each.  The rows of classes that both know by
name are taken over, wherever they stand; the others begin as they do in a new network.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from asag_deploy.bundle.manifest import Category
from asag_deploy.errors import CheckpointError, plural
from asag_training.checkpoints.checkpoint import Checkpoint
from asag_training.checkpoints.layout import differences, expected_layout, layout_of
from asag_training.network.config import AsagConfig
from asag_training.network.model import Asag

_DECODER = re.compile(r"(decoder\.(?:bbox_head|head_series|layers)\.)(\d+)(\..+)")
_EMBEDDING = "decoder.decoder_embedding.weight"
_MANY = 6
"""So many names are listed in a sentence."""


def start_from(
    model: Asag, categories: Sequence[Category], checkpoint: Checkpoint, path: str | Path
) -> tuple[str, ...]:
    """Give a new network what a checkpoint, loaded from `path`, has for it; return sentences about that.

    model: freshly initialised, for as many classes as `categories`.  Raises CheckpointError where anything
    but classes and the number of parallel decoders differs, with the settings that would make it fit.
    """
    config, notes = model.config, list[str]()
    state = _with_decoders(checkpoint, config, notes)
    by_class = class_layers(config)
    found = {name: shape for name, shape in layout_of(state).items() if name not in by_class}
    expected = {name: shape for name, shape in expected_layout(config).items() if name not in by_class}
    wrong = differences(found, expected)
    if wrong is not None or not by_class <= state.keys():
        raise CheckpointError(_why_it_does_not_fit(path, checkpoint, config, wrong))
    rows = _rows(categories, checkpoint)
    own = model.state_dict()
    with torch.no_grad():
        for name, tensor in own.items():
            if name not in by_class:
                tensor.copy_(state[name])
                continue
            for label, before in rows.items():
                tensor[label] = state[name][before]
    taken = [tensor for name, tensor in state.items() if name not in by_class]
    notes.append(
        f"{len(taken)} of {len(own)} tensors ({sum(t.numel() for t in taken) / 1e6:.2f} million numbers) of "
        f"{checkpoint.config.variant} are taken as they are"
    )
    notes.append(_about_classes(categories, checkpoint, rows, by_class))
    return tuple(notes)


def class_layers(config: AsagConfig) -> frozenset[str]:
    """Return the names of the tensors that have a row for each class."""
    other = expected_layout(config.with_changes(num_classes=config.num_classes + 1))
    return frozenset(name for name, shape in expected_layout(config).items() if other[name] != shape)


def _with_decoders(checkpoint: Checkpoint, config: AsagConfig, notes: list[str]) -> Mapping[str, Tensor]:
    """Return the checkpoint's weights with as many parallel decoders as `config` has."""
    layers = config.decoder_layers
    names = checkpoint.head_names
    if checkpoint.config.decoder_layers != layers or len(names) == config.heads:
        return checkpoint.state
    source = [names.index(head) if head in names else len(names) - 1 for head in config.head_names]
    state: dict[str, Tensor] = {}
    for name, tensor in checkpoint.state.items():
        match = _DECODER.fullmatch(name)
        if name == _EMBEDDING:
            state[name] = torch.cat([tensor[at * layers : (at + 1) * layers] for at in source])
        elif match is None:
            state[name] = tensor
        else:
            at, layer = divmod(int(match[2]), layers)
            for index, wanted in enumerate(source):
                if wanted == at:
                    state[f"{match[1]}{index * layers + layer}{match[3]}"] = tensor
    pairs = [f"{head} from {names[at]}" for head, at in zip(config.head_names, source, strict=True)]
    notes.append(f"of the decoders, {', '.join(pairs)}")
    return state


def _rows(categories: Sequence[Category], checkpoint: Checkpoint) -> dict[int, int]:
    """Return by label the label that a class has in the checkpoint, for those it knows."""
    before = checkpoint.categories
    if not checkpoint.named:
        same = len(before) == len(categories)
        return {label: label for label in range(len(before))} if same else {}
    known: dict[str, list[int]] = {}
    for label, category in enumerate(before):
        known.setdefault(_spelled(category.name), []).append(label)
    wanted = [_spelled(category.name) for category in categories]
    return {
        label: known[name][0]
        for label, name in enumerate(wanted)
        if len(known.get(name, ())) == 1 and wanted.count(name) == 1
    }


def _spelled(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


def _about_classes(
    categories: Sequence[Category], checkpoint: Checkpoint, rows: Mapping[int, int], layers: frozenset[str]
) -> str:
    count = len(categories)
    modules = sorted({name.rpartition(".")[0] for name in layers})
    where = f"the class layers ({_listed(modules)})"
    if not checkpoint.named and rows:
        return (
            f"{where} are taken too: the file does not name its classes, and its {count} are taken for yours"
        )
    if len(rows) == count and all(label == before for label, before in rows.items()):
        same = len(checkpoint.categories) == count
        return (
            f"{where} are taken too{'' if same else f', without the rows of other classes than your {count}'}"
        )
    new = [category.name for label, category in enumerate(categories) if label not in rows]
    kept = [category.name for label, category in enumerate(categories) if label in rows]
    if not kept:
        return f"{where} begin anew, for the {plural(count, 'class')} {_listed(new)}"
    begins = f"; those of {_listed(new)} begin anew" if new else ""
    of = plural(len(kept), "class")
    return f"{where} keep the rows of the {of} of the same name ({_listed(kept)}){begins}"


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _MANY
    return ", ".join(names[:_MANY]) + (f" and {more} more" if more > 0 else "")


def _why_it_does_not_fit(
    path: str | Path, checkpoint: Checkpoint, config: AsagConfig, wrong: str | None
) -> str:
    theirs, ours = checkpoint.config.to_dict(), config.to_dict()
    changes = [
        f"--set network.{name}={'null' if theirs[name] is None else theirs[name]}"
        for name in _IN_SHAPES
        if theirs[name] != ours[name]
    ]
    advice = "give the recipe it was trained by"
    if changes:
        advice = f"give the recipe of that network, or {' '.join(changes)}"
    where = "" if wrong is None else f" ({wrong})"
    return (
        f"'{path}' is not a checkpoint of {config.variant} as the recipe has it, but of "
        f"{checkpoint.config.variant}: {advice}{where}"
    )


_IN_SHAPES = (
    *("decoder", "backbone", "backbone_depth", "backbone_width", "separable_neck", "finest_map"),
    *("decoder_layers", "hidden_dim", "ffn_dim"),
    *("attention_heads", "in_points", "out_points", "groups", "dynamic_dim", "patch_size", "compress_dim"),
    *("box_layers", "encoder_layers", "deformable_points", "deformable_ffn_dim"),
    *("first_level_size", "first_level_anchors", "patch_anchors"),
)
"""Settings that decide which weights a network has, its classes and parallel decoders apart."""
