"""Whether this machine has the device that PyTorch is to run on."""

from __future__ import annotations

import torch

from asag_deploy.errors import ConfigError

DEVICES = "cpu, or cuda or cuda:N for a GPU"


def check_device(name: str) -> None:
    """Raise ConfigError for a device that is unknown, or that this machine or this build of PyTorch lacks."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"unknown device '{name}'; choose {DEVICES}") from None
    if device.type == "cpu":
        return
    if device.type != "cuda":
        raise ConfigError(f"device '{name}' is not one that networks run on here; choose {DEVICES}")
    if torch.version.cuda is None and torch.version.hip is None:
        raise ConfigError(
            f"device '{name}' needs a PyTorch with CUDA, and {torch.__version__} has none: install one from "
            "pytorch.org, or take the device cpu"
        )
    if not torch.cuda.is_available():
        raise ConfigError(f"device '{name}' needs a GPU, and PyTorch finds none; check with nvidia-smi")
    count = torch.cuda.device_count()
    if device.index is not None and device.index >= count:
        raise ConfigError(f"there is no device '{name}': this machine's are cuda:0 to cuda:{count - 1}")
