"""What the command line tools have in common."""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, cast

from tqdm import tqdm

from asag_deploy import extras
from asag_deploy._start import IS_PROGRAM
from asag_deploy._version import __version__
from asag_deploy.errors import AsagError, ConfigError, OutputError, first_line
from asag_deploy.interruption import Interruption, end_without_what_is_left
from asag_deploy.plain_numbers import LARGEST, real, whole

ALL_FINE, SOME_FAILED, NOTHING_DONE = 0, 1, 2
"""Exit codes; a program that a signal ends has 128 and the signal's number, see `interruption`."""

_NO_OTHER_CODES: Mapping[type[AsagError], int] = MappingProxyType({})


MOST_THREADS = 1024
"""More than any machine has cores; libraries start as many as they are told to."""
MOST_PIXELS = 65_535
"""Of a side of an image."""
MOST_SECONDS = 30 * 24 * 3600.0
_MEMORY = "/dev/shm"

_NO_THREAD = "can't start new thread"
"""As Python says it; it has no exception of its own for that."""
_MORE_THREADS = (
    "no more threads can be started here: allow more processes (`ulimit -u`, a container's --pids-limit) or "
    "more memory"
)

_WRONG_NUMBER = re.compile(r"argument (?:-\w/)?(--[\w-]+): is ")


class OneSentenceParser(argparse.ArgumentParser):
    """Report a bad command line like the project's other errors: in one sentence, without the usage.

    Options cannot be abbreviated, so that a new one never changes what an old command means.  Paths cannot be
    empty.
    """

    def __init__(self, **given: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **given})
        program = self.prog.split()[0]
        self.register("type", Path, _path)
        self.add_argument("--version", action="version", version=f"{program} {__version__}")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse `--option=--`, which argparse takes for an empty list until Python 3.12."""
        words = sys.argv[1:] if args is None else list(args)
        for word in itertools.takewhile(lambda word: word != "--", words):
            if word.startswith("--") and word.endswith("=--"):
                self.error(f"argument {word.partition('=')[0]}: expected a value, not '--'")
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError instead of printing the usage and exiting."""
        said = _WRONG_NUMBER.sub(r"\1 is ", message)
        raise ConfigError(f"{said} (see {self.prog.split()[0]} --help)")


def _path(text: str) -> Path:
    """Read a path; an empty one, as of a variable that is not set, would be the working directory."""
    if not text:
        raise argparse.ArgumentTypeError("an empty path names nothing")
    return Path(text)


def exit_code(
    program: str, command: Callable[[], int], codes: Mapping[type[AsagError], int] = _NO_OTHER_CODES
) -> int:
    """Run a command and return its exit code.

    What `command` returns, if nothing stops it.  An AsagError is printed to stderr as one sentence and gives
    what `codes` says of its type, or 2; so do a package that is not installed, a file or a system that
    fails, and memory or threads that run out.  Ctrl-C gives 130, SIGTERM 143 and SIGHUP 129, each after the
    command has kept what it keeps at a KeyboardInterrupt.  A reader of the output that has gone, such as
    `head`, gives 2, and so does an output that takes no more; messages on stderr that nobody takes stop
    nothing.  argparse's own exits, after --help or --version, are taken as they are.
    """
    if IS_PROGRAM:
        say_warnings(program)
    with _messages(), Interruption() as interruption:
        try:
            code = _exit_code(program, lambda: _uncovered(command, interruption), codes)
        except KeyboardInterrupt:
            # Where it came within an `exec` of a text, as dataclasses do, `python -m` would end by SIGINT,
            # whatever the exit code: the next one makes Python forget it.
            exec("")
            code = interruption.exit_code
    if IS_PROGRAM:
        end_without_what_is_left(code)
    return code


def say_warnings(program: str) -> None:
    """Let Python's warnings be one sentence each on stderr from now on, without file and line."""

    def say(message: Warning | str, *where: Any, **place: Any) -> None:
        with contextlib.suppress(OSError):
            one_line = " ".join(str(message).split())
            tqdm.write(f"{program}: warning: {printable(one_line)}", file=sys.stderr)

    warnings.showwarning = cast(Any, say)


def _uncovered(command: Callable[[], int], interruption: Interruption) -> int:
    """Run a command; raise KeyboardInterrupt where a library has made another exception of it.

    PyTorch does, while it traces.  What could not be written in the end remains an error.
    """
    try:
        return command()
    except OutputError:
        raise
    except (AsagError, ImportError):
        if interruption.was_raised:
            raise KeyboardInterrupt from None
        raise


def _exit_code(program: str, command: Callable[[], int], codes: Mapping[type[AsagError], int]) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):  # names that the terminal has no letters for
        sys.stdout.reconfigure(errors="backslashreplace")
    problem: OSError | None = None
    _settle_on_a_temporary_folder()
    try:
        code = command()
    except AsagError as error:
        _say(program, str(error))
        code = next((code for kind, code in codes.items() if isinstance(error, kind)), NOTHING_DONE)
    except ImportError as error:
        if extras.is_own(error):
            raise
        code = _say(program, extras.missing(error, program))
    except SystemExit as stop:
        code = int(stop.code or ALL_FINE)
    except OSError as error:
        problem = error if isinstance(error, BrokenPipeError) else _output_fails()
        code = _say(program, _what_failed(error)) if problem is None else NOTHING_DONE
    except MemoryError:
        code = _say(program, "this machine has not enough memory for it")
    except RuntimeError as error:
        if str(error) != _NO_THREAD:
            raise
        code = _say(program, _MORE_THREADS)
    problem = problem or _output_fails()
    if problem is None:
        return code
    if not isinstance(problem, BrokenPipeError):
        reason = (problem.strerror or str(problem)).lower()
        _say(program, f"could not write the output: {reason}")
    # What is still buffered would fail again when Python ends.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return NOTHING_DONE


def _say(program: str, problem: str) -> int:
    print(f"{program}: error: {printable(problem)}", file=sys.stderr)
    return NOTHING_DONE


def _what_failed(error: OSError) -> str:
    if error.filename is None and isinstance(error, FileNotFoundError):
        try:
            os.getcwd()  # noqa: PTH109 (which Path's fails as)
        except FileNotFoundError:
            return "the working directory is gone: change to another, or give paths from the root"
    place = "" if error.filename is None else f"'{error.filename}': "
    return place + (first_line(error) if error.strerror is None else error.strerror.lower())


class _Messages(io.TextIOWrapper):
    """What stderr takes, as long as it takes anything; a gone reader or a full disk costs no results."""

    def write(self, text: str, /) -> int:
        with self._dropping():
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with self._dropping():
            super().flush()

    @contextlib.contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())


@contextlib.contextmanager
def only_own_messages() -> Iterator[None]:
    """Let what libraries and the processes that they start print go nowhere, and our messages on stderr on.

    What Python prints on stdout is theirs too, so print results after this.
    """
    if (
        not isinstance(sys.stderr, io.TextIOWrapper) or sys.stderr.fileno() != _STDERR
    ):  # another's, as a test's
        with contextlib.redirect_stdout(io.StringIO()):
            yield
        return
    before = sys.stderr
    before.flush()
    own = os.dup(_STDERR)
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), _STDERR)
    sys.stderr = _Messages(
        io.FileIO(own, "w"), encoding=before.encoding, errors=before.errors, write_through=True
    )
    _kept.append(sys.stderr)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        os.dup2(own, _STDERR)
        sys.stderr = before


_STDERR = 2
_kept: list[_Messages] = []
"""Those that loggers may still write to; one that nobody holds would close stderr."""


@contextlib.contextmanager
def _messages() -> Iterator[None]:
    """Print messages so that they stop nothing, on the stderr that the program was started with."""
    before = sys.stderr
    if before is not sys.__stderr__ or not isinstance(before, io.TextIOWrapper):
        yield
        return
    messages = _Messages(
        before.buffer, encoding=before.encoding, errors=before.errors, line_buffering=True, write_through=True
    )
    sys.stderr = messages
    try:
        yield
    finally:
        sys.stderr = before
        _kept.append(messages)


def _settle_on_a_temporary_folder() -> None:
    """Let libraries have one in memory where no usual place can be written, as in a read-only container.

    Those that only ask for its name, as PyTorch does, go on where nothing is writable at all.
    """
    try:
        tempfile.gettempdir()
    except OSError:
        named = str(Path(os.environ.get("TMPDIR") or "/tmp").absolute())
        tempfile.tempdir = _MEMORY if os.access(_MEMORY, os.W_OK | os.X_OK) else named


def _output_fails() -> OSError | None:
    """Return what stops stdout from taking what has been printed, if something does."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        return error
    return None


def printable(text: str) -> str:
    """Return a text in one line: what would move the cursor, or is no letter, becomes an escape."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else _escaped(letter) for letter in text)


def _escaped(letter: str) -> str:
    code = ord(letter)
    if 0xDC80 <= code <= 0xDCFF:  # how Python holds a byte of a file name that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return letter.encode("unicode_escape").decode()


def whole_number(least: int, most: int = LARGEST) -> Callable[[str], int]:
    """Return what reads a whole number of an option, from `least` to `most`."""

    def read(text: str) -> int:
        number = whole(text)
        if number is None or not least <= number <= most:
            raise argparse.ArgumentTypeError(f"is {text}; it must be a whole number from {least} to {most}")
        return number

    return read


def real_number(least: float, most: float, *, above: bool = False) -> Callable[[str], float]:
    """Return what reads a number of an option, from `least` (or `above` it) to `most`."""

    def read(text: str) -> float:
        number = real(text)
        if number is None or not least <= number <= most or (above and number == least):
            begins = (
                f"more than {least:g}, {most:.15g} at most" if above else f"from {least:g} to {most:.15g}"
            )
            raise argparse.ArgumentTypeError(f"is {text}; it must be {begins}")
        return number

    return read


def numbers(read: Callable[[str], float]) -> Callable[[str], str]:
    """Return what takes several numbers with commas, each of which `read` reads, as they are."""

    def check(text: str) -> str:
        for part in text.split(","):
            read(part)
        return text

    return check


def listed(values: Sequence[str]) -> tuple[str, ...]:
    """Return an option's values, each once, whether given with commas or by giving the option again."""
    return tuple(dict.fromkeys(part for value in values for part in value.split(",")))


def progress(
    *,
    total: int | None = None,
    done: int = 0,
    unit: str,
    description: str | None = None,
    quiet: bool = False,
) -> tqdm[NoReturn]:
    """Open a progress bar on stderr, a context manager; it shows only on a terminal, and not if `quiet`.

    total: how many units there are; None if nobody knows.  done: how many were done before.
    """
    off = True if quiet else None  # None: only where stderr is no terminal
    return tqdm(
        total=total, initial=done, unit=unit, desc=description, file=sys.stderr, disable=off, leave=False
    )


def add_threshold(parser: argparse.ArgumentParser, text: str = "least confidence") -> None:
    """Add `--threshold`, a confidence from 0 to 1; `text` says what it is of."""
    parser.add_argument(
        "--threshold",
        type=real_number(0, 1),
        default=0.3,
        metavar="T",
        help=f"{text} (default: %(default)s)",
    )


def add_listening(parser: argparse.ArgumentParser, *, port: int) -> None:
    """Add `--host` and `--port` of a program that listens, by default on this machine alone, at `port`."""
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 is all (default: %(default)s)"
    )
    parser.add_argument(
        "--port",
        type=whole_number(0, 65_535),
        default=port,
        metavar="N",
        help="0 is any free one (default: %(default)s)",
    )
