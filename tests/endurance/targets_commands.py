"""Command lines: any options of any program, with any values, none of which gets as far as its work."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from endurance.judging import Target, WrongError

Main = Callable[[Sequence[str]], int]


@dataclass(frozen=True)
class _Program:
    name: str
    module: str
    given: tuple[str, ...] = ()
    """Its command."""
    last: tuple[str, ...] = ()
    """What ends every line: things that are not there, so that it has nothing to do."""

    def main(self, arguments: Sequence[str]) -> int:
        """Run the program."""
        code: int = import_module(self.module).main(arguments)
        return code


_NOWHERE = "/dev/null/out"
_PROGRAMS = (
    _Program("asag-detect", "asag_deploy.detect.cli", (), ("no-bundle", "no-picture")),
    _Program("asag-build", "asag_deploy.engines.cli", (), ("no-bundle",)),
    _Program("asag-serve", "asag_deploy.serving.cli", (), ("no-bundle",)),
    _Program("asag-batch", "asag_deploy.batch.cli", (), ("no-bundle", "no-list", "--output", _NOWHERE)),
    _Program("asag-playground", "asag_deploy.playground.cli", (), ("no-bundle",)),
    _Program("asag-export", "asag_export.cli", (), ("--checkpoint", "no-file", "--output-dir", _NOWHERE)),
    _Program("asag-quantize", "asag_export.quantize.cli", (), ("--output-dir", _NOWHERE, "no-bundle")),
    _Program("asag-train", "asag_training.cli", (), ("--data", "no-data", "--output-dir", _NOWHERE)),
    _Program("asag-data", "asag_evaluation.data.cli", ("check",), ("no-data",)),
    _Program("asag-data", "asag_evaluation.data.cli", ("crowdhuman",), ("no-file", "--output-dir", _NOWHERE)),
    _Program(
        "asag-data",
        "asag_evaluation.data.cli",
        ("scenes",),
        ("--output-dir", _NOWHERE, "--count", "1", "--size", "64"),
    ),
    _Program("asag-eval", "asag_training.evaluation.cli", (), ("--data", "no-data", "no-model")),
    _Program("asag-bench", "asag_bench.cli", ("run",), ("no-bundle",)),
    _Program("asag-bench", "asag_bench.cli", ("throughput",), ("no-bundle",)),
    _Program("asag-bench", "asag_bench.cli", ("compare",), ("no-result", "no-result")),
    _Program("asag-bench", "asag_bench.cli", ("page",), ("--results", "no-results", "--plot", _NOWHERE)),
    _Program("asag-bench", "asag_bench.cli", ("parity",), ("no-bundle",)),
    _Program("asag-bench", "asag_bench.cli", ("training-step",), ("--recipe", "none")),
    _Program("asag-bench", "asag_bench.cli", ("annotations",), ("--images", "0")),
    _Program("asag-bench", "asag_bench.cli", ("nonsense",)),
    _Program("asag-paper", "asag_bench.paper.cli", ("tables",), ("--data", "no-data")),
    _Program(
        "asag-paper", "asag_bench.paper.cli", ("figures",), ("--data", "no-data", "--output-dir", _NOWHERE)
    ),
)
_OPTION = re.compile(r"--[a-z][a-z-]+")
_VALUES = (
    *(
        "",
        "0",
        "1",
        "2",
        "-1",
        "0.5",
        "1e308",
        "nan",
        "inf",
        "-inf",
        "9" * 5000,
        "9" * 30,
        "x",
        "True",
        "1_000",
        "٣",
    ),
    *(
        "two\nlines",
        "\udcff",
        "\u202e",
        "\x1b[2J",
        "a b",
        "'",
        "%s",
        "%(prog)s",
        "{}",
        "-",
        "--",
        "-h",
        "@x",
        "--x=y",
    ),
    *(
        "cpu",
        "cuda",
        "cuda:99",
        "onnxruntime",
        "openvino",
        "onnxruntime,openvino",
        ",",
        "a,b",
        "torch",
        "tensorrt-rtx",
    ),
    *(
        "800x1088",
        "0x0",
        "1x1",
        "x",
        "99999999999x1",
        "P5",
        "exact",
        "fast",
        "fp32",
        "int8",
        "sm86",
        "sm",
        "sm-1",
    ),
    *(
        "network.patch_size=12",
        "network=1",
        "=",
        "a.b.c=1",
        "schedule.epochs=1e9",
        "loss.x={}",
        "network.heads=-1",
    ),
    *(
        "scenes",
        "asag-a-r50-100",
        "main",
        "p3-p6",
        "/dev/null",
        "/",
        ".",
        "..",
        "no/such/file",
        "x" * 5000,
        "/dev/full",
    ),
)


@contextmanager
def open_commands(folder: Path) -> Iterator[Target]:
    """A JSON list: the number of a program, and its arguments."""
    options = [_options_of(program) for program in _PROGRAMS]

    @st.composite
    def lines(draw: DrawFn) -> bytes:
        number = draw(st.integers(0, len(_PROGRAMS) - 1))
        words = []
        for _ in range(draw(st.integers(0, 5))):
            kind = draw(st.sampled_from(("option", "option", "value", "equals", "alone")))
            if kind != "value":
                words.append(draw(st.sampled_from(options[number])))
            value = draw(_values())
            if kind == "equals":
                words[-1] += f"={value}"
            elif kind != "alone":
                words.append(value)
        return json.dumps([number, *words]).encode()

    yield Target(inputs=lines(), run=run)


def _values() -> SearchStrategy[str]:
    return st.one_of(
        st.sampled_from(_VALUES), st.sampled_from(_VALUES), st.integers().map(str), st.floats().map(str)
    )


def run(data: bytes) -> None:
    """Run a program; it has to refuse the line in a sentence, or to have been asked for help."""
    number, *words = json.loads(data)
    program = _PROGRAMS[number]
    code, _, error = _captured(program, [*program.given, *words, *program.last])
    if code == 0:
        return
    if code not in (1, 2):
        raise WrongError(f"exit code {code}")
    lines = [line for line in error.splitlines() if not line.startswith(f"{program.name}: warning: ")]
    if len(lines) != 1 or not lines[0].startswith(f"{program.name}: error: ") or not lines[0].isprintable():
        raise WrongError(f"{program.name} said {error[-2000:]!r}")


def _options_of(program: _Program) -> tuple[str, ...]:
    _, out, _ = _captured(program, [*program.given, "--help"])
    return ("--help", "--version", "--nonsense", *sorted(set(_OPTION.findall(out))))


def _captured(program: _Program, arguments: Sequence[str]) -> tuple[int, str, str]:
    """Run a program with streams that encode as a terminal's do."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict")
    error = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace")
    with redirect_stdout(out), redirect_stderr(error):
        code = program.main(arguments)
    texts = []
    for stream in (out, error):
        stream.flush()
        buffer = stream.buffer
        assert isinstance(buffer, io.BytesIO)
        texts.append(buffer.getvalue().decode())
    return code, texts[0], texts[1]
