"""The reference cases as typed values: what the public implementation computes on known weights."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from asag_training.network.config import AsagConfig, variant_config
from reference_weights import reference_image, reference_state_dict

HERE = Path(__file__).parent
NAMES = tuple(sorted(path.stem for path in (HERE / "cases").glob("*.npz")))

_VARIANTS = {"asag-s-crowdhuman": "asag-s-r50-crowdhuman"}

LOGITS, BOXES = 1e-3, 1e-4
"""How far logits and normalised boxes may be from the reference."""


@dataclass(frozen=True, kw_only=True)
class ReferenceCase:
    """One case: its input, its weights, and the arrays that were recorded."""

    name: str
    config: AsagConfig
    levels: str
    """The manual stop, as the exporter names it."""
    seed: int
    score_bias: float
    sizes: NDArray[np.int64]
    """(B, 2) valid heights and widths."""
    arrays: dict[str, NDArray[Any]]

    @property
    def max_level(self) -> str:
        """The manual stop, as the runtime names it."""
        return self.levels[:2].upper()

    def images(self) -> NDArray[np.float32]:
        """(B, 3, H, W), zero-padded right and bottom to the largest."""
        height, width = self.sizes.max(axis=0)
        batch = np.zeros((len(self.sizes), 3, height, width), dtype=np.float32)
        for i, (h, w) in enumerate(self.sizes):
            batch[i, :, :h, :w] = reference_image(int(h), int(w), self.seed)
        return batch

    def state(self) -> dict[str, torch.Tensor]:
        """The weights in the official layout."""
        arrays = _weights(str(self.arrays["layout"]), self.seed, self.score_bias)
        return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}


@lru_cache(maxsize=1)  # cases that follow each other have the same
def _weights(layout: str, seed: int, score_bias: float) -> dict[str, NDArray[np.float32]]:
    return reference_state_dict(HERE / f"layout_{layout}.json", seed, score_bias)


def load_more_case(name: str) -> ReferenceCase:
    """The case called `name` in `more_cases`, of the usual patch size; arrays named as in `cases`."""
    with np.load(HERE / "more_cases" / f"{name}.npz", allow_pickle=False) as file:
        arrays = dict(file)
    renamed: dict[str, str] = {"logits": "main_logits", "boxes": "main_boxes", "valid": "anchors_valid"}
    variant = str(arrays["layout"]).replace("_", "-")
    config = variant_config(_VARIANTS.get(variant, variant))
    return ReferenceCase(
        name=name,
        config=config,
        levels="p3-p6",
        seed=int(arrays["seed"]),
        score_bias=float(arrays["score_bias"]),
        sizes=arrays["sizes"],
        arrays={renamed.get(str(key), str(key)): array for key, array in arrays.items()},
    )


def load_case(name: str) -> ReferenceCase:
    """The case called `name`, one of `NAMES`."""
    with np.load(HERE / "cases" / f"{name}.npz", allow_pickle=False) as file:
        arrays = dict(file)
    stop = str(arrays["args"]).partition("--used_inference_level ")[2]
    return ReferenceCase(
        name=name,
        config=variant_config(str(arrays["layout"]).replace("_", "-")),
        levels={"P4P6": "p4-p6", "P5P6": "p5-p6"}.get(stop, "p3-p6"),
        seed=int(arrays["seed"]),
        score_bias=float(arrays["score_bias"]),
        sizes=arrays["sizes"],
        arrays=arrays,
    )
