"""What all command line tools do with what stops them."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from asag_deploy._version import __version__
from asag_deploy.command_line import OneSentenceParser, exit_code, printable, progress
from asag_deploy.errors import BundleError, BundleNotFoundError, ConfigError, ImageError, ParityError


def raises(error: BaseException) -> Callable[[], int]:
    def command() -> NoReturn:
        raise error

    return command


@pytest.mark.parametrize("code", [0, 1])
def test_what_a_command_returns(code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("tool", lambda: code) == code
    assert capsys.readouterr() == ("", "")


def test_an_error_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("tool", raises(ConfigError("no such thing: give another"))) == 2
    assert capsys.readouterr() == ("", "tool: error: no such thing: give another\n")


def test_some_errors_have_codes_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    codes = {ParityError: 1, BundleError: 5}
    assert exit_code("tool", raises(ParityError("unlike")), codes) == 1
    assert exit_code("tool", raises(BundleNotFoundError("none")), codes) == 5
    assert exit_code("tool", raises(ConfigError("bad")), codes) == 2
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_other_ends(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("tool", raises(KeyboardInterrupt())) == 130
    assert exit_code("tool", raises(SystemExit())) == 0
    assert exit_code("tool", raises(SystemExit(3))) == 3
    assert capsys.readouterr() == ("", "")


def test_what_nobody_meant_to_raise_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        exit_code("tool", raises(ZeroDivisionError()))


def test_threads_that_cannot_be_started(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise RuntimeError("can't start new thread")

    def command() -> int:
        with monkeypatch.context() as patch:
            for starts in ("_start_new_thread", "_start_joinable_thread"):  # the latter since Python 3.13
                patch.setattr(threading, starts, refuse, raising=False)
            threading.Thread(target=print).start()
        return 0

    assert exit_code("tool", command) == 2
    assert capsys.readouterr().err.startswith("tool: error: no more threads can be started here: allow")


def test_the_working_directory_may_be_gone(tmp_path: Path) -> None:
    """Whatever is named from the root is found; else a sentence says why nothing is."""
    script = (
        "import os, sys\n"
        "folder = sys.argv.pop()\n"
        "os.chdir(folder)\n"
        "os.rmdir(folder)\n"
        "sys.argv[0] = 'program.py'\n"
        "from asag_deploy.atomic import atomic_directory, atomic_write_text\n"
        "from asag_deploy.command_line import exit_code\n"
        "atomic_write_text(folder + '-file', 'results')\n"
        "with atomic_directory(folder + '-made', overwrite=True, marker=''):\n"
        "    pass\n"
        "with atomic_directory(folder + '-made', overwrite=True, marker=''):\n"
        "    pass\n"
        "sys.exit(exit_code('tool', os.getcwd))\n"
    )
    gone = tmp_path / "gone"
    gone.mkdir()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    # -P: with the working directory in the search path, Python 3.13.0 itself fails at what a module lacks.
    ended = subprocess.run(
        [sys.executable, "-P", "-c", script, gone], env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith("tool: error: the working directory is gone: change to another")
    assert {path.name for path in tmp_path.iterdir()} == {"gone-file", "gone-made"}


def test_a_reader_that_has_gone() -> None:
    script = (
        "import sys\n"
        "from asag_deploy.command_line import exit_code\n"
        "sys.exit(exit_code('tool', lambda: print('line\\n' * 100_000) or 0))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read()
        assert process.wait() == 2
    assert errors == ""


@pytest.mark.parametrize(("error", "code"), [("", 0), ("raise ConfigError('bad')", 2)])
@pytest.mark.parametrize("stderr", ["> >(true)", ">/dev/full"])
def test_messages_that_nobody_takes_stop_nothing(stderr: str, error: str, code: int) -> None:
    script = (
        "import os, sys, time\n"
        "from asag_deploy.command_line import exit_code\n"
        "from asag_deploy.errors import ConfigError\n"
        "def command():\n"
        "    time.sleep(0.3)\n"
        "    for _ in range(3):\n"
        "        print('a note', file=sys.stderr)\n"
        "    print('found', flush=True)\n"
        f"    {error}\n"
        "    return 0\n"
        "sys.exit(exit_code('tool', command))\n"
    )
    ended = subprocess.run(
        ["bash", "-c", f'exec "$0" -c "$1" 2{stderr}', sys.executable, script], capture_output=True
    )
    assert (ended.returncode, ended.stdout) == (code, b"found\n")


def test_a_bad_command_line_is_an_error() -> None:
    parser = OneSentenceParser(prog="tool sub")
    parser.add_argument("--number", type=int)
    with pytest.raises(ConfigError, match=r"invalid int value: 'x' \(see tool --help\)"):
        parser.parse_args(["--number", "x"])
    assert parser.parse_args(["--number", "1"]) == argparse.Namespace(number=1)


def test_paths_are_not_empty() -> None:
    parser = OneSentenceParser(prog="tool")
    commands = parser.add_subparsers()
    commands.add_parser("sub").add_argument("--output-dir", type=Path)
    assert parser.parse_args(["sub", "--output-dir", "."]).output_dir == Path()
    with pytest.raises(ConfigError, match="argument --output-dir: an empty path names nothing"):
        parser.parse_args(["sub", "--output-dir", ""])


def test_options_are_not_abbreviated() -> None:
    parser = OneSentenceParser(prog="tool")
    parser.add_argument("--number", type=int)
    with pytest.raises(ConfigError, match="unrecognized arguments: --num 1"):
        parser.parse_args(["--num", "1"])


def test_two_dashes_are_no_value(capsys: pytest.CaptureFixture[str]) -> None:
    parser = OneSentenceParser(prog="tool")
    parser.add_argument("--number", type=int)
    parser.add_argument("words", nargs="*")
    for parse in (parser.parse_args, parser.parse_intermixed_args):
        with pytest.raises(ConfigError, match="argument --number: expected a value, not '--'"):
            parse(["--number=--"])
    assert parser.parse_args(["--number=1", "--", "--x=--"]).words == ["--x=--"]


def test_every_tool_tells_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    parser = OneSentenceParser(prog="tool sub")
    assert exit_code("tool", lambda: int(parser.parse_args(["--version"]).number)) == 0
    assert capsys.readouterr().out == f"tool {__version__}\n"


@pytest.mark.parametrize(
    ("terminal", "quiet", "shown"), [(True, False, True), (True, True, False), (False, False, False)]
)
def test_a_progress_bar_shows_on_a_terminal_alone(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    terminal: bool,
    quiet: bool,
    shown: bool,
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with progress(total=7, unit="image", description="reading", quiet=quiet) as bar:
        bar.update(3)
    assert ("reading" in capsys.readouterr().err) == shown


@pytest.mark.parametrize(
    ("quoted", "shown"),
    [
        ("two\nlines", r"two\nlines"),
        ("\x1b[2Jcleared", r"\x1b[2Jcleared"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("not utf-8 \udcff", r"not utf-8 \udcff"),
        ("straße 写真.png", "straße 写真.png"),
    ],
)
def test_messages_are_one_line_whatever_they_quote(quoted: str, shown: str) -> None:
    assert str(ImageError(f"image '{quoted}' does not exist")) == f"image '{shown}' does not exist"


def test_the_middle_of_a_long_message_is_left_out() -> None:
    message = str(ConfigError(f"the option begins {'x' * 10_000} and ends"))
    assert len(message) < 1300
    assert message.startswith("the option begins xxx")
    assert message.endswith("xxx and ends")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a ü 猫.png", "a ü 猫.png"),
        ("a\nb\r\x1b[31m\t", r"a\nb\r\x1b[31m\t"),
        (os.fsdecode(b"\xff\xfe.png"), r"\xff\xfe.png"),
        ("\u2028\ud800", r"\u2028\ud800"),
    ],
)
def test_names_are_printed_in_one_line(text: str, shown: str) -> None:
    assert printable(text) == shown
    shown.encode()


@pytest.mark.parametrize("closed", ["2>&-", ">&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed(closed: str, tmp_path: Path) -> None:
    """No file of results gets the number of one, where libraries write warnings, and nothing is mixed up."""
    script = (
        "import sys\n"
        "from asag_deploy.command_line import exit_code, progress\n"
        "def command():\n"
        "    with open('results', 'wb') as file, progress(total=1, unit='image') as bar:\n"
        "        assert file.fileno() > 2\n"
        "        print('found', flush=True)\n"
        "        bar.update()\n"
        "        print('a note', file=sys.stderr)\n"
        "    return 0\n"
        "sys.exit(exit_code('tool', command))\n"
    )
    (tmp_path / "asag-detect").write_text(script)
    ended = subprocess.run(
        ["bash", "-c", f"exec '{sys.executable}' asag-detect {closed}"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    found, said = "found\n" * (closed == "2>&-"), "a note\n" * (closed == ">&-")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, found, said)
