"""Random numbers from a given generator, so that a seed repeats a run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def uniform(shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
    """Float32 numbers in [0, 1), on the CPU whatever the generator's device (None: torch's own generator)."""
    device = "cpu" if generator is None else generator.device
    return torch.rand(tuple(shape), generator=generator, device=device).cpu()
