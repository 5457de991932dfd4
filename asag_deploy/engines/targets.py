"""The GPUs that an engine is built for, by compute capability."""

from __future__ import annotations

import ctypes
import platform
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from asag_deploy.errors import ConfigError

DEFAULT_CAPABILITIES = ("sm75", "sm86", "sm89", "sm120")
"""Of the GeForce RTX 20, 30, 40 and 50 series and their professional siblings."""

_DATA_CENTRE = {"sm90": "H100, H200", "sm100": "B200, GB200", "sm103": "B300, GB300"}

# CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
_MAJOR, _MINOR = 75, 76
_NAME_BYTES = 256


@dataclass(frozen=True, kw_only=True)
class Target:
    """What one engine is built for: one compute capability, or several that share it."""

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


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU of this machine."""

    name: str
    capability: str
    """Such as `sm86`."""


def parse_target(text: str) -> str:
    """`sm86`, `SM_86`, `86` or `8.6` as `sm86`.

    Raises ConfigError for anything else.
    """
    found = re.fullmatch(r"(?:sm_?)?(\d{1,2})\.?(\d)", text.strip().lower())
    if found is None:
        raise ConfigError(
            f"unknown GPU '{text}'; name its compute capability, such as {', '.join(DEFAULT_CAPABILITIES)}, "
            "which `nvidia-smi --query-gpu=compute_cap --format=csv` prints"
        )
    return f"sm{found[1]}{found[2]}"


def targets(capabilities: Iterable[str], *, shared: bool) -> tuple[Target, ...]:
    """One target for each capability, or with `shared` a single one for all of them."""
    ordered = sorted(set(capabilities), key=number)
    if shared:
        return (Target(capabilities=tuple(ordered)),)
    return tuple(Target(capabilities=(capability,)) for capability in ordered)


def number(capability: str) -> int:
    """`sm86` as 86, by which capabilities are ordered."""
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
    """A capability, with the names of its GPUs where they are ones that TensorRT-RTX does not serve."""
    names = _DATA_CENTRE.get(capability)
    return capability if names is None else f"{capability} ({names})"


def this_gpu() -> Gpu | None:
    """The first GPU of this machine, or None if the driver finds none.  CUDA itself is not needed."""
    library = "nvcuda.dll" if platform.system() == "Windows" else "libcuda.so.1"
    device, major, minor = ctypes.c_int(0), ctypes.c_int(0), ctypes.c_int(0)
    name = ctypes.create_string_buffer(_NAME_BYTES)
    try:
        driver = ctypes.CDLL(library)
        calls: tuple[Callable[[], int], ...] = (
            lambda: driver.cuInit(0),
            lambda: driver.cuDeviceGet(ctypes.byref(device), 0),
            lambda: driver.cuDeviceGetName(name, _NAME_BYTES, device),
            lambda: driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device),
            lambda: driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device),
        )
        if any(call() != 0 for call in calls):  # stops at the first that fails
            return None
    except (OSError, AttributeError):
        return None
    return Gpu(name=name.value.decode(errors="replace"), capability=f"sm{major.value}{minor.value}")
