"""Bundles that several tests share, each exported once per run of the suite."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from asag_deploy.bundle import Bundle
from small_network import export_small


@pytest.fixture(scope="session")
def small_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Bundle]:
    """A function that exports the small network with the options, or returns what it exported before."""
    made: dict[str, Bundle] = {}

    def get(**options: str) -> Bundle:
        key = repr(sorted(options.items()))
        if key not in made:
            path: Path = tmp_path_factory.mktemp("bundle") / "small"
            made[key] = export_small(path, **options)
        return made[key]

    return get
