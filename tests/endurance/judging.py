"""What an input does to the product, judged: it is taken, or refused in one sentence, and nothing else."""

from __future__ import annotations

import contextlib
import os
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis.strategies import SearchStrategy

from asag_deploy.errors import AsagError

ROOT = Path(__file__).parents[2]
CORPUS = Path(__file__).parent / "corpus"
MOST_CPU_SECONDS = 5.0
_LONGEST_SENTENCE = 1500


class WrongError(AssertionError):
    """What a target says of an input that was taken, but came out wrong."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """Something that reads what comes from outside.

    `run` takes the input, and raises an AsagError to refuse it.
    """

    inputs: SearchStrategy[bytes]
    run: Callable[[bytes], object]
    names: tuple[str, ...] = ()
    """A refusal names one of these; empty if it need not."""


Opened = Callable[[Path], contextlib.AbstractContextManager[Target]]
"""Prepares a target in an empty folder, which it may use; whatever else appears in it was left behind."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """An input that was neither taken nor refused as it should be."""

    signature: str
    """The same for inputs that fail in the same way."""
    text: str
    data: bytes = field(repr=False)


class Judge:
    """Runs a target on inputs, and counts what came of them."""

    def __init__(self, target: Target, folder: Path) -> None:
        self.target = target
        self.folder = folder
        self.counts: Counter[str] = Counter()
        """By `taken` or the type of the refusal."""
        self._kept = _files(folder)

    def __call__(self, data: bytes) -> Finding | None:
        """Run the target on an input; None if all is well."""
        begin = time.process_time()
        finding = self._run(data)
        seconds = time.process_time() - begin
        left = _files(self.folder) - self._kept
        if finding is None and left:
            finding = Finding(signature="left files", text=f"left behind: {sorted(left)[:3]}", data=data)
        for path in left:
            with contextlib.suppress(OSError):
                Path(path).unlink()
        if finding is None and seconds > MOST_CPU_SECONDS:
            finding = Finding(signature="slow", text=f"took {seconds:.1f} seconds of CPU time", data=data)
        return finding

    def _run(self, data: bytes) -> Finding | None:
        try:
            self.target.run(data)
        except AsagError as error:
            self.counts[type(error).__name__] += 1
            wrong = self._wrong_with(str(error))
            if wrong is None:
                return None
            where = _innermost(error)
            return Finding(signature=f"{wrong} {where}", text=f"{where}: {wrong}: {str(error)!r}", data=data)
        except Exception as error:  # which is what is looked for
            text = "".join(traceback.format_exception(error, limit=-12))
            return Finding(signature=f"{type(error).__name__} {_innermost(error)}", text=text, data=data)
        self.counts["taken"] += 1
        return None

    def _wrong_with(self, sentence: str) -> str | None:
        if not sentence:
            return "says nothing"
        if not sentence.replace("\xa0", " ").isprintable():
            return "is not one printable line"
        if len(sentence) > _LONGEST_SENTENCE:
            return "goes on for too long"
        if self.target.names and not any(name in sentence for name in self.target.names):
            return "names no file"
        return None


def _files(folder: Path) -> set[str]:
    return {f"{where}/{name}" for where, _, names in os.walk(folder) for name in names}


def _innermost(error: BaseException) -> str:
    """Return the last line of the project that an error came through."""
    here = str(Path(__file__).parent)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(str(ROOT))]
    own = [f for f in frames if not f.filename.startswith(here) and "/.venv" not in f.filename] or frames
    return f"{Path(own[-1].filename).name}:{own[-1].name}" if own else "nowhere"


def corpus_of(name: str) -> Iterator[Path]:
    """Yield the kept inputs of a target."""
    folder = CORPUS / name
    return iter(sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else [])
