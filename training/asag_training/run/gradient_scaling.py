"""Loss scaling for float16, whose smallest numbers gradients would fall below.

The loss is multiplied by a large factor before the backward pass, and the gradients are divided by it before
they are used.  Where the factor was too large, some are infinite or not a number: that update is left out and
the factor halved.  In float32 and bfloat16 all of this does nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from asag_training.settings import Compute

AUTOCAST: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""By what a recipe calls it, the type that backbone and neck compute in; None for their own."""


def compute_on(device: torch.device, compute: Compute) -> str:
    """Return what a recipe computes in on a device: one of `AUTOCAST`."""
    if compute == "auto":
        return "fp16" if device.type == "cuda" else "fp32"
    return compute


_LEAST_SCALE = 1.0
"""Gradients that are not finite without any scaling are so by themselves."""


class GradientScaling:
    """The factor, and how many updates were left out on its account."""

    def __init__(self, device: torch.device, compute: Compute) -> None:
        self.enabled = AUTOCAST[compute_on(device, compute)] == torch.float16
        self.skipped = 0
        self._scaler = torch.amp.GradScaler(device.type, enabled=self.enabled)
        self._overflow = False

    def backward(self, loss: Tensor) -> None:
        """Add the loss's gradients, multiplied by the factor, to the parameters'."""
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the factor, once all of an update have been added."""
        self._scaler.unscale_(optimizer)

    def excuses_overflow(self) -> bool:
        """Return whether the factor may be to blame for gradients of this update that are not finite.

        If so, the update will be left out.
        """
        self._overflow = self.enabled and self._scaler.get_scale() > _LEAST_SCALE
        return self._overflow

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Make the update, or leave it out; and adapt the factor."""
        if self._overflow:
            self.skipped += 1
            self._overflow = False
        else:
            self._scaler.step(optimizer)
        self._scaler.update()

    def values(self) -> dict[str, float]:
        """Return what there is to log."""
        if not self.enabled:
            return {}
        return {"loss_scale": self._scaler.get_scale(), "skipped_updates": float(self.skipped)}

    def state_dict(self) -> dict[str, Any]:
        """Return what a run needs to go on as if it had not stopped."""
        return {"scaler": self._scaler.state_dict(), "skipped": self.skipped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave; a run without scaling, as on another device, has left no factor."""
        if state.get("scaler"):
            self._scaler.load_state_dict(state["scaler"])
            self.skipped = int(state["skipped"])
