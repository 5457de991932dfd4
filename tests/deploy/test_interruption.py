"""Signals end a program in one way, and never in the middle of what is held back."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest

from asag_deploy import interruption
from asag_deploy.command_line import exit_code
from asag_deploy.errors import BackendError, ExportError, OutputError
from asag_deploy.interruption import Interruption, held_back
from support.every_program import PROGRAMS

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_program_that_a_signal_ends(number: signal.Signals, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(number)
    kept = []

    def command() -> int:
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            kept.append("what was done")
            raise
        return 0

    assert exit_code("tool", command) == 128 + number
    assert kept == ["what was done"]
    assert signal.getsignal(number) == before
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("error", [ExportError("traceback"), ImportError("half of it"), BackendError("")])
def test_a_library_that_makes_an_interruption_an_error(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    """PyTorch does, while it traces."""

    def command() -> int:
        try:
            signal.raise_signal(signal.SIGTERM)
        except BaseException:
            raise error from None
        return 0

    assert exit_code("tool", command) == 143
    assert capsys.readouterr() == ("", "")


def _until_interrupted() -> int:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        time.sleep(0.01)
    return 0


def test_a_module_is_imported_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where one in C++ fails in the middle, some end the process."""
    body = "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\nat_its_end = True\n"
    (tmp_path / "interrupts_its_import.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)

    def command() -> int:
        importlib.import_module("interrupts_its_import")
        return _until_interrupted()

    assert exit_code("tool", command) == 143
    assert sys.modules.pop("interrupts_its_import").at_its_end
    assert capsys.readouterr() == ("", "")


def test_a_program_that_is_run_by_an_import_can_be_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs_a_program.py").write_text(
        "import os, signal\nfrom asag_deploy.command_line import exit_code\n"
        "code = exit_code('tool', lambda: os.kill(os.getpid(), signal.SIGINT) or 0)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert importlib.import_module("runs_a_program").code == 130
    del sys.modules["runs_a_program"]


@pytest.mark.parametrize("number", SIGNALS)
def test_an_interruption_in_a_finaliser_is_not_lost(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    """Python can only print what is raised there."""

    class Finalised:
        def __del__(self) -> None:
            signal.raise_signal(number)

    def command() -> int:
        referred, weak = {1}, []
        weak.append(weakref.ref(referred, lambda _: signal.raise_signal(number)))
        del referred
        Finalised()
        return _until_interrupted()

    assert exit_code("tool", command) == 128 + number
    assert capfd.readouterr() == ("", "")


def test_what_else_a_finaliser_raises_is_printed_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    printed: list[sys.UnraisableHookArgs] = []
    monkeypatch.setattr(sys, "unraisablehook", printed.append)

    class Finalised:
        def __del__(self) -> None:
            raise ValueError

    with Interruption():
        Finalised()
    assert [raised.exc_type for raised in printed] == [ValueError]


def test_what_cannot_be_written_after_an_interruption_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> int:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            raise OutputError("no space left")

    assert exit_code("tool", command) == 2
    assert capsys.readouterr().err == "tool: error: no space left\n"


def test_the_exit_code_is_that_of_the_signal_wherever_it_came(tmp_path: Path) -> None:
    """Python itself ends by SIGINT if the KeyboardInterrupt passed through a text that was executed."""
    (tmp_path / "tool.py").write_text(
        "import signal, sys\n"
        "from asag_deploy.command_line import exit_code\n"
        "sys.exit(exit_code('tool', lambda: exec('signal.raise_signal(signal.SIGTERM)')))\n"
    )
    python = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    assert subprocess.run([sys.executable, "-m", "tool"], env=python).returncode == 128 + signal.SIGTERM


ROOT = Path(__file__).parents[2]
BY_MODULE = [("-m", PROGRAMS[name]) for name in ("asag-detect", "demo", "asag-bench")]


@pytest.mark.parametrize("words", [*BY_MODULE, ("training/train.py",), ("benchmarks",)], ids="-".join)
def test_a_signal_while_a_program_imports(words: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "numpy.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    packages = [tmp_path, *(ROOT / name for name in (".", "training", "export", "benchmarks"))]
    python = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, packages))}
    ended = subprocess.run([sys.executable, *words, "--help"], env=python, cwd=ROOT, capture_output=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (128 + signal.SIGINT, b"", b"")


def test_what_is_held_back_ends_first() -> None:
    done: list[str] = []
    with Interruption() as interrupted:
        with pytest.raises(KeyboardInterrupt):
            _be_interrupted_inside(done)
        signal.raise_signal(signal.SIGTERM)  # what saves the work is not interrupted
        interrupted._first_s = 0.0  # so that the next is another request
        with held_back():
            signal.raise_signal(signal.SIGTERM)
    assert done == ["inner", "outer"]
    assert interrupted.signal == signal.SIGINT


def _be_interrupted_inside(done: list[str]) -> None:
    with held_back():
        with held_back():
            signal.raise_signal(signal.SIGINT)
            done.append("inner")
        done.append("outer")


def test_what_is_ignored_is_not_raised_later() -> None:
    with Interruption() as interrupted:
        assert not interrupted.take()
        with interrupted.ignored():
            signal.raise_signal(signal.SIGTERM)
        with held_back():
            assert interrupted.take()


def test_other_threads_hold_nothing_back() -> None:
    entered, leave = threading.Event(), threading.Event()

    def work() -> None:
        with held_back():
            entered.set()
            leave.wait(60)

    with Interruption():
        thread = threading.Thread(target=work)
        thread.start()
        entered.wait(60)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        leave.set()
        thread.join()


def test_who_insists_ends_the_program() -> None:
    script = (
        "import signal\n"
        "from asag_deploy.interruption import Interruption\n"
        "with Interruption() as interrupted, interrupted.ignored():\n"
        "    for _ in range(5):\n"
        "        signal.raise_signal(signal.SIGTERM)\n"
        "    print('as `timeout` sends it', flush=True)\n"
        "    interrupted._first_s = 0.0\n"
        "    signal.raise_signal(signal.SIGTERM)\n"
        "    print('asked again', flush=True)\n"
        "    signal.raise_signal(signal.SIGTERM)\n"
        "    print('still here')\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (-signal.SIGTERM, "")
    assert ended.stdout.splitlines() == ["as `timeout` sends it", "asked again"]


def test_who_insists_ends_the_first_process_of_a_container() -> None:
    script = (
        "import os, signal\n"
        "from asag_deploy.interruption import Interruption\n"
        "os.kill = lambda *_: None  # the system does nothing to that process\n"
        "with Interruption() as interrupted, interrupted.ignored():\n"
        "    for _ in range(3):\n"
        "        interrupted._first_s = 0.0\n"
        "        signal.raise_signal(signal.SIGTERM)\n"
        "    print('still here')\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (128 + signal.SIGTERM, b"", b"")


def test_a_signal_that_is_to_be_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruption() as interrupted:
            os.kill(os.getpid(), signal.SIGHUP)
        assert interrupted.signal is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_library_heeds_no_signals() -> None:
    assert interruption.current().signal is None
    with held_back():
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize("name", ["asag-detect", "another"])
def test_a_thread_that_waits_for_ever_is_left_behind_at_once(name: str, waits: bool, tmp_path: Path) -> None:
    """Libraries are not taken down around it; a program of somebody else ends as it always does."""
    (tmp_path / name).write_text(
        "import atexit, sys, threading\n"
        "from asag_deploy.command_line import exit_code\n"
        "from asag_deploy.interruption import leave_behind\n"
        f"thread = threading.Thread(target=lambda: {waits} and threading.Event().wait(), daemon=True)\n"
        "def command():\n"
        "    thread.start()\n"
        f"    {waits} or thread.join()\n"
        "    leave_behind(thread)\n"
        "    print('found')\n"
        "    return 1\n"
        "atexit.register(print, 'taken down')\n"
        "sys.exit(exit_code('tool', command))\n"
    )
    python = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run([sys.executable, tmp_path / name], env=python, capture_output=True, text=True)
    down = "taken down\n" * (name == "another" or not waits)
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, f"found\n{down}", "")


@pytest.mark.parametrize(
    ("words", "ours"),
    [
        (["asag-detect"], True),
        (["-X", "utf8", "-m", "asag_training_of_mine"], False),
        (["-W", "error", "-m", "asag_evaluation.started"], True),
        (["another.py", "-m", "asag_evaluation"], False),
        (["asag-of-mine.py"], False),
    ],
)
def test_signals_of_other_programs_stay_theirs(words: list[str], ours: bool, tmp_path: Path) -> None:
    """Whatever they are called, and whatever their own options say."""
    text = "import signal, asag_deploy; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    for name in ("asag-detect", "asag_training_of_mine.py", "another.py", "asag-of-mine.py"):
        (tmp_path / name).write_text(text)
    (tmp_path / "asag_evaluation").mkdir()
    (tmp_path / "asag_evaluation" / "__init__.py").touch()
    (tmp_path / "asag_evaluation" / "started.py").write_text(text)
    python = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    ended = subprocess.run(
        [sys.executable, *words], cwd=tmp_path, env=python, capture_output=True, text=True, check=True
    )
    assert ended.stdout == f"{not ours}\n"
