"""The GPUs that an engine is built for, by compute capability."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from asag_deploy.cuda.driver import Gpu, find_gpus
from asag_deploy.errors import BackendError, ConfigError

DEFAULT_CAPABILITIES = ("sm75", "sm86", "sm89", "sm120")
"""Of the GeForce RTX 20, 30, 40 and 50 series and their professional siblings."""

_DATA_CENTRE = {"sm90": "H100, H200", "sm100": "B200, GB200", "sm103": "B300, GB300"}


@dataclass(frozen=True, kw_only=True)
class Target:
    """The compute capability, or several, that one engine is built for."""

    capabilities: tuple[str, ...]
    """Such as `("sm86",)`, in ascending order."""

    @property
    def name(self) -> str:
        """The name of its folder: `sm86`, or `sm86+sm89`."""
        return "+".join(self.capabilities)

    @property
    def includes_turing(self) -> bool:
        """Whether GPUs of compute capability 7.5 are among them, which cannot do all that later ones can."""
        return "sm75" in self.capabilities


def parse_target(text: str) -> str:
    """Read `sm86`, `SM_86`, `86` or `8.6` as `sm86`.

    Raises ConfigError for anything else.
    """
    found = re.fullmatch(r"(?:sm_?)?([0-9]{1,2})\.?([0-9])", text.strip().lower())
    if found is None:
        raise ConfigError(
            f"unknown GPU '{text}'; name its compute capability, such as {', '.join(DEFAULT_CAPABILITIES)}, "
            "which `nvidia-smi --query-gpu=compute_cap --format=csv` prints"
        )
    return f"sm{found[1]}{found[2]}"


def targets(capabilities: Iterable[str], *, shared: bool) -> tuple[Target, ...]:
    """Make one target for each capability, or with `shared` one for all of them."""
    ordered = sorted(set(capabilities), key=number)
    if shared:
        return (Target(capabilities=tuple(ordered)),)
    return tuple(Target(capabilities=(capability,)) for capability in ordered)


def number(capability: str) -> int:
    """Return `sm86` as 86, by which capabilities are ordered."""
    return int(capability.removeprefix("sm"))


def check_supported(
    capabilities: Sequence[str], supported: Sequence[str], library: str, *, instead: str = ""
) -> None:
    """Raise ConfigError naming the first capability that a library cannot build for, and what to do."""
    for capability in capabilities:
        if capability not in supported:
            known = ", ".join(sorted(supported, key=number))
            raise ConfigError(
                f"{library} cannot build for {in_words(capability)}; it builds for {known}{instead}"
            )


def in_words(capability: str) -> str:
    """Write a capability, with the names of its GPUs if TensorRT-RTX does not serve them."""
    names = _DATA_CENTRE.get(capability)
    return capability if names is None else f"{capability} ({names})"


def this_gpu() -> Gpu | None:
    """Return the first GPU of this machine, or None if the driver finds none."""
    try:
        return find_gpus()[0]
    except BackendError:
        return None
