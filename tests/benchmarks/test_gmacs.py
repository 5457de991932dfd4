"""Multiply-accumulates: the counts of the networks against the paper's, and against counts by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from asag_bench.cli import main
from asag_bench.gmacs.count import count_asag, count_compared
from asag_bench.gmacs.published import PUBLISHED, Published
from asag_training.checkpoints import save_checkpoint
from asag_training.network.config import VARIANTS
from support.small_network import small_checkpoint

COUNTED = {
    ("asag-a-r50-100", 102): (122.9, 128.6),
    ("asag-a-r50-300", 312): (128.3, 133.9),
    ("asag-s-r50-100", 100): (122.4, 128.0),
    ("asag-s-r50-300", 312): (126.6, 132.2),
    ("asag-a-r101-300", 296): (192.2, 200.5),
    ("asag-d-r50-300", 253): (None, 166.9),
}
"""GMACs at 800x1088 and at 800x1134, counted with another program (5 patches probed on P4 and on P3)."""


OF_UNKNOWN_SIZE = "efficient-detr"
"""What its paper's cost is of is not known, and its authors published no code."""


@pytest.mark.parametrize(("network", "queries"), COUNTED)
def test_asag_costs_what_was_counted_before(network: str, queries: int) -> None:
    for shape, expected in zip(((800, 1088), (800, 1134)), COUNTED[network, queries], strict=True):
        parts = count_asag(VARIANTS[network], shape, queries, (5, 5))
        if expected is None:
            continue
        assert sum(parts.values()) == pytest.approx(expected, rel=0.005)


@pytest.mark.parametrize(
    "row",
    [row for row in PUBLISHED if row.network not in (*VARIANTS, OF_UNKNOWN_SIZE)],
    ids=lambda row: f"{row.network}-{row.queries}",
)
def test_the_other_detectors_cost_what_was_published(row: Published) -> None:
    parts = count_compared(row.network, VARIANTS["asag-a-r50-100"], row.shape, row.queries)
    assert sum(parts.values()) == pytest.approx(row.gmacs, rel=0.02)


def test_a_part_by_hand() -> None:
    """The neck: four 1x1 convolutions from the backbone's channels, four 3x3 of 256 channels."""
    parts = count_asag(VARIANTS["asag-a-r50-100"], (64, 96), 10, (0, 2))
    cells = [16 * 24, 8 * 12, 4 * 6, 2 * 3]
    by_hand = sum(n * 256 * (c + 9 * 256) for n, c in zip(cells, (256, 512, 1024, 2048), strict=True))
    assert parts["neck"] * 1e9 == by_hand
    assert "probe P4" not in parts
    # Two patches of 17 x 17 cells to 128 channels, and nine taps of 8; then three layers to 20 anchors of 5.
    compressed = 17 * 17 * (256 * 128 + 128 * 9 * 8)
    predicted = 15 * 15 * 8 * 1000 + 1000 * 1000 + 1000 * 20 * 5
    assert parts["probe P3"] * 1e9 == pytest.approx(2 * (compressed + predicted))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "counts.json"
    arguments = ["gmacs", "asag-a-r50-300", "f-qrcnn", "--shape", "0.907mpx", "--output", str(file)]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["network", "queries", "shape"]
    assert [line.split()[:2] for line in lines[1:]] == [
        ["asag-a-r50-300", "312"],
        ["f-qrcnn", "100"],
        ["f-qrcnn", "300"],
    ]
    counts = json.loads(file.read_text())["counts"]
    assert [count["paper"] for count in counts] == [139, 140, 143]
    assert counts[0]["gmacs"] == pytest.approx(sum(counts[0]["parts"].values()), abs=0.002)
    # At another size the paper has no figure, nor of another backbone or with other patches.
    assert main([*arguments[:2], "--shape", "320x320", "--queries", "312"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[-2:] == ["-", "-"]
    for others in (["f-qrcnn", "--like", "asag-a-r101-300"], ["asag-a-r50-100", "--patches", "9,9"]):
        assert main(["gmacs", *others]) == 0
        assert all(line.split()[-2:] == ["-", "-"] for line in capsys.readouterr().out.splitlines()[1:])


def test_a_checkpoint_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "small.safetensors"
    save_checkpoint(file, small_checkpoint())
    assert main(["gmacs", str(file), "--shape", "96x128", "--patches", "1,0", "--markdown"]) == 0
    head, _, row = capsys.readouterr().out.splitlines()
    assert "probe P4" in head
    assert "probe P3" not in head
    assert str(file) in row


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing"], "'nothing' is no network that is known, and no file"),
        (["--shape", "wide"], "--shape is 'wide'; expected height x width in pixels"),
        (["--patches", "3"], "--patches is '3'; expected two numbers, on P4 and on P3"),
        (["f-qrcnn", "--like", "nothing"], "'nothing' is no network that is known"),
        (["asag-a-r50-100", "--like", "asag-a-r101-300"], "--like is for adamixer-6, "),
        (["f-qrcnn", "--patches", "9,9"], "--patches is for ASAG, which alone probes"),
    ],
)
def test_what_cannot_be_counted(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gmacs", *arguments]) == 2
    assert said in capsys.readouterr().err
