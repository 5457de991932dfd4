"""Loading a checkpoint from a file, which includes finding out which network its weights are."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from asag_deploy.bundle.manifest import Category
from asag_deploy.errors import CheckpointError, ConfigError
from asag_deploy.fetching.locate import local_checkpoint
from asag_evaluation.data.coco import COCO_CATEGORIES
from asag_evaluation.data.values import whole_number
from asag_training.checkpoints.checkpoint import CLASSES_UNNAMED, Checkpoint, preparation_assumed, select_head
from asag_training.checkpoints.containers import find_weights, settings_of
from asag_training.checkpoints.layout import (
    Layout,
    count_heads,
    expected_layout,
    infer_config,
    layout_of,
    mismatch,
    nearest_config,
)
from asag_training.checkpoints.native import is_native, native_checkpoint
from asag_training.checkpoints.other_detectors import other_detector
from asag_training.checkpoints.reading import WeightFile, as_float32, read_weight_file
from asag_training.network.config import (
    VARIANTS,
    AsagConfig,
    are_made_up,
    default_categories,
    variant_config,
)
from asag_training.settings import WeightsChoice

_SETTINGS_IN_ARGS = {
    "activation": "activation",
    "threshold1": "score_high",
    "threshold2": "score_low",
    "use_anchor_threshold": "score_pass",
    "patch_nms_threshold": "patch_nms_iou",
}
"""Options of the public training script that shapes do not show, and our names for them."""

_NAMES = re.compile(r"(?:^|(?<=\.))(?=(?:backbone|neck|encoder|anchor_generator|rpn|decoder)\.)")
"""Where the name begins that the network has for a tensor."""
_OF_A_RUN = frozenset(("run", "position", "made"))
"""What else lies beside the weights in a run's `state.pt`."""
_CLASS_KEYS = ("classes", "CLASSES", "class_names", "names", "categories", "id2label")
_OPTIONS = ("args", "hyper_parameters", "hparams", "config", "cfg")
"""Where tools put the settings of a training."""


def load_checkpoint(
    path: str | Path,
    *,
    variant: str | AsagConfig | None = None,
    head: str | None = None,
    weights: WeightsChoice = "model",
) -> Checkpoint:
    """Read a checkpoint: the public layout, a bare state dict, what other tools make of these, or our own.

    Without `variant` the file decides: its own settings, or what its shapes and its training options tell.  A
    variant by name is the published one, with as many parallel decoders as the file has; settings are taken
    as they are.  `head` keeps one of the decoders.  `weights` chooses where a file holds both those that were
    trained and their moving average (EMA).  Code in the file is never run; weights become float32.  `notes`
    and `assumed` of what comes back say which weights were taken, and what the file does not say.

    `path` may be an address, hf:// or http(s)://, from which it is fetched once and kept.

    Raises CheckpointError, which names the first tensors that do not fit and the variant that would, or says
    what the file is, ConfigError for an unknown variant, and DownloadError if it cannot be fetched.
    """
    if isinstance(variant, str):
        variant_config(variant)  # refused before a large file is read
    path = local_checkpoint(path)
    file = read_weight_file(path)
    if is_native(file):
        if weights != "model":
            raise CheckpointError(f"'{path}' holds no averaged weights (EMA), only the model's: take those")
        checkpoint = native_checkpoint(path, file)
        if variant is not None and variant != checkpoint.config.variant:
            layers = checkpoint.config.decoder_layers
            config = _settle(path, layout_of(checkpoint.state), variant, layers)
            notes = _other_settings(checkpoint.config, config) if isinstance(variant, str) else ()
            checkpoint = dataclasses.replace(checkpoint, config=config, notes=checkpoint.notes + notes)
    else:
        checkpoint = _public_checkpoint(path, file, variant, weights)
    return checkpoint if head is None else select_head(checkpoint, head)


def _public_checkpoint(
    path: Path, file: WeightFile, variant: str | AsagConfig | None, choice: WeightsChoice
) -> Checkpoint:
    """Read {'model': weights, 'args': options, 'epoch': ...} or its like, or the weights themselves."""
    content = file.content
    if isinstance(content, Mapping) and content.keys() >= _OF_A_RUN:
        raise CheckpointError(
            f"'{path}' is the state that a training run goes on from with --resume: give last.safetensors or "
            "best.safetensors beside it, which say what the classes are and how images are prepared"
        )
    found = find_weights(path, file, _root, choice)
    layout = layout_of(found.tensors)
    options = settings_of(content, *_OPTIONS)
    notes = found.notes
    if variant is None:
        config = _infer(path, layout, found.names, options)
    else:
        config = _settle(path, layout, variant)
        if isinstance(variant, str):
            _check_activation(path, config, options)
            notes += _other_settings(_with_options(path, config, options), config)
    names = _class_names(content, config.num_classes)
    categories = default_categories(config) if names is None else _categories(names)
    named = names is not None or not are_made_up(categories)
    return Checkpoint(
        config=config,
        state=as_float32(path, found.tensors),
        categories=categories,
        epoch=_epoch(content),
        named=named,
        notes=notes,
        assumed=(preparation_assumed(config), *(() if named else (CLASSES_UNNAMED,))),
    )


def _root(name: str) -> int:
    match = _NAMES.search(name)
    return -1 if match is None else match.start()


def _epoch(content: Any) -> int | None:
    places = (content, content.get("meta")) if isinstance(content, Mapping) else ()
    for place in places:
        epoch = place.get("epoch") if isinstance(place, Mapping) else None
        if isinstance(epoch, (int, np.integer)) and not isinstance(epoch, bool) and epoch >= 0:
            return int(epoch)
    return None


def _class_names(content: Any, count: int) -> tuple[str, ...] | None:
    """Return the names of the classes if the file has so many, under a key that some tool uses."""
    meta = settings_of(content, "meta")
    sets = (settings_of(meta, "dataset_meta"), settings_of(content, "dataset_meta"))
    for place in (content, meta, *sets, settings_of(content, *_OPTIONS)):
        for key in _CLASS_KEYS:
            names = place.get(key) if isinstance(place, Mapping) else None
            names = _in_order(names) if isinstance(names, Mapping) else names
            if not isinstance(names, (list, tuple)) or len(names) != count:
                continue
            if all(isinstance(name, str) and name for name in names):
                return tuple(names)
    return None


def _in_order(names: Mapping[Any, Any]) -> list[Any]:
    """Return names by number in the order of the numbers, which may be text; none if they are no numbers."""
    numbered = {number: name for key, name in names.items() if (number := whole_number(key)) is not None}
    return [numbered[number] for number in sorted(numbered)] if len(numbered) == len(names) else []


def _categories(names: tuple[str, ...]) -> tuple[Category, ...]:
    """Give classes by name ids: COCO's own for its classes, else those in their order."""
    if names == tuple(category.name for category in COCO_CATEGORIES):
        return COCO_CATEGORIES
    return tuple(Category(id=i, name=name) for i, name in enumerate(names))


def _other_settings(said: AsagConfig, config: AsagConfig) -> tuple[str, ...]:
    """Say which settings of a file a variant by name replaces."""
    before, after = said.to_dict(), config.to_dict()
    changed = [
        f"{name} is {after[name]}, not {before[name]}"
        for name in before
        if name != "variant" and before[name] != after[name]
    ]
    return (
        (f"settings are those of {config.variant}, not the file's: {', '.join(changed)}",) if changed else ()
    )


def _infer(path: Path, found: Layout, names: Iterable[str], options: Mapping[str, Any]) -> AsagConfig:
    config = infer_config(found, data_set=options.get("dataset_file"))
    if config is None:
        raise CheckpointError(_why_none_fits(path, found, names))
    return _with_options(path, config, options)


def _with_options(path: Path, config: AsagConfig, options: Mapping[str, Any]) -> AsagConfig:
    """Return the settings with what the public training script was told changed in them."""
    said = {ours: options[theirs] for theirs, ours in _SETTINGS_IN_ARGS.items() if theirs in options}
    try:
        return config.with_changes(**said)
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"the options stored in '{path}' make no network: {error}") from error


def _settle(path: Path, found: Layout, variant: str | AsagConfig, layers: int = 1) -> AsagConfig:
    """Return the wanted settings, once it is certain that the weights are theirs; `layers` a decoder."""
    if isinstance(variant, str):
        config = variant_config(variant)
        heads = count_heads(found) // layers or config.heads
        config = config.with_changes(heads=heads, decoder_layers=layers)
    else:
        config = variant
    wrong = mismatch(found, expected_layout(config))
    if wrong is None:
        return config
    fitting = infer_config(found)
    if fitting is None:
        advice = "no published variant fits it"
    elif fitting.variant in VARIANTS:
        advice = f"it is one of {fitting.variant}"
    else:
        advice = (
            "it is of no published variant, but has a network's settings: leave the variant out to use them"
        )
    raise CheckpointError(f"'{path}' is not a checkpoint of {config.variant} ({wrong}); {advice}")


def _check_activation(path: Path, config: AsagConfig, options: Mapping[str, Any]) -> None:
    trained_with = options.get("activation", config.activation)
    if trained_with != config.activation:
        raise CheckpointError(
            f"'{path}' was trained with activation '{trained_with}', but {config.variant} has "
            f"'{config.activation}': leave the variant out to use the settings in the file"
        )


def _only_a_backbone(path: Path, kind: str) -> str:
    return f"'{path}' holds a {kind} and no ASAG network: it can only be a backbone's initial weights"


def _why_none_fits(path: Path, found: Layout, names: Iterable[str]) -> str:
    if "conv1.weight" in found and "layer1.0.conv1.weight" in found:
        return _only_a_backbone(path, "ResNet")
    if "conv_stem.weight" in found and "blocks.2.0.dw_start.conv.weight" in found:
        return _only_a_backbone(path, "MobileNetV4")
    heads = count_heads(found) or 1
    layouts = {name: expected_layout(config.with_changes(heads=heads)) for name, config in VARIANTS.items()}
    own = nearest_config(found)
    if own is not None:
        layouts[own.variant] = expected_layout(own)
    nearest = min(layouts, key=lambda name: len(found.items() ^ layouts[name].items()))
    lacking = sum(name not in found for name in layouts[nearest])
    other = other_detector(names) if lacking else None
    if other is not None:
        return f"'{path}' holds no ASAG network: by the names of its weights it is {other}"
    if layouts[nearest].keys().isdisjoint(found):
        return f"'{path}' holds no ASAG network: none of its weights has a name that such a network has"
    wrong = mismatch(found, layouts[nearest])
    return f"'{path}' holds no network that is whole; the nearest is {nearest}, compared with which: {wrong}"
