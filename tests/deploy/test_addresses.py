"""What is an address, of which kind, and what of it is shown."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from asag_deploy.bundle.bundle import Bundle
from asag_deploy.errors import BundleNotFoundError, DownloadError
from asag_deploy.fetching.addresses import address_of, cache_folder, hub_place, shown
from asag_deploy.fetching.locate import local_bundle, local_checkpoint, local_model


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ("hf://org/repo", "hf://org/repo"),
        (Path("hf://org/repo/x@v1"), "hf://org/repo/x@v1"),
        (Path("HTTPS://host/a.zip?token=1"), "https://host/a.zip?token=1"),
        ("http://host", "http://host"),
        ("bundle", None),
        ("/hf:/x", None),
        ("C:/x", None),
        ("https", None),
        ("http:x", None),
    ],
)
def test_what_is_one(given: str | Path, address: str | None) -> None:
    assert address_of(given) == address


@pytest.mark.parametrize(
    "given",
    [
        "http://[::1/x.zip",
        "http://me:word@[::1/x.zip",
        "http://host:port/x",
        "http://a..b/x",
        "http://",
        "hf://",
        Path("http://"),
        "http:///x.zip",
        Path("http:///x.zip"),
        "http://?x",
        "s3://me:word@a/b",
        Path("s3://a/b"),
        "ftp://host/x",
        "file:///x",
    ],
)
def test_what_is_none(given: str | Path) -> None:
    for local in (local_bundle, local_checkpoint, local_model):
        with pytest.raises(DownloadError, match=r"' is no address.*: expected hf://.*, or a path") as caught:
            local(given)
        assert "word" not in str(caught.value)


@pytest.mark.parametrize(
    "given", ["s3://a/b", "ftp://127.0.0.1/x.zip", "gs://a/b?x", "file:///x", "http://a..b/x"]
)
def test_what_is_none_is_said_as_it_was_typed(given: str) -> None:
    typed = given.partition("?")[0]
    for as_read in (given, Path(given)):
        with pytest.raises(DownloadError, match=f"^'{re.escape(typed)}' is no address"):
            local_bundle(as_read)
    with pytest.raises(DownloadError, match=r"^'s3:/a' is no address"):
        local_bundle("s3:/a")


def test_a_path_that_looks_like_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s3:" / "a").mkdir(parents=True)
    assert local_bundle("s3:/a") == Path("s3:/a")


def test_places_on_the_hub() -> None:
    assert hub_place("hf://org/repo") == ("org/repo", "", None)
    assert hub_place("hf://org/repo/a/b.pth@refs/pr/1") == ("org/repo", "a/b.pth", "refs/pr/1")
    assert str(hub_place("hf://org/repo/a@v1")) == "hf://org/repo/a@v1"
    assert hub_place("http://x/y") is None


@pytest.mark.parametrize(
    "address",
    [
        "hf://org",
        "hf://org/repo@",
        "hf://org/repo/../x",
        "hf://o r/x",
        "hf://./.",
        "hf://-a/b",
        "hf://a/.b",
        "hf://a/b@../../x",
        "hf://a/b@/x",
    ],
)
def test_places_that_are_none(address: str) -> None:
    with pytest.raises(DownloadError, match="is no address: expected hf://"):
        hub_place(address)


def test_secrets_are_not_shown() -> None:
    assert shown("https://me:word@host/a.zip?token=1#x") == "https://host/a.zip"


def test_paths_stay(tmp_path: Path) -> None:
    for local in (local_bundle, local_checkpoint, local_model):
        assert local(tmp_path / "x") == tmp_path / "x"
    with pytest.raises(BundleNotFoundError):
        Bundle.open(tmp_path / "x")


def test_where_it_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ASAG_CACHE_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "asag-deploy"
