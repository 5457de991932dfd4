"""Hunting in one process: inputs are drawn in batches, and what fails is shrunk and kept."""

from __future__ import annotations

import contextlib
import hashlib
import lzma
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import HypothesisException

from endurance.judging import CORPUS, Finding, Judge

_BATCH = 100
"""Inputs that hypothesis draws before it forgets them: it remembers all of a run, megabytes each."""
_SHRINK_SECONDS = 40.0
_PACKED = ".xz"
_LARGE = 4096


class _FoundError(Exception):
    """What a batch is stopped with."""


class Hunt:
    """Batch after batch, each from a seed of its own; the same seeds give the same inputs."""

    def __init__(self, judge: Judge, *, before: Callable[[bytes], object] = lambda data: None) -> None:
        self.judge = judge
        self.executions = 0
        self.findings: dict[str, Finding] = {}
        """The smallest of each signature."""
        self._before = before

    def batch(self, number: int, size: int = _BATCH, *, until: float = float("inf")) -> None:
        """Try `size` inputs, or as many as there is time for `until` that monotonic time.

        A batch ends with the first input that fails in a new way, once it is as small as it gets.
        """
        known = set(self.findings)
        shrinking: str | None = None
        end = until

        @seed(number)
        @settings(
            max_examples=size,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.generate, Phase.shrink),
            report_multiple_bugs=False,
            print_blob=False,
        )
        @given(self.judge.target.inputs)
        def attempt(data: bytes) -> None:
            nonlocal shrinking, end
            if time.monotonic() > end:
                return
            finding = self.try_one(data)
            if finding is None or finding.signature in known or shrinking not in (None, finding.signature):
                return
            if shrinking is None:
                shrinking, end = finding.signature, time.monotonic() + _SHRINK_SECONDS
            raise _FoundError

        # Out of time, an input that failed fails no more, which hypothesis calls flaky: so what it raises is
        # not looked at, but what was found.
        with contextlib.suppress(_FoundError, HypothesisException, ExceptionGroup), _silence():
            attempt()

    def try_one(self, data: bytes) -> Finding | None:
        """Judge an input, and remember it if it fails."""
        self._before(data)
        self.executions += 1
        finding = self.judge(data)
        if finding is not None:
            best = self.findings.get(finding.signature)
            if best is None or (len(data), data) < (len(best.data), best.data):
                self.findings[finding.signature] = finding
        return finding


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep hypothesis from printing what failed."""
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):  # noqa: PTH123 (no Path.open for it)
        yield


def keep(target: str, data: bytes) -> Path:
    """Put an input into the corpus of a target, packed if that makes it smaller; return its file."""
    packed = lzma.compress(data) if len(data) > _LARGE else data
    name = hashlib.sha256(data).hexdigest()[:12] + (_PACKED if packed is not data else "")
    path = CORPUS / target / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(packed)
    return path


def read_kept(path: Path) -> bytes:
    """Read an input of a corpus."""
    data = path.read_bytes()
    return lzma.decompress(data) if path.suffix == _PACKED else data
