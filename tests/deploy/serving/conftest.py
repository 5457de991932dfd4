"""A detector that a test can hold up."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.served import GatedDetector


@pytest.fixture
def detector() -> Iterator[GatedDetector]:
    gated = GatedDetector()
    yield gated
    gated.gate.set()
