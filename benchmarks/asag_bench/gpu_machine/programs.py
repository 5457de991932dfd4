"""Programs with a time limit: what they wrote is kept, and nothing of them is left running."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from asag_deploy.errors import BackendError

WARNINGS = ("-W", "default")
"""Python's options for the programs of the tree: their warnings are shown, and end nothing."""
_GRACE_SECONDS = 5.0
"""For a program to say how far it came, once it is interrupted."""
_LAST_LINES = 12
_MOST_CHARACTERS = 512 * 1024
"""Of what a program wrote: the end."""


@dataclass(kw_only=True)
class Logs:
    """What every program wrote, in the order in which they ended."""

    parts: list[str] = field(default_factory=list)

    def add(self, command: str, text: str, end: str) -> None:
        """Keep the end of it, under the command."""
        cut = f"[{len(text) - _MOST_CHARACTERS} characters before]\n" if len(text) > _MOST_CHARACTERS else ""
        self.parts.append(f"$ {command}\n{cut}{text[-_MOST_CHARACTERS:].rstrip()}\n[{end}]\n")


@dataclass(kw_only=True)
class Program:
    """A program that has been started in a group of its own; what it writes goes to a file."""

    command: Sequence[str]
    process: subprocess.Popen[bytes]
    log: Path
    logs: Logs
    begin: float = field(default_factory=time.monotonic)

    def ends_within(self, seconds: float) -> bool:
        """Wait for it to end by itself, and return whether it has in that time; it goes on if not."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        return self.process.poll() is not None

    def wait(self, limit: float) -> str:
        """Return its output, once it has ended.

        Raises BackendError, with its last lines, if it fails or takes longer than `limit` seconds; then it is
        interrupted, and killed with all that it started if it does not end by itself.
        """
        try:
            in_time = self.ends_within(limit)
        finally:
            self.stop()
        text = self.log.read_text(encoding="utf-8", errors="replace")
        seconds = time.monotonic() - self.begin
        line = shlex.join(self.command)
        code = self.process.returncode
        ended = f"ended with {code}" if in_time else f"was ended after its limit of {limit:.0f} s"
        self.logs.add(line, text, f"{ended}, {seconds:.1f} s")
        if not in_time or code != 0:
            raise BackendError(f"{_name(self.command)} {ended}: {last_lines(text) or 'it wrote nothing'}")
        return text

    def stop(self, grace: float = _GRACE_SECONDS) -> None:
        """End it with all that it started, after so many seconds in which it may do so by itself."""
        if grace and self.process.poll() is None:
            _signal(self.process.pid, signal.SIGINT)
            self.ends_within(grace)
        _signal(self.process.pid, signal.SIGKILL)
        self.process.wait()


def start(
    command: Sequence[str | Path],
    *,
    log: Path,
    logs: Logs,
    cwd: Path,
    environment: Mapping[str, str],
    cores: Sequence[int] = (),
) -> Program:
    """Start a program on these cores (all that this process has if none); `log` is the file for its output.

    Raises BackendError if it cannot be started.
    """
    words = [os.fspath(part) for part in command]
    own = {**os.environ, **environment}
    if cores:
        own |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(len(cores)))
    limit: Callable[[], None] | None = (lambda: os.sched_setaffinity(0, cores)) if cores else None
    try:
        with log.open("wb") as file:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=cwd,
                env=own,
                start_new_session=True,
                preexec_fn=limit,  # no thread has been started here that could hold a lock
            )
    except OSError as error:
        raise BackendError(f"`{shlex.join(words)}` could not be started: {error}") from error
    return Program(command=words, process=process, log=log, logs=logs)


def last_lines(text: str, count: int = _LAST_LINES) -> str:
    """Return the end of what a program wrote, without the lines that only point at others."""
    lines = [line for line in text.strip().splitlines() if line.strip(" ^~")]
    return "\n".join(lines[-count:])


def _name(command: Sequence[str]) -> str:
    """Return what people call it: the module or folder that Python runs, or the program."""
    words = list(command)
    if "-m" in words[:4]:
        return words[words.index("-m") + 1]
    return " ".join(words[3:5]) if words[1:3] == list(WARNINGS) else Path(words[0]).name


def _signal(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)
