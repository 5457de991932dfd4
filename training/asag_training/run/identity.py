"""What makes a run the one it is: the settings that must be the same for it to go on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their whole names, e.g. `schedule.epochs`."""
    named: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            named |= flat(value, f"{prefix}{name}.")
        else:
            named[prefix + name] = value
    return named


def default_settings(settings: Any, prefix: str = "") -> dict[str, Any]:
    """By whole name, the default of every setting in nested dataclasses that has one."""
    named: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            named |= default_settings(value, f"{prefix}{field.name}.")
        elif field.default is not dataclasses.MISSING:
            named[prefix + field.name] = field.default
    return named


def differences(saved: Mapping[str, Any], own: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """In words, where a saved run is another than this one.

    Settings that a release added after the run was saved had their default then.
    """
    before = {name: saved.get(name, defaults.get(name)) for name in {**own, **saved}}
    names = [name for name, value in before.items() if value != own.get(name)]
    return [f"its {name} is {before[name]}, not {own.get(name)}" for name in names]
