"""Addresses of videos that are no files here: rtsp://host/stream, https://host/clip.mp4 and their like."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*):")
_NO_SLASHES = frozenset({"rtp", "udp", "tcp", "srt"})
"""What some write without slashes, as udp:@239.0.0.1:1234."""
_WITH_AN_END = frozenset({"http", "https", "ftp", "sftp", "ftps", "smb"})
_SECRET = re.compile(r"pass|pwd|token|secret|key|auth|sig|credential|session", re.IGNORECASE)


def is_address(text: str) -> bool:
    """Tell whether a source is an address that is no file here."""
    found = _SCHEME.match(text)
    if found is None or found[1].lower() == "file":
        return False
    return text[found.end() :].startswith("//") or found[1].lower() in _NO_SLASHES


def normal(address: str) -> str:
    """Return an address with its scheme in small letters, which is how PyAV knows it."""
    scheme, rest = address.split(":", 1)
    return f"{scheme.lower()}:{rest if rest.startswith('//') else '//' + rest}"


def is_live(address: str) -> bool:
    """Tell whether an address stands for a stream without an end, rather than for a file elsewhere."""
    return address.split(":", 1)[0] not in _WITH_AN_END


def without_secrets(address: str) -> str:
    """Return an address as messages and results may show it: no password, and no key in its query."""
    scheme, rest = address.split("://", 1)
    host, slash, path = re.fullmatch(r"([^/?#]*)(/?)(.*)", rest, re.DOTALL).groups()  # type: ignore[union-attr]
    user, at, place = host.rpartition("@")
    if ":" in user:
        user = f"{user.split(':', 1)[0]}:***"
    path, question, query = path.partition("?")
    shown = "&".join(_without_value(part) for part in query.split("&"))
    return f"{scheme}://{user}{at}{place}{slash}{path}{question}{shown}"


def as_file(argument: str) -> Path:
    """Return the path that an argument stands for, which may be a file:// address."""
    found = _SCHEME.match(argument)
    if found is None or found[1].lower() != "file":
        return Path(argument)
    rest = argument[found.end() :]
    return Path(
        unquote(urlsplit(f"file:{rest}").path if rest.startswith("//") else rest, errors="surrogateescape")
    )


def _without_value(part: str) -> str:
    name, equals, value = part.partition("=")
    return f"{name}=***" if equals and value and _SECRET.search(name) else part
