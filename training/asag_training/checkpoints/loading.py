"""Loading a checkpoint from a file, which includes finding out which network its weights are."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from asag_deploy.errors import CheckpointError, ConfigError
from asag_training.checkpoints.checkpoint import Checkpoint, select_head
from asag_training.checkpoints.layout import (
    Layout,
    count_heads,
    expected_layout,
    infer_config,
    layout_of,
    mismatch,
)
from asag_training.checkpoints.native import is_native, native_checkpoint
from asag_training.checkpoints.reading import as_float32, named_weights, read_weight_file
from asag_training.network.config import VARIANTS, AsagConfig, default_categories, variant_config

_SETTINGS_IN_ARGS = {
    "activation": "activation",
    "threshold1": "score_high",
    "threshold2": "score_low",
    "use_anchor_threshold": "score_pass",
    "patch_nms_threshold": "patch_nms_iou",
}
"""Options of the public training script that shapes do not show, and our names for them."""


def load_checkpoint(
    path: str | Path, *, variant: str | AsagConfig | None = None, head: str | None = None
) -> Checkpoint:
    """Read a checkpoint: the public layout, a bare state dict, or our own file.

    Without `variant` the file decides: its own settings, or what its shapes and its training options tell.  A
    variant by name is the published one, with as many parallel decoders as the file has; settings are taken
    as they are.  `head` keeps one of the decoders.  Code in the file is never run; weights become float32.

    Raises CheckpointError, which names the first tensors that do not fit and the variant that would, and
    ConfigError for an unknown variant.
    """
    path = Path(path)
    if isinstance(variant, str):
        variant_config(variant)  # refused before a large file is read
    file = read_weight_file(path)
    if is_native(file):
        checkpoint = native_checkpoint(path, file)
        if variant is not None:
            layers = checkpoint.config.decoder_layers
            config = _settle(path, layout_of(checkpoint.state), variant, layers)
            checkpoint = dataclasses.replace(checkpoint, config=config)
    else:
        checkpoint = _public_checkpoint(path, file.content, variant)
    return checkpoint if head is None else select_head(checkpoint, head)


def _public_checkpoint(path: Path, content: Any, variant: str | AsagConfig | None) -> Checkpoint:
    """Read {'model': weights, 'args': options, 'epoch': ...}, or the weights themselves."""
    whole = content if isinstance(content, Mapping) and "model" in content else {"model": content}
    weights = named_weights(path, whole["model"])
    options = _options(whole.get("args"))
    if variant is None:
        config = _infer(path, layout_of(weights), options)
    else:
        config = _settle(path, layout_of(weights), variant)
        if isinstance(variant, str):
            _check_activation(path, config, options)
    epoch = whole.get("epoch")
    return Checkpoint(
        config=config,
        state=as_float32(path, weights),
        categories=default_categories(config),
        epoch=epoch if isinstance(epoch, int) else None,
    )


def _options(args: Any) -> Mapping[str, Any]:
    """Return what the training script was called with, if the file says."""
    if isinstance(args, argparse.Namespace):
        return vars(args)
    return args if isinstance(args, Mapping) else {}


def _infer(path: Path, found: Layout, options: Mapping[str, Any]) -> AsagConfig:
    config = infer_config(found, data_set=options.get("dataset_file"))
    if config is None:
        raise CheckpointError(_why_none_fits(path, found))
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


def _why_none_fits(path: Path, found: Layout) -> str:
    if "conv1.weight" in found and "layer1.0.conv1.weight" in found:
        return f"'{path}' holds a ResNet and no ASAG network: it can only be a backbone's initial weights"
    heads = count_heads(found) or 1
    layouts = {name: expected_layout(config.with_changes(heads=heads)) for name, config in VARIANTS.items()}
    nearest = min(layouts, key=lambda name: len(found.items() ^ layouts[name].items()))
    if layouts[nearest].keys().isdisjoint(found):
        return f"'{path}' holds no ASAG network: none of its weights has a name that such a network has"
    wrong = mismatch(found, layouts[nearest])
    return f"'{path}' holds no network that is whole; the nearest is {nearest}, compared with which: {wrong}"
