"""One process or many: what `torchrun` tells a process, and the few things processes say to each other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from asag_deploy.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Process:
    """This process among those of a run."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """Whether it is the one that writes files and talks to the user."""
        return self.rank == 0


@contextmanager
def joined(device: str) -> Iterator[Process]:
    """Join the other processes of the run, if `torchrun` started any; leave them in the end.

    device: `cpu`, `cuda` (each process its own GPU), or `auto`.  Uses NCCL on GPUs, gloo on CPUs.  Raises
    ConfigError if there is no such device.
    """
    if device not in ("cpu", "cuda", "auto"):
        raise ConfigError(f"unknown device '{device}'; choose cpu, cuda or auto")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("there is no usable CUDA device; check with nvidia-smi, or train with --device cpu")
    cuda = torch.cuda.is_available() and device != "cpu"
    if "WORLD_SIZE" not in os.environ:
        yield Process(device=torch.device("cuda" if cuda else "cpu"))
        return
    local = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield Process(rank=dist.get_rank(), world_size=dist.get_world_size(), device=local)
    finally:
        dist.destroy_process_group()


def wait_for_all() -> None:
    """Go on only when every process has come here."""
    if dist.is_initialized():
        dist.barrier()
