"""Whatever comes from outside is taken, or refused in a sentence: some of `make fuzz`, and what it found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import strategies as st

from asag_deploy.errors import ImageError
from endurance import fuzz
from endurance.hunting import Hunt, read_kept
from endurance.judging import Judge, Target, corpus_of
from endurance.targets import NEED_PYTORCH, SELF_CHECK, TARGETS

SEED = 9
INPUTS = {
    "manifests": 40,
    "graphs": 6,
    "records": 100,
    "images": 150,
    "videos": 60,
    "annotations": 100,
    "checkpoints": 15,
    "states": 25,
    "requests": 25,
    "commands": 60,
}
"""Inputs of each target, in about a second or two."""


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_damage_is_taken_or_refused_in_a_sentence(name: str, tmp_path: Path) -> None:
    if name in NEED_PYTORCH:
        pytest.importorskip("torch")
    with fuzz.opened(name, tmp_path) as judge:
        for path in corpus_of(name):
            finding = judge(read_kept(path))
            assert finding is None, f"{path}: {finding.text}"
        hunt = Hunt(judge)
        hunt.batch(SEED, INPUTS[name])
    assert {each.signature: each.text for each in hunt.findings.values()} == {}
    assert hunt.executions >= INPUTS[name] / 2  # it draws no input twice, and of some there are few


def judged(run: Callable[[bytes], object], tmp_path: Path, names: tuple[str, ...] = ()) -> str | None:
    """What the judge finds in what a function does."""
    finding = Judge(Target(inputs=st.binary(), run=run, names=names), tmp_path)(b"anything")
    return None if finding is None else finding.signature


def refuse(sentence: str) -> Callable[[bytes], object]:
    def run(data: bytes) -> None:
        raise ImageError(sentence)

    return run


def test_what_is_refused_in_a_sentence_that_names_the_file_is_fine(tmp_path: Path) -> None:
    assert judged(refuse("'a.png' is no image"), tmp_path, ("a.png", "b.png")) is None


@pytest.mark.parametrize(("sentence", "wrong"), [("", "says nothing"), ("it is no image", "names no file")])
def test_other_refusals_are_findings(sentence: str, wrong: str, tmp_path: Path) -> None:
    found = judged(refuse(sentence), tmp_path, ("a.png",))
    assert found is not None
    assert wrong in found


def test_other_exceptions_and_files_left_behind_are_findings(tmp_path: Path) -> None:
    assert "ZeroDivisionError" in (judged(lambda data: 1 // (len(data) - 8), tmp_path) or "")
    assert judged(lambda data: (tmp_path / "left").write_bytes(data), tmp_path) == "left files"
    assert list(tmp_path.iterdir()) == []


def test_what_fails_is_shrunk(tmp_path: Path) -> None:
    def run(data: bytes) -> None:
        if len(data) >= 3 and data[0] > 9:
            raise KeyError("nobody caught this")

    hunt = Hunt(Judge(Target(inputs=st.binary(), run=run), tmp_path))
    hunt.batch(SEED)
    assert [(each.data, each.signature) for each in hunt.findings.values()] == [
        (b"\x0a\0\0", "KeyError test_fuzz.py:run")
    ]


def test_an_input_that_ends_the_process_is_known() -> None:
    options = fuzz._parser().parse_args(["--target", SELF_CHECK, "--seconds", "3600", "--no-corpus"])
    run = fuzz.Run()
    fuzz._slice(SELF_CHECK, run, options)  # which comes back when the process has ended, long before that
    assert [
        (each["input"], name.startswith("the process ended with -6")) for name, each in run.findings.items()
    ] == [(repr(b"end"), True)]
