"""Deterministic weights for reference cases.

Every tensor is drawn from its own NumPy generator, seeded by a case seed and the CRC-32 of the tensor's
name in the official checkpoint layout (`layout_*.json`).  Two implementations that fill their parameters
from `reference_state_dict` hold the same network, so their outputs can be compared without shipping weights.

`reference_image(height, width, seed)` is the matching input: float32, already normalised, (3, height, width).
"""

import json
import zlib
from pathlib import Path

import numpy as np


def _draw(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    x = rng.standard_normal(shape, dtype=np.float32)
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "running_mean":
        return 0.1 * x
    if leaf == "running_var":
        return 1 + 0.1 * np.abs(x)
    if leaf == "iof_tau":
        return np.abs(x)
    if "layernorm" in name or len(shape) <= 1:
        if leaf == "weight":
            return (0.2 if ".bn3." in name else 1.0) * (1 + 0.1 * x)
        return 0.02 * x
    if "pos_embedding" in name:
        return 0.02 * x
    fan_in = int(np.prod(shape[1:]))
    gain = np.sqrt(2.0) if len(shape) == 4 else 1.0
    return x * np.float32(gain / np.sqrt(fan_in))


def reference_state_dict(layout: str | Path, seed: int, score_bias: float = -1.0) -> dict[str, np.ndarray]:
    """The case's weights, keyed and shaped as the official checkpoint's `model` entry.

    The last layer of both anchor predictors is scaled so that anchors come out small and with scores on
    both sides of the probing thresholds: with the default `score_bias` every pyramid level is probed; with
    -6.0 no anchor reaches the lower threshold, so the loop stops at once and the anchor floor decides.
    """
    shapes: dict[str, list[int]] = json.loads(Path(layout).read_text())
    state = {
        name: np.asarray(_draw(name, tuple(shape), seed), dtype=np.float32) for name, shape in shapes.items()
    }
    for head in ("proj_all", "proj_patch"):
        weight = state[f"anchor_generator.{head}.layers.2.weight"]
        bias = state[f"anchor_generator.{head}.layers.2.bias"].reshape(-1, 5)
        weight *= 2.0
        bias[:, 2:4] -= 2.5
        bias[:, 4] += score_bias
    return state


def reference_image(height: int, width: int, seed: int) -> np.ndarray:
    """A normalised test image, float32 (3, height, width)."""
    rng = np.random.default_rng([seed, height, width])
    return rng.standard_normal((3, height, width), dtype=np.float32)
