"""Looking at the texts and names in what torch.save wrote."""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

_LONGEST_WORD = 8192
_LARGEST_PICKLE = 64 * 2**20
_PICKLES = 5
"""As many begin a file in PyTorch's old format; after them come the weights."""
_BYTES = "latin1"
_PROTOCOL = 2
_SHARDED = ("torch.distributed.", "deepspeed.")
_PROGRAMS = frozenset(
    "builtins __builtin__ os posix nt sys subprocess socket shutil runpy importlib code pty ctypes".split()  # noqa: SIM905
)
"""Modules that no checkpoint has objects of, but for those that are known to be harmless."""
_WORD = re.compile(r"\S+")


def longest_word(path: Path) -> int | None:
    """Return how long the longest text without a space is in a file's pickles, if it is longer than usual.

    Where such a text stands in the place of something else, PyTorch says so in a message that it then goes
    through in time that grows with the square of the text's length: a damaged file of some megabytes would
    take it days.  Nobody who saves weights writes such texts, but for bytes, which pickles write as one.
    """
    found = 0
    # A damaged pickle is PyTorch's to refuse: it reads no further than this does.
    with suppress(Exception):
        for stream in _pickles(path):
            for text in _texts(stream):
                if len(text) > _LONGEST_WORD:
                    found = max([found, *(len(word) for word in _WORD.findall(text))])
    return found if found > _LONGEST_WORD else None


def newer_protocol(path: Path) -> int | None:
    """Return pickle's protocol in which a file was saved, if it is above 2, torch.save's own."""
    with suppress(Exception):  # whoever reads it says what is wrong with it
        for stream in _pickles(path):
            first = stream.read(2)
            return first[1] if first[:1] == pickle.PROTO and first[1] > _PROTOCOL else None
    return None


def is_never_read(name: str) -> bool:
    """Tell whether a file is refused for what it names: a part of a checkpoint in shards, or a program."""
    return name.startswith(_SHARDED) or name.partition(".")[0] in _PROGRAMS


def refused_class(path: Path, name: str) -> str:
    """Say that a file cannot be read because of a class or function that its pickle names."""
    if name.startswith(_SHARDED):
        return (
            f"'{path}' is one part of a checkpoint in shards ({name}): gather the whole state dict in one "
            "process, and save that"
        )
    return (
        f"'{path}' holds pickled code ({name}), which is never run: save its weights alone, "
        f"with torch.save(model.state_dict(), ...), where it was made"
    )


def _texts(stream: IO[bytes]) -> Iterator[str]:
    """Yield every text of a pickle but those that stand for bytes, which the name of their coding follows."""
    known: dict[int, str] = {}
    before: str | None = None
    latest: str | None = None
    try:
        for instruction, argument, _ in pickletools.genops(stream):
            if isinstance(argument, int) and instruction.name in ("BINPUT", "LONG_BINPUT"):
                if latest is not None:
                    known[argument] = latest
                continue
            if isinstance(argument, int) and instruction.name in ("BINGET", "LONG_BINGET"):
                latest = known.get(argument)
            else:
                latest = argument if isinstance(argument, str) else None
            if latest is not None:
                if before is not None and latest != _BYTES:
                    yield before
                before = latest
    finally:
        if before is not None:
            yield before


def _pickles(path: Path) -> Iterator[IO[bytes]]:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if member.filename.endswith("data.pkl") and member.file_size <= _LARGEST_PICKLE:
                    yield io.BytesIO(archive.read(member))
        return
    with path.open("rb") as file:
        for _ in range(_PICKLES):
            yield file
