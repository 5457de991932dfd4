"""Files by http and https, by the standard library: fetched whole or not at all, kept, and asked for anew.

What is kept lies under the SHA-256 of its content, so that nothing which is in use ever changes.  The server
is asked each time whether it has something newer; where it cannot be reached, what is kept is taken.
"""

from __future__ import annotations

import base64
import errno
import fcntl
import hashlib
import http.client
import json
import os
import re
import shutil
import sys
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from http.client import HTTPMessage
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote, urlsplit

from tqdm import tqdm

from asag_deploy._version import __version__
from asag_deploy.atomic import atomic_write_text
from asag_deploy.errors import DownloadError, first_line, plural
from asag_deploy.fetching.addresses import as_asked, cache_folder, shown
from asag_deploy.plain_numbers import unsigned

MOST_BYTES = 16 * 2**30
"""Of a file; no checkpoint of a detector is nearly so large."""

_MIB = 2**20
_SECONDS = 30.0
"""Without a byte, after which a server has gone."""
_ATTEMPTS = 3
_LOGIN = "Authorization"
_ENTRY, _PARTIAL, _PARTIAL_ENTRY = "entry.json", "partial", "partial.json"
_UNFIT = re.compile(r"[^\w.+-]+")
_FULL = (errno.ENOSPC, errno.EDQUOT)
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


class UnreachableError(Exception):
    """No answer, or one of which the server itself says that it is at fault."""


class _BrokenOffError(Exception):
    """The connection ended before the file did."""


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """What was fetched from an address."""

    file: str
    """Below the folder of the address."""
    size: int
    etag: str | None
    modified: str | None


def download(address: str, *, most: int = MOST_BYTES) -> Path:
    """Return a local file with what is at an address now; it never changes afterwards.

    most: bytes, above which a file is refused.  Warns (RuntimeWarning) where the server cannot be reached and
    what was fetched before is taken.  Raises DownloadError if there is nothing at the address, nothing is
    reached and nothing kept, the file is too large, or there is no room for it.
    """
    place = cache_folder() / "web" / hashlib.sha256(address.encode()).hexdigest()[:32]
    with _as_download_error(address), _locked(place):
        kept = _read_entry(place)
        try:
            return _newest(address, place, kept, most)
        except UnreachableError as error:
            if kept is None:
                goes_on = _headers(place, kept)[1] > 0
                raise DownloadError(
                    f"'{shown(address)}' cannot be fetched ({error}): check the address and the network"
                    + ("; what came is kept, and goes on when you try again" if goes_on else "")
                ) from None
            warn_unreachable(address, str(error))
            return place / kept.file


def warn_unreachable(address: str, why: str) -> None:
    """Warn that what is kept is taken, since nobody answers."""
    message = (
        f"'{shown(address)}' cannot be asked for anything newer ({why}): what was fetched before is taken"
    )
    warnings.warn(message, RuntimeWarning, stacklevel=5)


@contextmanager
def _as_download_error(address: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise DownloadError(
            f"'{shown(address)}' cannot be kept in '{cache_folder()}' ({reason}): "
            + ("free some room" if error.errno in _FULL else "make it writable")
            + ", or set ASAG_CACHE_DIR to another folder"
        ) from None


@contextmanager
def _locked(place: Path) -> Iterator[None]:
    """Let one process at a time fetch from an address; the others then find what it fetched.

    What is kept where nothing can be written is taken without a lock.
    """
    with ExitStack() as stack:
        try:
            place.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((place / "lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _READ_ONLY or _read_entry(place) is None:
                raise
        yield


def _read_entry(place: Path) -> _Kept | None:
    try:
        kept = _Kept(**json.loads((place / _ENTRY).read_bytes()))
        return kept if (place / kept.file).stat().st_size == kept.size else None
    except (OSError, ValueError, TypeError):
        return None


def _newest(address: str, place: Path, kept: _Kept | None, most: int) -> Path:
    """Return the file that is kept if the server has no other, or fetch it; in several pieces if need be."""
    for attempt in range(_ATTEMPTS):
        headers, offset = _headers(place, kept)
        try:
            with _open(address, headers) as response:
                if response.status != http.HTTPStatus.PARTIAL_CONTENT:
                    offset = 0
                elif not response.headers.get("Content-Range", "").startswith(f"bytes {offset}-"):
                    (place / _PARTIAL_ENTRY).unlink(missing_ok=True)  # another piece than was asked for
                    continue
                _receive(address, response, place, offset, most)
                return _keep(address, place, response.headers)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == http.HTTPStatus.NOT_MODIFIED and kept is not None:
                return place / kept.file
            if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                (place / _PARTIAL_ENTRY).unlink(missing_ok=True)
                continue
            if error.code >= 500 or error.code == http.HTTPStatus.TOO_MANY_REQUESTS:
                raise UnreachableError(f"the server answers {error.code} {error.reason}".strip()) from None
            raise DownloadError(_refusal(address, error)) from None
        except (urllib.error.URLError, http.client.HTTPException, UnicodeError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise UnreachableError(_said(reason)) from None
        except _BrokenOffError as error:
            if attempt == _ATTEMPTS - 1:
                raise UnreachableError(str(error)) from None
    raise UnreachableError("it never comes whole")


def _refusal(address: str, error: urllib.error.HTTPError) -> str:
    """Return a sentence on an answer that will be the same the next time."""
    said = f"{error.code} {error.reason}".strip()
    if error.code in (http.HTTPStatus.UNAUTHORIZED, http.HTTPStatus.FORBIDDEN):
        return (
            f"'{shown(address)}' needs a login, or is not for you ({said}): give one as "
            "https://user:password@host/path, or ask whoever serves it"
        )
    if error.code in range(300, 400):
        to = error.headers.get("Location", "")
        if urlsplit(to).scheme not in ("", "http", "https"):
            return (
                f"'{shown(address)}' leads to '{shown(to)}', which is neither http nor https: it is refused"
            )
        return f"'{shown(address)}' redirects in circles, or to nowhere ({error.code}): check the address"
    return f"there is nothing at '{shown(address)}' ({said}): check the address"


def _said(reason: Any) -> str:
    if isinstance(reason, OSError) and reason.strerror:
        return reason.strerror.lower()
    return first_line(reason) if isinstance(reason, BaseException) else str(reason)


def _headers(place: Path, kept: _Kept | None) -> tuple[dict[str, str], int]:
    """Return what to ask with, and how many bytes are here already of what is asked for."""
    headers = {"User-Agent": f"asag-deploy/{__version__}", "Accept-Encoding": "identity"}
    try:
        begun = str(json.loads((place / _PARTIAL_ENTRY).read_bytes())["etag"])
        offset = (place / _PARTIAL).stat().st_size
    except (OSError, ValueError, LookupError, TypeError):
        offset, begun = 0, ""
    if offset:
        return headers | {"Range": f"bytes={offset}-", "If-Range": begun}, offset
    if kept is not None and kept.etag:
        headers["If-None-Match"] = kept.etag
    elif kept is not None and kept.modified:
        headers["If-Modified-Since"] = kept.modified
    return headers, 0


class _Redirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        """Follow, but never from https to what anybody may alter on its way."""
        if req.full_url.startswith("https:") and not newurl.startswith("https:"):
            raise DownloadError(
                f"'{shown(req.full_url)}' leads to '{shown(newurl)}', which is not https: give that address "
                "itself"
            )
        address, _ = as_asked(newurl)
        request = super().redirect_request(req, fp, code, msg, headers, address)
        login = req.unredirected_hdrs.get(_LOGIN)
        if request is not None and login and urlsplit(address).netloc == urlsplit(req.full_url).netloc:
            request.add_unredirected_header(_LOGIN, login)  # which no other host is to see
        return request


def _open(address: str, headers: dict[str, str]) -> http.client.HTTPResponse:
    """Ask for an address; only http and https are spoken, whatever it leads to."""
    opener = urllib.request.OpenerDirector()
    handlers: tuple[urllib.request.BaseHandler, ...] = (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
        _Redirects(),
    )
    for handler in handlers:
        opener.add_handler(handler)
    asked, login = as_asked(address)
    request = urllib.request.Request(asked, headers=headers)
    if login is not None:
        coded = base64.b64encode(login.encode()).decode()
        request.add_unredirected_header(_LOGIN, f"Basic {coded}")
    try:
        response: http.client.HTTPResponse = opener.open(request, timeout=_SECONDS)
    except (urllib.error.HTTPError, urllib.error.URLError):
        raise
    except OSError as error:  # such as a connection that is reset before its answer
        raise urllib.error.URLError(error) from error
    return response


def _receive(address: str, response: http.client.HTTPResponse, place: Path, offset: int, most: int) -> None:
    """Write what comes to the partial file, from `offset` on, until it is whole."""
    length = unsigned(response.headers.get("Content-Length", ""))
    total = None if length is None else offset + length
    if (total or 0) > most:
        raise DownloadError(f"'{shown(address)}' is {_mib(total)} MiB, more than {_mib(most)}: it is refused")
    free = shutil.disk_usage(place).free
    if total is not None and total - offset > free:
        raise DownloadError(
            f"'{shown(address)}' takes {_mib(total - offset)} MiB, but there is room for {_mib(free)} in "
            f"'{cache_folder()}': free some, or set ASAG_CACHE_DIR to another folder"
        )
    etag = response.headers.get("ETag", "")
    if etag and not etag.startswith("W/"):
        atomic_write_text(place / _PARTIAL_ENTRY, json.dumps({"etag": etag}))
    else:
        (place / _PARTIAL_ENTRY).unlink(missing_ok=True)
    name = _name(address)
    done = offset
    with (
        (place / _PARTIAL).open("r+b" if offset else "wb") as file,
        tqdm(
            total=total, initial=offset, desc=name, unit="B", unit_scale=True, unit_divisor=1024,
            delay=2, disable=None, file=sys.stderr,
        ) as bar,
    ):  # fmt: skip
        file.seek(offset)
        file.truncate()
        while True:
            try:
                piece = response.read(_MIB)
            except (OSError, http.client.HTTPException) as error:
                raise _BrokenOffError(f"it broke off after {plural(done, 'byte')}: {_said(error)}") from None
            if not piece:
                break
            file.write(piece)
            done += len(piece)
            bar.update(len(piece))
            if done > most:
                (place / _PARTIAL_ENTRY).unlink(missing_ok=True)
                file.truncate(0)
                raise DownloadError(f"'{shown(address)}' is more than {_mib(most)} MiB: it is refused")
        file.flush()
        os.fsync(file.fileno())
    if total is not None and done != total:
        raise _BrokenOffError(f"it broke off after {done} of {plural(total, 'byte')}")


def _keep(address: str, place: Path, headers: HTTPMessage) -> Path:
    """Move what is whole under the SHA-256 of its content, and remember it."""
    partial = place / _PARTIAL
    with partial.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    final = place / digest[:32] / _name(address)
    final.parent.mkdir(exist_ok=True)
    kept = _Kept(
        file=final.relative_to(place).as_posix(),
        size=partial.stat().st_size,
        etag=headers.get("ETag"),
        modified=headers.get("Last-Modified"),
    )
    partial.replace(final)
    (place / _PARTIAL_ENTRY).unlink(missing_ok=True)
    atomic_write_text(place / _ENTRY, json.dumps(asdict(kept)))
    return final


def _name(address: str) -> str:
    """Return a name for the file at an address that any file system takes."""
    last = unquote(urlsplit(address).path.rstrip("/").rpartition("/")[2])
    return _UNFIT.sub("_", last).lstrip(".")[-100:] or "file"


def _mib(count: int | None) -> str:
    return f"{(count or 0) / _MIB:.0f}"
