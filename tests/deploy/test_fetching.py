"""Bundles and checkpoints by address: from a server on this machine, which can be told to misbehave."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import shutil
import sys
import tarfile
import threading
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from asag_deploy.bundle.bundle import Bundle
from asag_deploy.detector import Detector
from asag_deploy.errors import BackendError, DownloadError
from asag_deploy.fetching.addresses import cache_folder
from asag_deploy.fetching.locate import local_checkpoint, local_model
from asag_deploy.fetching.web import download
from support.tiny_bundle import make_bundle


@dataclass
class Site:
    """What the server serves, and what it was asked for."""

    files: dict[str, bytes] = field(default_factory=dict)
    address: str = ""
    asked: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    """Method, path and headers."""
    cut: int | None = None
    """Break the next answer off after that many bytes."""
    length: bool = True
    etags: bool = True
    status: dict[str, int] = field(default_factory=dict)
    moved: dict[str, str] = field(default_factory=dict)
    server: ThreadingHTTPServer | None = None

    def stop(self) -> None:
        if self.server is not None:
            self.server.shutdown()
            self.server.server_close()
            self.server = None

    def bodies(self) -> int:
        return sum(method == "GET" for method, _, _ in self.asked)


class Handler(BaseHTTPRequestHandler):
    site: ClassVar[Site]

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        site, path = self.site, self.path.partition("?")[0]
        site.asked.append((self.command, self.path, dict(self.headers)))
        if path in site.moved:
            self._head(302, {"Location": site.moved[path], "Content-Length": "0"})
            return
        if path in site.status:
            self._head(site.status[path], {"Content-Length": "0"})
            return
        if path.startswith("/api/models/"):
            self._hub(path.removeprefix("/api/models/"))
            return
        content = site.files.get(path)
        if content is None:
            self._head(404, {"Content-Length": "0", "X-Error-Code": "EntryNotFound"})
            return
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        headers = {"ETag": etag} if site.etags else {}
        headers |= {"X-Repo-Commit": "c" * 40} if "/resolve/" in path else {}
        if site.etags and self.headers.get("If-None-Match") == etag:
            self._head(304, headers)
            return
        begin, status = 0, 200
        if self.headers.get("Range") and self.headers.get("If-Range") == etag:
            begin, status = int(self.headers["Range"].removeprefix("bytes=").rstrip("-")), 206
            headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        piece = content[begin:]
        if site.length:
            headers["Content-Length"] = str(len(piece))
        self._head(status, headers)
        if body:
            whole, site.cut = site.cut is None, None if site.cut is None else site.cut
            self.wfile.write(piece if whole else piece[: site.cut])
            site.cut = None

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _hub(self, asked: str) -> None:
        """What the hub says of a repository, here org/repo only."""
        repository, _, revision = asked.partition("/revision/")
        if repository != "org/repo" or revision not in ("", "main", "v1", "c" * 40):
            code = "RepoNotFound" if repository != "org/repo" else "RevisionNotFound"
            self._head(404, {"X-Error-Code": code, "Content-Length": "0"})
            return
        prefix = "/org/repo/resolve/" + "c" * 40 + "/"
        names = [path.removeprefix(prefix) for path in self.site.files if path.startswith(prefix)]
        said = {"id": repository, "sha": "c" * 40, "siblings": [{"rfilename": name} for name in names]}
        content = json.dumps(said).encode()
        self._head(200, {"Content-Type": "application/json", "Content-Length": str(len(content))})
        self.wfile.write(content)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    found = Site()
    handler = type("SiteHandler", (Handler,), {"site": found})
    found.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    found.server.daemon_threads = True
    found.address = f"http://127.0.0.1:{found.server.server_address[1]}"
    thread = threading.Thread(target=found.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    monkeypatch.setenv("ASAG_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", found.address)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield found
    found.stop()
    thread.join()


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle")


def packed(bundle: Bundle, kind: str, folder: str = "") -> bytes:
    """A bundle as the content of an archive."""
    content = io.BytesIO()
    files = [path for path in sorted(bundle.path.iterdir()) if path.is_file()]
    if kind == "zip":
        with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in files:
                archive.write(path, folder + path.name)
    else:
        mode: Any = f"w:{kind}"
        with tarfile.open(fileobj=content, mode=mode) as tar:
            for path in files:
                tar.add(path, folder + path.name)
    return content.getvalue()


def serve_folder(site: Site, bundle: Bundle, prefix: str) -> None:
    for path in bundle.path.iterdir():
        site.files[prefix + path.name] = path.read_bytes()


class TestFiles:
    def test_once_and_again_only_when_it_changed(self, site: Site) -> None:
        site.files["/w.pth"] = b"one"
        first = download(site.address + "/w.pth")
        assert (first.read_bytes(), first.name) == (b"one", "w.pth")
        assert download(site.address + "/w.pth") == first
        assert site.asked[-1][2]["If-None-Match"] == f'"{hashlib.sha256(b"one").hexdigest()}"'
        site.files["/w.pth"] = b"another"
        second = download(site.address + "/w.pth")
        assert (first.read_bytes(), second.read_bytes()) == (b"one", b"another")

    def test_nothing_there(self, site: Site) -> None:
        with pytest.raises(DownloadError, match=r"nothing at 'http://.*/x.pth' \(404 Not Found\): check"):
            download(site.address + "/x.pth?token=secret")

    def test_a_connection_that_is_cut_goes_on(self, site: Site) -> None:
        site.files["/w.pth"] = bytes(range(256)) * 999
        site.cut = 100_000
        assert download(site.address + "/w.pth").read_bytes() == site.files["/w.pth"]
        assert [headers.get("Range") for _, _, headers in site.asked] == [None, "bytes=100000-"]

    def test_a_cut_without_a_tag_begins_anew(self, site: Site) -> None:
        site.files["/w.pth"] = b"x" * 9999
        site.cut, site.etags = 100, False
        assert download(site.address + "/w.pth").read_bytes() == site.files["/w.pth"]
        assert [headers.get("Range") for _, _, headers in site.asked] == [None, None]

    def test_what_changed_between_pieces_is_not_mixed(self, site: Site) -> None:
        site.files["/w.pth"] = b"a" * 1000
        site.cut = 10

        def always_cut(handler: Any, status: int, headers: dict[str, str]) -> None:
            site.cut = 10
            Handler._head(handler, status, headers)

        assert site.server is not None
        site.server.RequestHandlerClass._head = always_cut  # type: ignore[attr-defined]
        with pytest.raises(DownloadError, match=r"broke off after 30 of 1000 bytes.*goes on when you try"):
            download(site.address + "/w.pth")
        site.server.RequestHandlerClass._head = Handler._head  # type: ignore[attr-defined]
        site.cut = None
        site.files["/w.pth"] = b"b" * 1000
        assert download(site.address + "/w.pth").read_bytes() == b"b" * 1000

    def test_redirects(self, site: Site) -> None:
        site.files["/real"] = b"here"
        site.moved["/w.pth"] = "/real"
        assert download(site.address + "/w.pth").read_bytes() == b"here"
        site.moved["/loop"] = "/loop"
        with pytest.raises(DownloadError, match=r"/loop' redirects in circles.*check the address$"):
            download(site.address + "/loop")
        site.moved["/file"] = "file:///etc/hostname"
        with pytest.raises(DownloadError, match="leads to 'file:///etc/hostname', which is neither"):
            download(site.address + "/file")

    @pytest.mark.parametrize("status", [401, 403])
    def test_without_a_login(self, site: Site, status: int) -> None:
        site.status["/w.pth"] = status
        with pytest.raises(DownloadError, match=rf"/w.pth' needs a login, or is not for you \({status} "):
            download(site.address + "/w.pth")

    def test_a_login_is_for_its_host_alone(self, site: Site) -> None:
        site.files["/real"] = b"here"
        site.moved["/near"] = "/real"
        port = site.address.rpartition(":")[2]
        site.moved["/far"] = f"http://localhost:{port}/real"
        with_login = site.address.replace("//", "//me:w%20rd@")
        for path in ("/near", "/far"):
            assert download(with_login + path).read_bytes() == b"here"
        sent = [headers.get("Authorization") for _, _, headers in site.asked]
        assert sent == ["Basic bWU6dyByZA=="] * 3 + [None]
        site.status["/w.pth"] = 401
        with pytest.raises(DownloadError) as caught:
            download(with_login + "/w.pth")
        assert "w%20rd" not in str(caught.value)

    def test_letters_that_addresses_lack(self, site: Site) -> None:
        site.files["/a%20b/%C3%A9%2B.pth"] = b"here"
        assert download(site.address + "/a b/\u00e9%2B.pth?q=a b").read_bytes() == b"here"
        assert site.asked[-1][1].endswith("?q=a%20b")

    def test_nothing_came(self, site: Site) -> None:
        site.stop()
        with pytest.raises(DownloadError, match=r"refused\): check the address and the network$"):
            download(site.address + "/w.pth")

    def test_a_cache_that_is_read_only(self, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
        site.files["/w.pth"] = b"one"
        first = download(site.address + "/w.pth")

        def refuse(*args: Any, **options: Any) -> None:
            raise OSError(errno.EROFS, "Read-only file system")

        monkeypatch.setattr(Path, "mkdir", refuse)
        assert download(site.address + "/w.pth") == first
        with pytest.raises(DownloadError, match=r"\(read-only file system\): make it writable"):
            download(site.address + "/other.pth")

    def test_never_from_https_to_http(self) -> None:
        from asag_deploy.fetching.web import _Redirects

        request = urllib.request.Request("https://host/a")
        with pytest.raises(DownloadError, match="leads to 'http://host/b', which is not https"):
            _Redirects().redirect_request(request, io.BytesIO(), 302, "", None, "http://host/b")  # type: ignore[arg-type]

    @pytest.mark.parametrize("how", ["gone", "500"])
    def test_what_is_kept_serves_when_the_server_does_not(self, site: Site, how: str) -> None:
        site.files["/w.pth"] = b"one"
        first = download(site.address + "/w.pth")
        if how == "gone":
            site.stop()
        else:
            site.status["/w.pth"] = 500
        with pytest.warns(RuntimeWarning, match="what was fetched before is taken"):
            assert download(site.address + "/w.pth") == first
        site.status["/new.pth"] = 500
        with pytest.raises(DownloadError, match="cannot be fetched"):
            download(site.address + "/new.pth")

    def test_too_large_and_no_room(self, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
        site.files["/w.pth"] = b"x" * 5000
        with pytest.raises(DownloadError, match="more than 0: it is refused"):
            download(site.address + "/w.pth", most=4999)
        site.length = False
        with pytest.raises(DownloadError, match="is more than 0 MiB: it is refused"):
            download(site.address + "/w.pth", most=4999)
        site.length = True
        usage = shutil.disk_usage("/")
        monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=10))
        with pytest.raises(
            DownloadError, match=r"there is room for 0 in .*: free some, or set ASAG_CACHE_DIR"
        ):
            download(site.address + "/w.pth")

    def test_a_folder_that_cannot_be_written(
        self, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").touch()
        monkeypatch.setenv("ASAG_CACHE_DIR", str(tmp_path / "file"))
        with pytest.raises(DownloadError, match=r"cannot be kept in .* or set ASAG_CACHE_DIR"):
            download(site.address + "/w.pth")


class TestBundles:
    @pytest.mark.parametrize(
        ("name", "kind", "folder"),
        [
            ("b.zip", "zip", ""),
            ("b.zip", "zip", "inner/"),
            ("b.tar", "", "./"),
            ("b.tar.gz", "gz", "in/ner/"),
        ],
    )
    def test_packed(self, site: Site, bundle: Bundle, name: str, kind: str, folder: str) -> None:
        site.files[f"/{name}"] = packed(bundle, kind, folder)
        found = Bundle.open(f"{site.address}/{name}")
        assert found.manifest == bundle.manifest
        assert Bundle.open(Path(f"{site.address}/{name}")).path == found.path
        site.stop()
        with (
            pytest.warns(RuntimeWarning, match="cannot be asked"),
            Detector.load(f"{site.address}/{name}") as detector,
        ):
            assert detector.manifest == bundle.manifest

    def test_folder(self, site: Site, bundle: Bundle) -> None:
        serve_folder(site, bundle, "/models/a/")
        found = Bundle.open(f"{site.address}/models/a/?token=1")
        assert found.manifest == bundle.manifest
        assert all(path.endswith("?token=1") for _, path, _ in site.asked)
        asked = len(site.asked)
        assert Bundle.open(f"{site.address}/models/a/manifest.json?token=1").path == found.path
        assert len(site.asked) == asked + 1, "only the manifest is asked for again"

    def test_folder_whose_files_do_not_fit(self, site: Site, bundle: Bundle) -> None:
        serve_folder(site, bundle, "/a/")
        good = site.files["/a/decoder.onnx"]
        site.files["/a/decoder.onnx"] = good[:-1]
        with pytest.raises(DownloadError, match=r"decoder.onnx' is not the file of which the manifest"):
            Bundle.open(site.address + "/a")
        site.files["/a/decoder.onnx"] = good
        assert Bundle.open(site.address + "/a").manifest == bundle.manifest

    def test_folder_that_lacks_a_file_or_is_none(self, site: Site, bundle: Bundle) -> None:
        serve_folder(site, bundle, "/a/")
        del site.files["/a/decoder.onnx"]
        with pytest.raises(DownloadError, match=r"nothing at .*decoder.onnx"):
            Bundle.open(site.address + "/a")
        site.files["/b/manifest.json"] = b"<html>"
        with pytest.raises(DownloadError, match="is no manifest of a bundle"):
            Bundle.open(site.address + "/b")
        outside = {"graphs": [{"file": "../x", "sha256": "0"}]}
        site.files["/c/manifest.json"] = json.dumps(outside).encode()
        with pytest.raises(DownloadError, match=r"names '../x', which lies outside"):
            Bundle.open(site.address + "/c")

    @pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil", "a\\..\\evil", "C:evil"])
    @pytest.mark.parametrize("kind", ["zip", ""])
    def test_archives_that_reach_outside(
        self, site: Site, bundle: Bundle, tmp_path: Path, name: str, kind: str
    ) -> None:
        content = io.BytesIO(packed(bundle, kind))
        if kind == "zip":
            with zipfile.ZipFile(content, "a") as archive:
                archive.writestr(name, b"evil")
        else:
            with tarfile.open(fileobj=content, mode="a:") as tar:
                tar.addfile(tarfile.TarInfo(name))
        address = f"/b.{kind or 'tar'}"
        site.files[address] = content.getvalue()
        with pytest.raises(DownloadError, match="which would lie outside it: it is refused"):
            Bundle.open(site.address + address)
        assert not list(tmp_path.rglob("*evil*"))
        assert not list(tmp_path.glob("cache/web/*/*/bundle"))

    def test_archives_with_links(self, site: Site, bundle: Bundle) -> None:
        content = io.BytesIO(packed(bundle, ""))
        with tarfile.open(fileobj=content, mode="a:") as tar:
            link = tarfile.TarInfo("engines")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc"
            tar.addfile(link)
        site.files["/b.tar"] = content.getvalue()
        with pytest.raises(DownloadError, match="'engines', which is no regular file"):
            Bundle.open(site.address + "/b.tar")
        zipped = io.BytesIO(packed(bundle, "zip"))
        with zipfile.ZipFile(zipped, "a") as archive:
            info = zipfile.ZipInfo("engines")
            info.external_attr = 0o120777 << 16
            archive.writestr(info, "/etc")
        site.files["/b.zip"] = zipped.getvalue()
        with pytest.raises(DownloadError, match="'engines', which is no regular file"):
            Bundle.open(site.address + "/b.zip")

    @pytest.mark.parametrize(
        ("change", "problem"),
        [
            (lambda content: content[:-200], "is damaged, or no archive"),
            (lambda content: b"<html>no", "is a web page"),
            (lambda content: b"", "is damaged, or no archive"),
        ],
    )
    def test_archives_that_are_damaged(
        self, site: Site, bundle: Bundle, change: Callable[[bytes], bytes], problem: str
    ) -> None:
        for name, kind in (("b.zip", "zip"), ("b.tar.gz", "gz")):
            site.files[f"/{name}"] = change(packed(bundle, kind))
            with pytest.raises(DownloadError, match=problem) as caught:
                Bundle.open(f"{site.address}/{name}")
            assert "method gz" not in str(caught.value), "what the library tried"

    @pytest.mark.filterwarnings("ignore:Duplicate name")
    def test_archives_that_hold_a_name_twice(self, site: Site, bundle: Bundle) -> None:
        for name, said in (("manifest.json", "twice"), ("manifest.json/x", "both as a file and as a folder")):
            content = io.BytesIO(packed(bundle, "zip"))
            with zipfile.ZipFile(content, "a") as archive:
                archive.writestr(name, b"")
            site.files["/b.zip"] = content.getvalue()
            with pytest.raises(DownloadError, match=f"holds 'manifest.json' {said}: it is refused"):
                Bundle.open(site.address + "/b.zip")

    def test_a_tar_that_says_it_is_huge(self, site: Site) -> None:
        huge = tarfile.TarInfo("manifest.json")
        huge.size = 2**45
        site.files["/b.tar"] = huge.tobuf() + bytes(2048)
        with pytest.raises(DownloadError, match="more than any bundle holds"):
            Bundle.open(site.address + "/b.tar")

    def test_a_zip_that_is_a_tar(self, site: Site, bundle: Bundle) -> None:
        site.files["/b.zip"] = packed(bundle, "")
        with pytest.raises(DownloadError, match=r"no archive: check the address \(File is not a zip file\)"):
            Bundle.open(site.address + "/b.zip")

    def test_archives_that_are_no_bundles_or_too_much(self, site: Site) -> None:
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w") as archive:
            archive.writestr("readme.txt", "")
        site.files["/b.zip"] = content.getvalue()
        with pytest.raises(DownloadError, match=r"is not a packed bundle: it holds no manifest\.json"):
            Bundle.open(site.address + "/b.zip")
        with zipfile.ZipFile(content, "a") as archive:
            for number in range(1001):
                archive.writestr(str(number), "")
        site.files["/b.zip"] = content.getvalue()
        with pytest.raises(DownloadError, match="more than any bundle holds"):
            Bundle.open(site.address + "/b.zip")

    def test_bundle_or_checkpoint(self, site: Site, bundle: Bundle) -> None:
        serve_folder(site, bundle, "/a/")
        site.files["/w.safetensors"] = b"weights"
        assert (local_model(site.address + "/a") / "manifest.json").is_file()
        assert local_model(site.address + "/w.safetensors").read_bytes() == b"weights"
        assert local_checkpoint(site.address + "/w.safetensors").read_bytes() == b"weights"


class TestHub:
    PREFIX = "/org/repo/resolve/" + "c" * 40 + "/"

    @pytest.fixture(autouse=True)
    def _client(self) -> None:
        pytest.importorskip("huggingface_hub", reason="huggingface_hub fetches from hf:// addresses")

    def test_bundle(self, site: Site, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
        serve_folder(site, bundle, self.PREFIX + "net/")
        site.files[self.PREFIX + "other/large.bin"] = b"x"
        found = Bundle.open("hf://org/repo/net@v1")
        assert found.manifest == bundle.manifest
        assert Path(cache_folder()) in found.path.parents
        assert not any("large.bin" in path for _, path, _ in site.asked)
        assert Bundle.open(Path("hf://org/repo/net@v1")).path == found.path
        with monkeypatch.context() as patch:  # a cache that is read-only
            patch.setattr("asag_deploy.fetching.hub.atomic_write_text", None)
            assert Bundle.open("hf://org/repo/net@v1").path == found.path
        with pytest.raises(DownloadError, match=r"holds no manifest.json; there are some in net"):
            Bundle.open("hf://org/repo")

    def test_offline(self, site: Site, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
        serve_folder(site, bundle, self.PREFIX)
        path = Bundle.open("hf://org/repo").path
        asked = len(site.asked)
        with monkeypatch.context() as patch:
            patch.setenv("HF_HUB_OFFLINE", "1")
            assert Bundle.open("hf://org/repo").path == path
            with pytest.raises(DownloadError):
                Bundle.open("hf://org/other")
        assert len(site.asked) == asked, "nobody is asked"
        site.stop()
        with pytest.warns(RuntimeWarning, match="'hf://org/repo' cannot be asked for anything newer"):
            assert Bundle.open("hf://org/repo").path == path
        with pytest.raises(DownloadError, match="'hf://org/new' cannot be fetched"):
            Bundle.open("hf://org/new")

    def test_checkpoints(self, site: Site) -> None:
        site.files[self.PREFIX + "a/w.safetensors"] = b"one"
        assert local_checkpoint("hf://org/repo").read_bytes() == b"one"
        assert local_model("hf://org/repo/a").read_bytes() == b"one"
        site.files[self.PREFIX + "b/w.pth"] = b"two"
        assert local_checkpoint("hf://org/repo/b/w.pth").read_bytes() == b"two"
        with pytest.raises(DownloadError, match=r"2 checkpoints at .*: name one"):
            local_checkpoint("hf://org/repo")
        with pytest.raises(DownloadError, match="no checkpoint at 'hf://org/repo/c'"):
            local_checkpoint("hf://org/repo/c")

    def test_nothing_there(self, site: Site) -> None:
        with pytest.raises(DownloadError, match="no repository 'org/none', or it is private"):
            Bundle.open("hf://org/none")
        with pytest.raises(DownloadError, match="no revision 'v9' of 'org/repo'"):
            Bundle.open("hf://org/repo@v9")

    def test_without_its_package(self, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        with pytest.raises(BackendError, match=r"needs the package huggingface_hub.*asag-deploy\[hub\]"):
            Bundle.open("hf://org/repo")
