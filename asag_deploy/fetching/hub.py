"""Files of Hugging Face's hub, by its own client, which keeps them beside what else is fetched."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from asag_deploy.atomic import atomic_write_text
from asag_deploy.errors import BackendError, DownloadError, first_line
from asag_deploy.extras import missing
from asag_deploy.fetching.addresses import WEIGHTS, HubPlace, cache_folder
from asag_deploy.fetching.manifests import MANIFEST, files_named
from asag_deploy.fetching.web import warn_unreachable

_LISTED = 5


class HubFiles:
    """The files of one commit of a repository.

    Raises DownloadError if the hub has no such repository or revision, or neither answers nor was asked
    before; BackendError without huggingface_hub.
    """

    def __init__(self, place: HubPlace) -> None:
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # before it is imported
        try:
            import huggingface_hub
        except ImportError as error:
            raise BackendError(missing(error, "hub", purpose=f"fetching '{place}'")) from None
        self.place = place
        self._cache = cache_folder() / "hub"
        self._api = huggingface_hub.HfApi(
            endpoint=os.environ.get("HF_ENDPOINT") or None, library_name="asag-deploy"
        )
        self._commit: str | None = None
        self._names: tuple[str, ...] | None = None
        if not _is_offline():
            self._ask()

    def names(self) -> tuple[str, ...]:
        """Return the names of all files below the place, as the hub lists them; offline of those kept."""
        if self._names is None:
            root = self._kept_folder()
            if root is None:
                raise DownloadError(
                    f"'{self.place}' was not fetched before, and HF_HUB_OFFLINE says not to ask for it"
                )
            found = (path for path in root.rglob("*") if path.is_file())
            self._names = tuple(path.relative_to(root).as_posix() for path in found)
        path = self.place.path
        return tuple(n for n in sorted(self._names) if not path or n == path or n.startswith(f"{path}/"))

    def get(self, name: str) -> Path:
        """Return a local copy of a file."""
        kept = None if self._commit else self._kept_folder()
        try:
            with _as_download_error(self.place):
                return Path(
                    self._api.hf_hub_download(
                        self.place.repository,
                        name,
                        revision=self._commit or (kept.name if kept is not None else self.place.revision),
                        cache_dir=self._cache,
                        local_files_only=self._commit is None,
                    )
                )
        except _UnreachableError as error:
            raise DownloadError(
                f"'{name}' of '{self.place}' cannot be fetched ({error}): try again"
            ) from None

    def _ask(self) -> None:
        """Find out which commit is meant, so that all files are of one; offline go on with what is kept."""
        try:
            with _as_download_error(self.place):
                info: Any = self._api.model_info(self.place.repository, revision=self.place.revision)
        except _UnreachableError as error:
            if self._kept_folder() is None:
                raise DownloadError(
                    f"'{self.place}' cannot be fetched ({error}): check the network, or HF_ENDPOINT"
                ) from None
            warn_unreachable(str(self.place), str(error))
            return
        self._commit = info.sha
        self._names = tuple(sibling.rfilename for sibling in info.siblings or ())

    def remember(self) -> None:
        """Note which commit the revision is, once all of it is here, for when nobody answers."""
        kept = self._kept_folder()
        if self._commit is not None and (
            kept is None or kept.name != self._commit or not self._reference().is_file()
        ):
            atomic_write_text(self._reference(), self._commit)

    def _folder(self) -> Path:
        return self._cache / f"models--{self.place.repository.replace('/', '--')}"

    def _reference(self) -> Path:
        return self._folder() / "refs" / (self.place.revision or "main")

    def _kept_folder(self) -> Path | None:
        """Return where the files lie of the revision that was fetched last, if any."""
        try:
            commit = self._reference().read_text().strip()
        except OSError:
            commit = self.place.revision or "main"
        found = self._folder() / "snapshots" / commit
        return found if found.is_dir() else None


def hub_bundle(place: HubPlace) -> Path:
    """Return a local folder with the bundle at a place: its manifest and the graphs that this names."""
    files = HubFiles(place)
    manifest = f"{place.path}/{MANIFEST}".lstrip("/")
    names = files.names()
    if manifest not in names:
        folders = [name.removesuffix(f"/{MANIFEST}") for name in names if name.endswith(f"/{MANIFEST}")]
        has = f"; there are some in {', '.join(folders[:_LISTED])}" if folders else ""
        raise DownloadError(f"there is no bundle at '{place}', it holds no {MANIFEST}{has}")
    file = files.get(manifest)
    for name in files_named(file.read_bytes(), str(place)):
        files.get(str(PurePosixPath(manifest).parent / name))
    files.remember()
    return file.parent


def hub_checkpoint(place: HubPlace) -> Path:
    """Return a local copy of the checkpoint at a place: a file, or the only one in a folder."""
    files = HubFiles(place)
    names = files.names()
    name = place.path if place.path in names else _only(place, [n for n in names if n.endswith(WEIGHTS)])
    file = files.get(name)
    files.remember()
    return file


def is_hub_bundle(place: HubPlace) -> bool:
    """Tell whether there is a bundle at a place, rather than a checkpoint."""
    return f"{place.path}/{MANIFEST}".lstrip("/") in HubFiles(place).names()


def _only(place: HubPlace, weights: Sequence[str]) -> str:
    if len(weights) == 1:
        return weights[0]
    if not weights:
        raise DownloadError(f"there is no checkpoint at '{place}': check the address")
    listed = ", ".join(weights[:_LISTED])
    raise DownloadError(
        f"there are {len(weights)} checkpoints at '{place}' ({listed}): name one in the address"
    )


class _UnreachableError(Exception):
    pass


def _is_offline() -> bool:
    from huggingface_hub import constants

    said = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    return said or bool(constants.HF_HUB_OFFLINE)


@contextmanager
def _as_download_error(place: HubPlace) -> Iterator[None]:
    """Raise what the client raises as one sentence."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise DownloadError(
            f"'{place}' is only for those who were granted access: ask for it on its page, and log in with "
            "`hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise DownloadError(
            f"there is no repository '{place.repository}', or it is private: check the address, or log in "
            "with `hf auth login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise DownloadError(f"there is no revision '{place.revision}' of '{place.repository}'") from None
    except errors.LocalEntryNotFoundError as error:
        raise DownloadError(
            f"'{place}' was not fetched before, and cannot be now: check the network, and HF_HUB_OFFLINE "
            f"({first_line(error)})"
        ) from None
    except errors.EntryNotFoundError:
        raise DownloadError(f"a file of '{place}' is not there: check the address") from None
    except errors.HfHubHTTPError as error:
        raise _UnreachableError(first_line(error)) from None
    except errors.HFValidationError as error:
        raise DownloadError(f"'{place}' is no address of the hub: {first_line(error)}") from None
    except OSError as error:
        if error.errno is None:  # of a connection, by whatever library
            raise _UnreachableError(first_line(error)) from None
        raise DownloadError(
            f"'{place}' cannot be kept in '{cache_folder()}' ({(error.strerror or '').lower()}): free some "
            "room, or set ASAG_CACHE_DIR to another folder"
        ) from None
    except Exception as error:
        if "Connect" not in type(error).__name__ and "Timeout" not in type(error).__name__:
            raise
        raise _UnreachableError(first_line(error)) from None
