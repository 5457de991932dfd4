"""Settings: what all of them can do, and those of the optimiser, the learning rate and the training pass.

The network's are in `asag_training.network.config`, the losses' in `asag_training.losses.config`, those of
augmentation in `asag_training.data.transforms`; `asag_training.recipes` puts them all together.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeVar, cast, get_args

from asag_deploy.bundle.manifest import Preprocessing
from asag_deploy.errors import ConfigError, FieldError
from asag_deploy.typed_json import read_fields

Compute = Literal["auto", "fp32", "bf16", "fp16"]

WeightsChoice = Literal["model", "ema"]
"""The weights of a checkpoint as they were trained, or their moving average."""
WEIGHTS_CHOICES: tuple[WeightsChoice, ...] = get_args(WeightsChoice)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of all settings, which are frozen dataclasses that refuse bad values where they are made."""

    of = ""
    """What they are settings of, for messages."""

    def with_changes(self, **changes: Any) -> Self:
        """Return a copy with some values replaced (ConfigError for an unknown name or a bad value)."""
        known = sorted(field.name for field in dataclasses.fields(self))
        for name in changes:
            if name not in known:
                raise ConfigError(f"unknown {self.of} setting '{name}'; the settings are {', '.join(known)}")
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain JSON values, once tuples are lists (`json.dumps` makes them so)."""
        return dataclasses.asdict(self)

    def _require(self, condition: bool, expected: str, *names: str) -> None:
        """Raise ConfigError, with the values of the settings `names`, where `condition` does not hold."""
        if not condition:
            values = " and ".join(f"{name} {getattr(self, name)!r}" for name in names)
            raise ConfigError(f"{self.of} setting {values} is not possible: expected {expected}")


AnySettings = TypeVar("AnySettings", bound=Settings)


def apply_changes(settings: AnySettings, changes: Iterable[str]) -> AnySettings:
    """Return a copy of nested settings with values replaced as `--set` asks, e.g. by `schedule.epochs=24`.

    Values are JSON; strings may go without quotes.  All changes are made at once, so that their order does
    not matter.  Raises ConfigError for an unknown setting, a value of another type, or one that makes no
    sense.
    """
    values: dict[str, Any] = {}
    for change in changes:
        path, equals, text = change.partition("=")
        if not equals:
            raise ConfigError(f"cannot read the change '{change}': expected NAME=VALUE")
        values[path] = _json_value(text)
    for path in values:
        if any(other.startswith(f"{path}.") for other in values):
            raise ConfigError(f"'{path}' is changed both as a whole and in part: leave one of them out")
    tree = json.loads(json.dumps(settings.to_dict()))
    for path, value in values.items():
        _replace(tree, path, value)
    try:
        return cast(AnySettings, read_fields(type(settings), tree))
    except FieldError as error:
        raise ConfigError(f"cannot change the settings: {error}") from None


def _replace(tree: dict[str, Any], path: str, value: Any) -> None:
    """Replace one value in nested settings; whether it has the right type is seen when they are read."""
    branch, known = tree, ""
    *parents, name = path.split(".")
    for part in (*parents, name):
        if not isinstance(branch, dict):
            raise ConfigError(f"'{known}' is {json.dumps(branch)} and has no settings of its own")
        whole = f"{known}.{part}" if known else part
        if part not in branch:
            of = f" of '{known}'" if known else ""
            raise ConfigError(f"unknown setting '{whole}'; the settings{of} are {', '.join(branch)}")
        parent, branch, known = branch, branch[part], whole
    if isinstance(branch, dict) and value is not None:
        raise ConfigError(f"'{path}' has settings of its own: change them, as in {path}.NAME=VALUE")
    parent[name] = value


def _json_value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


@dataclass(frozen=True, kw_only=True)
class Schedule(Settings):
    """A run's length and its learning rate: a linear warm-up, then drops between epochs.

    The rate depends only on where the run is, so that a resumed run needs no state.  Raises ConfigError when
    a value makes no sense.
    """

    of = "schedule"
    epochs: int
    drops: tuple[int, ...] = ()
    """Epochs, counted from 0, from whose beginning on the rate is `drop_factor` of what it was."""
    drop_factor: float = 0.1
    warmup_steps: int = 500
    """Optimiser steps until the full rate is reached; 0 for no warm-up."""
    warmup_start: float = 1 / 3
    """Share of the rate that the warm-up begins with."""

    def __post_init__(self) -> None:
        self._require(self.epochs >= 1, "at least 1", "epochs")
        rising = all(a < b for a, b in itertools.pairwise(self.drops))
        inside = all(0 < drop < self.epochs for drop in self.drops)
        expected = f"rising epochs between 0 and {self.epochs}"
        if not inside:  # as where only the epochs are changed
            expected += " (for none: --set 'schedule.drops=[]')"
        self._require(rising and inside, expected, "drops")
        self._require(0 < self.drop_factor <= 1, "above 0 and at most 1", "drop_factor")
        self._require(self.warmup_steps >= 0, "0 or more", "warmup_steps")
        self._require(0 < self.warmup_start <= 1, "above 0 and at most 1", "warmup_start")

    def factor(self, epoch: int, step: int) -> float:
        """Return the share of the base rate for step `step` of the run, which is in `epoch`; from 0, both."""
        warmup = 1.0
        if step < self.warmup_steps:
            warmup = self.warmup_start + (1 - self.warmup_start) * step / self.warmup_steps
        return warmup * float(self.drop_factor ** sum(epoch >= drop for drop in self.drops))


@dataclass(frozen=True, kw_only=True)
class Optimisation(Settings):
    """Settings of the optimiser.  Raises ConfigError when a value makes no sense."""

    of = "optimisation"
    batch_size: int = 16
    """Images per update, over all processes and accumulated passes."""
    accumulate: int = 1
    """Passes whose gradients are averaged for an update.  Each divides by the number of its own objects, so
    that passes count alike however many objects they hold."""
    lr: float = 2e-4
    backbone_factor: float = 0.1
    """Learning rate of the backbone, as a share of `lr`."""
    offsets_factor: float = 0.1
    """Learning rate of what decides where deformable attention samples, as a share of `lr` (ASAG-D)."""
    weight_decay: float = 1e-4
    max_gradient_norm: float = 0.1
    freeze_stem: bool = True
    """Keep stem and layer1 as they are: right for pre-trained weights, wrong for random ones."""
    batch_statistics: bool = False
    """Let BatchNorm normalise by each batch and learn its statistics: for random weights.  Not synchronised
    between processes."""
    compute: Compute = "fp32"
    """The type backbone and neck compute in; everything else is float32.  With fp16 the loss is scaled, and
    updates whose gradients overflow are left out and counted.  `auto`: fp16 on a GPU, as published, and
    fp32 on CPUs."""
    allow_random_frozen: bool = False
    """Train over a stem or BatchNorm statistics that are random and stay so: to try or to time a run."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulate"):
            self._require(getattr(self, name) >= 1, "at least 1", name)
        whole = self.batch_size % self.accumulate == 0
        self._require(whole, f"a multiple of the {self.accumulate} passes of an update", "batch_size")
        for name in ("lr", "backbone_factor", "offsets_factor", "max_gradient_norm"):
            self._require(getattr(self, name) > 0, "above 0", name)
        self._require(self.weight_decay >= 0, "0 or more", "weight_decay")
        self._require(self.compute in get_args(Compute), "'auto', 'fp32', 'bf16' or 'fp16'", "compute")


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(Settings):
    """Settings of the training pass: its patches and its denoising queries.

    Raises ConfigError when a value makes no sense.
    """

    of = "training"
    min_patches: int = 4
    """N_TP: the fewest patches that P4 and P3 are trained on per image (paper, section 4.2)."""
    target_patch_epochs: int = 1
    """Epochs, from the first, without generated patches: the anchors are not yet worth following."""
    all_target_patches: bool = False
    """In those epochs, train on the patches of all groups of objects and send their anchors on to the
    decoder, as the public code does; else on the fewest patches, whose anchors are not sent on, as the paper
    says (section 4.2)."""
    denoising_queries: int = 200
    """Noised copies of the objects per image (paper, appendix B); 0 trains without denoising."""
    box_noise: float = 0.4
    """How far a noised box strays: centres by up to half of it, sizes by up to all of it, times the size."""

    def __post_init__(self) -> None:
        self._require(self.min_patches >= 1, "at least 1", "min_patches")
        self._require(self.target_patch_epochs >= 0, "0 or more", "target_patch_epochs")
        self._require(self.denoising_queries >= 0, "0 or more", "denoising_queries")
        # From 1 on a noised box could have no width left.
        self._require(0 <= self.box_noise < 1, "at least 0 and less than 1", "box_noise")


def change_sides(
    p: Preprocessing, shorter: int | None, longer: int | None, *, least: int = 1
) -> Preprocessing:
    """Return the same pre-processing at another image size; None leaves a side as it is.

    Raises ConfigError, in the words of the command line, for a size that is not possible.
    """
    sides = (p.shorter_side if shorter is None else shorter, p.longer_side if longer is None else longer)
    if not least <= sides[0] <= sides[1]:
        raise ConfigError(
            f"image sides {sides[0]} and {sides[1]} make no sense; expected {least} <= shorter <= longer"
            + ("" if shorter and longer else _kept_side(p, longer))
        )
    return dataclasses.replace(p, shorter_side=sides[0], longer_side=sides[1])


def _kept_side(p: Preprocessing, longer: int | None) -> str:
    if longer is None:
        return f" (without --longer-side it is {p.longer_side})"
    return f" (without --shorter-side it is {p.shorter_side})"


def check_preprocessing(p: Preprocessing) -> None:
    """Raise ConfigError for image sizes or statistics that are not possible."""
    if not 1 <= p.shorter_side <= p.longer_side or p.size_divisor < 1 or min(p.std) <= 0:
        raise ConfigError(
            f"evaluation at {p.shorter_side} to {p.longer_side} pixels, in steps of {p.size_divisor} and "
            f"with deviations {p.std}, is not possible: expected sides of 1 or more, the longer no less than "
            "the shorter, and deviations above 0"
        )
