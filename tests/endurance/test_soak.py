"""The soak in small: what `make soak` does with ten thousand pictures and requests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from endurance.soak import main
from endurance.watching import Sample, sum_up


@pytest.mark.slow
def test_some_hundreds_leave_nothing_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "soak.json"
    code = main(["--pictures", "200", "--requests", "300", "--clients", "16", "--output", str(output)])
    report = json.loads(output.read_text())
    assert (code, report["clean"]) == (0, True), capsys.readouterr().err
    assert report["serve"]["requests"] == 300
    assert len(report["serve"]["by_kind"]) > 6


@pytest.mark.parametrize(("kib_each", "flat"), [(0, True), (1, True), (10, False)])
def test_growth_is_seen(kib_each: int, flat: bool) -> None:
    """Of 10 KiB a picture, among the noise of an allocator."""
    samples = [
        Sample(done, 100_000 + min(done, 500) * 50 + done * kib_each + done % 7 * 100, 10, 4)
        for done in range(0, 3000, 10)
    ]
    watched = sum_up(samples)
    assert watched.flat is flat
    assert watched.slope_kib_per_1000 == pytest.approx(1000 * kib_each, abs=50)


@pytest.mark.parametrize(("descriptors", "threads"), [(1, 0), (0, 1)])
def test_descriptors_and_threads_that_are_left_are_seen(descriptors: int, threads: int) -> None:
    """One for a hundred pictures."""
    samples = [
        Sample(done, 100_000, 10 + done % 5 + done // 100 * descriptors, 4 + done // 100 * threads)
        for done in range(0, 3000, 10)
    ]
    assert not sum_up(samples).flat
