"""What options take, and what their help says, in every program."""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.every_program import PROGRAMS, commands
from support.tiny_bundle import make_bundle

ROOT = Path(__file__).parent.parent
BAD_NUMBERS = ("nan", "inf", "-inf", "1e400", "1e30", "-1e9", "1" + 20 * "0", "", "x", "0x10")


def options() -> Iterator[tuple[str, tuple[str, ...], argparse.ArgumentParser, argparse.Action]]:
    for program in PROGRAMS:
        for words, parser in commands(program):
            for action in parser._actions:
                yield program, words, parser, action


def _is_numeric(action: argparse.Action) -> bool:
    """Whether the option takes a number, or several; what reads one stands in `command_line`."""
    return getattr(action.type, "__module__", "") == "asag_deploy.command_line"


def test_bad_numbers_are_refused_by_every_option_that_takes_one(capsys: pytest.CaptureFixture[str]) -> None:
    seen = 0
    for program, words, _, action in options():
        if not _is_numeric(action):
            continue
        seen += 1
        for number in BAD_NUMBERS:
            option = action.option_strings[0]
            code = importlib.import_module(PROGRAMS[program]).main([*words, f"{option}={number}"])
            out, err = capsys.readouterr()
            assert (code, out) == (2, ""), (program, option, number)
            assert err.startswith(f"{program}: error: {option} is {number}; it must be "), err
            assert len(err.splitlines()) == 1
    assert seen > 50


def test_no_option_takes_any_number() -> None:
    for program, words, _, action in options():
        assert action.type not in (int, float), (program, words, action.option_strings)


def test_no_path_is_empty(capsys: pytest.CaptureFixture[str]) -> None:
    of_paths = re.compile(r"\b(DIR|FILE|PATH|BUNDLE|BUNDLE_OR_CHECKPOINT)\b")
    seen = 0
    for program, words, _, action in options():
        if action.metavar is None or not of_paths.search(str(action.metavar)):
            continue
        seen += 1
        sources = action.dest in ("paths", "images")  # or cameras and addresses; they are read elsewhere
        assert action.type is Path or sources, (program, words, action.option_strings)
    assert seen > 30
    assert importlib.import_module(PROGRAMS["asag-detect"]).main(["", "a.jpg"]) == 2
    assert "argument BUNDLE: an empty path names nothing" in capsys.readouterr().err


def test_whatever_takes_a_bundle_or_a_checkpoint_says_that_an_address_will_do() -> None:
    taking = {"bundle", "bundles", "checkpoint", "backbone", "init", "model", "paths"}
    seen = 0
    for program, words, _, action in options():
        if action.dest in taking:
            seen += 1
            assert "address" in str(action.help), (program, words, action.dest)
    assert seen > 15


def test_whatever_takes_a_checkpoint_asks_which_of_its_weights() -> None:
    taking = [parser for *_, parser, action in options() if "--checkpoint" in action.option_strings]
    assert len(taking) > 3
    for parser in taking:
        assert "--weights" in parser._option_string_actions, parser.prog


def test_help_tells_the_truth() -> None:
    for program, words, parser, action in options():
        if action.help is None or action.help == argparse.SUPPRESS:
            continue
        text = parser._get_formatter()._expand_help(action)
        where = (program, words, action.option_strings, text)
        assert "None)" not in text, where
        said = re.search(r"default:? ([^;,)]+)", text)
        if (
            said is not None
            and isinstance(action.default, int | float)
            and not isinstance(action.default, bool)
        ):
            assert float(said[1]) == action.default, where
        elif said is not None and isinstance(action.default, str):
            assert action.default in text, where


def test_every_option_that_the_pages_mention_exists() -> None:
    known = {option for _, _, _, action in options() for option in action.option_strings}
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    pages += [ROOT / name / "README.md" for name in ("benchmarks", "plugins")]
    of_others = {"--data-binary", "--logdir", "--nproc-per-node", "--rdzv-endpoint"}
    for page in pages:
        lines = [line for line in page.read_text().splitlines() if "asag" in line]
        mentioned = {
            option for line in lines for option in re.findall(r"(?<![\w-])--[a-z][\w-]*\w(?![\w-])", line)
        }
        assert mentioned <= known | of_others, (page, mentioned - known)


_PAGES = {
    "asag-detect": ("docs/run.md",),
    "asag-build": ("docs/engines.md",),
    "asag-serve": ("docs/serve.md", "docs/run.md"),
    "asag-batch": ("docs/scale.md",),
    "asag-playground": ("docs/playground.md", "docs/run.md"),
    "asag-data": ("docs/fits.md", "docs/train.md", "docs/front.md"),
    "asag-eval": ("docs/evaluate.md", "docs/run.md"),
    "asag-train": ("docs/train.md", "docs/fine-tune.md"),
    "pack": ("docs/train.md",),
    "asag-quantize": ("docs/quantise.md",),
    "asag-export": ("docs/export.md", "docs/engines.md"),
    "demo": ("docs/index.md",),
    "asag-bench": ("benchmarks/README.md", "docs/front.md", "docs/peers.md"),
    "asag-paper": ("docs/paper.md",),
}
"""Where the options of each program are told of."""


def test_every_option_is_on_a_page_of_its_program() -> None:
    missing, pages = [], {}
    for program, names in _PAGES.items():
        texts = [(ROOT / name).read_text(encoding="utf-8") for name in names]
        pages[program] = set(re.findall(r"(?<![\w-])--[a-z][\w-]*\w(?![\w-])", "\n".join(texts)))
    for program, words, _, action in options():
        long = {option for option in action.option_strings if option.startswith("--")}
        if long and not long & (pages[program] | {"--help", "--version"}):
            missing.append((program, *words, *long))
    assert not missing


BUNDLE = "bundle"
IGNORED_ONCE = [
    (
        "asag-export",
        ["--untrained", "--variant", "v", "--output-dir", "o", "--canvas", "64x64"],
        "--canvas is for",
    ),
    (
        "asag-export",
        ["--untrained", "--variant", "v", "--output-dir", "o", "--tf32"],
        "--tf32 is for engines",
    ),
    (
        "asag-quantize",
        [BUNDLE, "--output-dir", "o", "--images", "x", "--limit", "3"],
        "--limit is for measuring",
    ),
    (
        "asag-quantize",
        [BUNDLE, "--output-dir", "o", "--images", "x", "--backend", "openvino"],
        "--backend is for",
    ),
    (
        "asag-quantize",
        [BUNDLE, "--output-dir", "o", "--images", "x", "--data", "d", "--calibration-split", "train"],
        "--images is what is calibrated on",
    ),
    ("asag-bench", ["run", BUNDLE, "./bundle"], "the bundle 'bundle' is given twice"),
    (
        "asag-bench",
        ["run", BUNDLE, "--checkpoint", "a.pth"],
        "--checkpoint is for the references torch, ",
    ),
    ("asag-bench", ["parity", BUNDLE, "--backend", "caffe"], "unknown backend 'caffe'"),
    ("asag-bench", ["gpu", "archive", "--wheel", "nowhere.whl"], "can be read (no such file or directory)"),
]


@pytest.mark.parametrize(("program", "arguments", "sentence"), IGNORED_ONCE)
def test_no_option_is_ignored(
    program: str,
    arguments: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if program in ("asag-export", "asag-bench"):
        pytest.importorskip("torch", reason="PyTorch is not installed")
    make_bundle(tmp_path / BUNDLE)
    monkeypatch.chdir(tmp_path)
    assert importlib.import_module(PROGRAMS[program]).main(arguments) == 2
    err = capsys.readouterr().err
    assert sentence in err
    assert "[Errno" not in err
