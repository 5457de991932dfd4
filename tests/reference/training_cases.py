"""The cases of training mode as typed values: losses, gradients and updates of the public implementation."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from asag_training.data.loading import Batch
from asag_training.losses.targets import Targets
from asag_training.network.config import AsagConfig, variant_config
from asag_training.network.model import Asag, build
from reference_weights import reference_image, reference_state_dict

HERE = Path(__file__).parent
FOLDER = HERE / "training_cases"
STEPS, PATCHES = "steps", {16: "patches_p4", 8: "patches_p3"}
"""Arrays that only some cases have: of updates, and by stride the patches of a first epoch."""


def training_cases(array: str | None = None) -> tuple[str, ...]:
    """The names of the files in the folder that record an array, or (None) the losses of one batch."""
    found = []
    for path in sorted(FOLDER.glob("*.npz")):
        with np.load(path, allow_pickle=False) as file:
            if (array or "total") in file.files:
                found.append(path.stem)
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class TrainingCase:
    """One case: its input, its weights, and the arrays that were recorded."""

    name: str
    config: AsagConfig
    seed: int
    epoch: int
    denoising_queries: int
    sizes: NDArray[np.int64]
    """(B, 2) valid heights and widths."""
    arrays: dict[str, NDArray[Any]]

    @property
    def patches(self) -> dict[int, NDArray[np.int64]]:
        """By stride, where the patches of a first epoch lie; empty for later epochs."""
        return {stride: self.arrays[name] for stride, name in PATCHES.items() if name in self.arrays}

    def recorded(self, kind: str) -> dict[str, float]:
        """The numbers called `kind/...`."""
        found = {name.partition("/"): value for name, value in self.arrays.items()}
        return {rest: float(value) for (first, _, rest), value in found.items() if first == kind}

    def model(self) -> Asag:
        """The network with the case's weights, a new one each time."""
        arrays = _weights(str(self.arrays["layout"]), self.seed, float(self.arrays["score_bias"]))
        return build(self.config, {name: torch.from_numpy(array.copy()) for name, array in arrays.items()})

    def batch(self, number: int = 0, prefix: str = "") -> Batch:
        """The images and targets; those of another update have a number and a prefix."""
        height, width = self.sizes.max(axis=0)
        image = np.zeros((len(self.sizes), 3, height, width), dtype=np.float32)
        for i, (h, w) in enumerate(self.sizes):
            image[i, :, :h, :w] = reference_image(int(h), int(w), self.seed + number)
        targets = [
            Targets(*(torch.from_numpy(self.arrays[f"{prefix}target{i}_{part}"]) for part in Targets._fields))
            for i in range(len(self.sizes))
        ]
        ids = list(range(len(self.sizes)))
        return Batch(torch.from_numpy(image), torch.from_numpy(self.sizes), targets, ids)


@lru_cache(maxsize=1)  # cases that follow each other have the same
def _weights(layout: str, seed: int, score_bias: float) -> dict[str, NDArray[np.float32]]:
    return reference_state_dict(HERE / f"layout_{layout}.json", seed, score_bias)


def load_training_case(name: str) -> TrainingCase:
    """The case called `name`, one of `training_cases()`."""
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
        arrays = dict(file)
    layout = str(arrays["layout"])
    variant = {"asag_s_crowdhuman": "asag-s-r50-crowdhuman"}.get(layout, layout.replace("_", "-"))
    return TrainingCase(
        name=name,
        config=variant_config(variant),
        seed=int(arrays["seed"]),
        epoch=int(arrays["epoch"]),
        denoising_queries=int(arrays["denoising_queries"]),
        sizes=arrays["sizes"],
        arrays=arrays,
    )


def public_names(names: Iterable[str], heads: tuple[str, ...]) -> dict[str, str]:
    """What the public code calls our losses: it counts the decoders of denoising, from the relation block."""
    number = {"rpn": 0, **{head.removeprefix("aux_"): i + 1 for i, head in enumerate(heads[:-1])}}
    found = {}
    for name in names:
        found[name] = name
        if name.startswith("dn_loss_"):
            term, _, head = name.removeprefix("dn_loss_").partition("_")
            found[name] = f"dn_loss_{term}_{number[head] if head else len(heads)}"
    return found


def gradient_summary(model: nn.Module, names: Iterable[str]) -> tuple[NDArray[np.float64], ...]:
    """The norm of each parameter's gradient, and its product with numbers drawn by the parameter's name."""
    parameters = dict(model.named_parameters())
    norms, products = [], []
    for name in names:
        gradient = parameters[name].grad
        array = np.zeros(1) if gradient is None else gradient.double().numpy()
        rng = np.random.default_rng([1, zlib.crc32(name.encode())])
        norms.append(np.linalg.norm(array))
        products.append((array * rng.standard_normal(parameters[name].shape, dtype=np.float32)).sum())
    return np.array(norms), np.array(products)
