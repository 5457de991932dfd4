"""What every test of the runtime gets."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def _settled_heap() -> Iterator[None]:
    """Spare what is there before the first test the many garbage collections that tests ask for."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
