"""Sweeps: a checkpoint under several settings that change none of its weights (paper, tables 5b, 5d and 6).

The maps that the backbone, the neck and the encoder compute are the same under all of them.  So every image
goes through all settings before the next, and its maps are computed once for several.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from asag_deploy.bundle.manifest import Level
from asag_deploy.detector_options import DetectorOptions
from asag_deploy.errors import ConfigError
from asag_evaluation.data.coco import CocoDataset
from asag_evaluation.evaluate import Evaluation, evaluate_together
from asag_evaluation.predictor import Predictor
from asag_training.checkpoints import Checkpoint
from asag_training.evaluation.checkpoint_predictor import network_predictor
from asag_training.network.config import AsagConfig
from asag_training.network.model import Asag
from asag_training.settings import apply_changes

SWEPT = (
    "score_low",
    "score_high",
    "score_pass",
    "patch_nms_iou",
    "anchor_floor",
    "anchor_cap",
    "min_anchor_side",
    "max_patches",
    "replace_anchors",
    "detection_nms_iou",
    "max_detections",
)
"""The settings that can be swept: they decide what is probed, passed on and kept, and no weight's shape."""
MOST = 256
"""Combinations at most."""
_TOGETHER = 8
"""Combinations that share the maps of an image: the detections of all of them are kept until the end."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to run a network: with other settings than its own, or with a manual stop (paper, table 2)."""

    changes: Mapping[str, Any] = field(default_factory=dict)
    """Values by the names of settings, as JSON has them."""
    max_level: Level | None = None

    def settings_of(self, config: AsagConfig) -> AsagConfig:
        """Return the network's settings so changed (ConfigError for what makes no sense)."""
        return apply_changes(config, [f"{name}={json.dumps(value)}" for name, value in self.changes.items()])


def read_ways(changes: Sequence[str], config: AsagConfig) -> list[Way]:
    """Read `--set NAME=VALUE,VALUE,...`, given once for each setting, as all combinations of the values.

    The last setting varies fastest.  Raises ConfigError for a setting that cannot be swept, or that is given
    twice, for values that make no sense in this network, and for too many combinations.
    """
    values: dict[str, list[Any]] = {}
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals:
            raise ConfigError(f"cannot read --set '{change}': expected NAME=VALUE,VALUE,...")
        if name not in SWEPT:
            raise ConfigError(
                f"--set cannot change '{name}' of a network that is trained: what changes no weight is "
                f"{', '.join(SWEPT)}"
            )
        if name in values:
            raise ConfigError(f"--set {name} is given twice: give all its values at once, with commas")
        values[name] = [_read(name, part) for part in text.split(",")]
    count = 1
    for of_setting in values.values():
        count *= len(of_setting)
    if count > MOST:
        raise ConfigError(f"--set asks for {count} combinations of settings, of which {MOST} are the most")
    ways = [
        Way(changes=dict(zip(values, chosen, strict=True))) for chosen in itertools.product(*values.values())
    ]
    for way in ways:
        way.settings_of(config)
    return ways


def _read(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ConfigError(f"cannot read --set {name}: '{text}' is no number, true, false or null") from None


def evaluate_ways(
    checkpoint: Checkpoint,
    ways: Sequence[Way],
    dataset: CocoDataset,
    *,
    options: DetectorOptions | None = None,
    batch: int = 1,
    device: str = "cpu",
    on_image: Callable[[], object] = lambda: None,
) -> Iterator[tuple[Way, Evaluation]]:
    """Yield each way with its figures, in order, some at a time as they are measured.

    options: the mode, and the manual stop where a way has none; what else they hold is not looked at.
    on_image: called for each image and way.  The times in the figures tell nothing.
    Raises ConfigError for settings or a stop that make no sense, DataError for data that cannot be read.
    """
    for first in range(0, len(ways), _TOGETHER):
        group = ways[first : first + _TOGETHER]
        memory = _Memory()
        predictors = [_predictor(checkpoint, way, memory, options, device) for way in group]
        measured = evaluate_together(
            [(predictor.detector, predictor.proposals) for predictor in predictors],
            dataset,
            batch=batch,
            on_image=lambda sample, found: on_image(),
        )
        yield from zip(group, measured, strict=True)


def way_predictor(
    checkpoint: Checkpoint, way: Way, *, options: DetectorOptions | None = None, device: str = "cpu"
) -> Predictor:
    """Take a network under one way by itself.  Raises ConfigError for what makes no sense."""
    return _predictor(checkpoint, way, _Memory(), options, device)


class _Memory:
    """The maps of the last batch."""

    def __init__(self) -> None:
        self._seen: tuple[Tensor, Tensor] | None = None
        self._maps: list[Tensor] = []

    def __call__(
        self, image: Tensor, image_size: Tensor, compute: Callable[[], list[Tensor]]
    ) -> list[Tensor]:
        """Return the maps of a batch: those that are kept if it is the same one."""
        seen = self._seen
        if seen is None or not (torch.equal(seen[0], image) and torch.equal(seen[1], image_size)):
            self._maps = compute()
            self._seen = image, image_size
        return self._maps


class _Sharing(Asag):
    """A network that keeps its maps for others with the same weights."""

    memory: _Memory

    def features(self, image: Tensor, image_size: Tensor) -> list[Tensor]:
        return self.memory(image, image_size, lambda: Asag.features(self, image, image_size))


def _predictor(
    checkpoint: Checkpoint, way: Way, memory: _Memory, options: DetectorOptions | None, device: str
) -> Predictor:
    chosen = options or DetectorOptions()
    with torch.device("meta"):
        model = _Sharing(way.settings_of(checkpoint.config))
    model.load_state_dict(checkpoint.state, strict=True, assign=True)
    model.memory = memory
    stop = DetectorOptions(mode=chosen.mode, max_level=way.max_level or chosen.max_level)
    return network_predictor(
        model.eval(),
        checkpoint.categories,
        stop,
        preprocessing=checkpoint.preprocessing,
        trained=checkpoint.trained,
        device=device,
    )
