"""The training process: its device, its memory, and the other processes that `torchrun` started."""

from __future__ import annotations

import ctypes
import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from asag_deploy.errors import ConfigError
from asag_deploy.plain_numbers import unsigned

_PATIENCE = datetime.timedelta(hours=12)
"""How long processes wait for each other: the main one evaluates and saves while the others wait."""

_LAUNCHED_BY = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""mallopt's names for its parameters, from glibc's malloc.h."""
_NEVER = -1


@dataclass(frozen=True, kw_only=True)
class Process:
    """This process among those of a run."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """True for the one that writes files and talks to the user."""
        return self.rank == 0


@contextmanager
def joined(device: str) -> Iterator[Process]:
    """Join the other processes of the run, if `torchrun` started any; leave them in the end.

    device: `cpu`, `cuda` (each process its own GPU), or `auto`.  Uses NCCL on GPUs, gloo on CPUs.  Raises
    ConfigError if there is no such device, if the others cannot be reached, or if a variable of the launcher
    is no number.
    """
    launched = all(name in os.environ for name in _LAUNCHED_BY)
    local = _device(device, _local_rank() if launched else 0)
    if not launched:
        yield Process(device=local)
        return
    if local.type == "cuda":
        torch.cuda.set_device(local)
    try:
        dist.init_process_group("nccl" if local.type == "cuda" else "gloo", timeout=_PATIENCE)
    except (ValueError, RuntimeError) as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ConfigError(
            f"could not join the other processes at {place} ({type(error).__name__}): start them all with "
            "torchrun, with the same --rdzv-endpoint"
        ) from error
    try:
        yield Process(rank=dist.get_rank(), world_size=dist.get_world_size(), device=local)
    finally:
        dist.destroy_process_group()


def _local_rank() -> int:
    """Return the number of this process on its machine (ConfigError if the launcher's variable is none)."""
    value = os.environ.get("LOCAL_RANK", "0")
    rank = unsigned(value)
    if rank is None:
        raise ConfigError(
            f"the environment variable LOCAL_RANK is {value!r:.60}, expected a whole number: start with "
            "torchrun, which sets it, or unset it"
        )
    return rank


def wait_for_all() -> None:
    """Go on only when every process has come here."""
    if dist.is_initialized():
        dist.barrier()


def check_same_step(step: int) -> None:
    """Raise ConfigError unless every process has come to the same update of the run."""
    if not dist.is_initialized():
        return
    steps = [step] * dist.get_world_size()
    dist.all_gather_object(steps, step)
    if len(set(steps)) > 1:
        raise ConfigError(
            f"the processes of the run find different states of it, after {min(steps)} to {max(steps)} "
            "updates: let the output folder be one that all machines share"
        )


def keep_freed_memory() -> bool:
    """Let freed memory stay with the process instead of going back to the system; return whether it will.

    A training pass on the CPU allocates and frees the same maps over and over.  glibc maps every large one
    anew, and touching its pages for the first time can take longer than computing what is written there: a
    third of a training step was measured.  Other C libraries have no such settings and are left as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, _NEVER))


def _device(name: str, index: int) -> torch.device:
    """Return the device of the process that is number `index` on its machine."""
    if name not in ("cpu", "cuda", "auto"):
        raise ConfigError(f"unknown device '{name}'; choose cpu, cuda or auto")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("there is no usable CUDA device; check with nvidia-smi, or train with --device cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if index >= count:
        raise ConfigError(f"process {index + 1} of this machine has no GPU: start {count}, one for each")
    return torch.device("cuda", index)
