"""Samples of any depth as those of 8 bits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def to_8_bits(samples: NDArray[Any], top: int) -> NDArray[np.uint8]:
    """Scale whole numbers from 0 to `top` (65535 at most) to 0 to 255; what is above counts as `top`."""
    if top == 255 and samples.dtype == np.uint8:
        return samples
    table = (np.arange(top + 1, dtype=np.uint32) * 255 + top // 2) // top
    if int(samples.max(initial=0)) > top:
        samples = samples.clip(0, top)
    return np.asarray(table.astype(np.uint8).take(samples))
