"""`asag-bench training-step`: it runs, and its figures add up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from asag_bench.cli import main
from asag_bench.measuring.training_step import PHASES
from support.training_runs import SIDE, TINY, options_of

SMALL = [change for change in TINY if not change.startswith(("optimisation.", "augmentation."))]


def test_a_tiny_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "result.json"
    arguments = [
        "training-step",
        "--recipe",
        "scenes",
        "--side",
        str(SIDE),
        "--updates",
        "2",
        "--warm-up",
        "1",
    ]
    arguments += ["--workers", "0", "--threads", "1", "--output", str(file), *options_of(SMALL)]
    assert main(arguments) == 0
    result = json.loads(file.read_text(encoding="utf-8"))
    assert json.loads(capsys.readouterr().out) == result
    assert result["updates"] == 2
    assert result["input"].startswith(f"2x3x{SIDE}x{SIDE}, ")
    assert (result["device"], result["threads"], result["workers"]) == ("cpu", 1, 0)
    assert set(result["ms"]) == set(result["share_of_update"]) == set(PHASES)
    assert all(0 < spread["min"] <= spread["median"] <= spread["max"] for spread in result["ms"].values())
    assert sum(result["share_of_update"].values()) == pytest.approx(1, abs=0.2)
    parts = sum(spread["min"] for spread in result["ms"].values())
    assert parts <= result["update_ms"]["max"] + 1
    # Probing is on from the start: at least the 4 quarters of P5, and 4 patches of P4 and of P3.
    assert result["per_image"]["avg_patch"] >= 12
    assert result["loader_ms_per_batch"] > 0
    assert result["machine"]["cores"] >= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--updates", "0"], "--updates is 0; it must be"),
        (["--warm-up", "-1"], "--warm-up is -1; it must be"),
        (["--recipe", "none"], "unknown recipe 'none'"),
        (["--device", "abacus"], "unknown device 'abacus'"),
        (["--set", "network.none=1"], "unknown setting 'network.none'"),
    ],
)
def test_bad_options_are_one_sentence(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["training-step", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("asag-bench: error: ")
    assert message in line
