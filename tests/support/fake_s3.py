"""A small S3 server of this process, enough for pyarrow: objects, lists of them, and parts of uploads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape


class _Store(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, bytes] = {}
        """By bucket and key, what was put there."""
        self.pieces: dict[tuple[str, int], bytes] = {}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Store

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def do_HEAD(self) -> None:
        name = self._name()
        if "/" not in name:
            self._answer(200)
        elif name in self.server.objects:
            self._answer(200, length=len(self.server.objects[name]))
        else:
            self._answer(404)

    def do_GET(self) -> None:
        name, query = self._name(), self._query()
        if "/" not in name:
            self._list(name, query)
            return
        content = self.server.objects.get(name)
        if content is None:
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
            return
        asked = self.headers.get("Range")
        if asked is None:
            self._answer(200, content)
            return
        first, _, last = asked.removeprefix("bytes=").partition("-")
        begin, end = int(first), min(int(last or len(content)), len(content) - 1)
        self._answer(206, content[begin : end + 1], {"Content-Range": f"bytes {begin}-{end}/{len(content)}"})

    def do_PUT(self) -> None:
        body, query, name = self._body(), self._query(), self._name()
        if "partNumber" in query:
            self.server.pieces[query["uploadId"], int(query["partNumber"])] = body
        elif "/" in name:
            self.server.objects[name] = body
        self._answer(200, headers={"ETag": '"1"'})

    def do_POST(self) -> None:
        body, query, name = self._body(), self._query(), self._name()
        if "uploads" in query:
            self._answer(200, f"<R><UploadId>{escape(name)}</UploadId></R>".encode())
        elif "uploadId" in query:
            mine = sorted(key for key in self.server.pieces if key[0] == query["uploadId"])
            self.server.objects[name] = b"".join(self.server.pieces.pop(key) for key in mine)
            self._answer(
                200, b"<CompleteMultipartUploadResult><ETag>1</ETag></CompleteMultipartUploadResult>"
            )
        else:  # several are deleted
            for part in body.decode().split("<Key>")[1:]:
                self.server.objects.pop(f"{name}/{unquote(part.partition('<')[0])}".replace("//", "/"), None)
            self._answer(200, b"<DeleteResult></DeleteResult>")

    def do_DELETE(self) -> None:
        self.server.objects.pop(self._name(), None)
        self._answer(204)

    def _list(self, bucket: str, query: dict[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        keys, folders = [], set()
        for name in sorted(self.server.objects):
            key = name.removeprefix(f"{bucket}/")
            if not name.startswith(f"{bucket}/") or not key.startswith(prefix):
                continue
            inside, found, _ = key.removeprefix(prefix).partition(delimiter) if delimiter else (key, "", "")
            if found:
                folders.add(f"{prefix}{inside}{delimiter}")
            else:
                keys.append((key, len(self.server.objects[name])))
        when = "2026-01-01T00:00:00.000Z"
        entries = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{size}</Size><LastModified>{when}</LastModified></Contents>"
            for key, size in keys
        ) + "".join(
            f"<CommonPrefixes><Prefix>{escape(one)}</Prefix></CommonPrefixes>" for one in sorted(folders)
        )
        count = len(keys) + len(folders)
        text = f"<IsTruncated>false</IsTruncated><KeyCount>{count}</KeyCount>{entries}"
        self._answer(200, f"<ListBucketResult>{text}</ListBucketResult>".encode())

    def _name(self) -> str:
        """Return the bucket, or bucket and key; a key that ends in a slash stands for a folder."""
        name = unquote(urlsplit(self.path).path).lstrip("/")
        return name.rstrip("/") if name.count("/") == 1 and name.endswith("/") else name

    def _query(self) -> dict[str, str]:
        found = parse_qs(urlsplit(self.path).query, keep_blank_values=True)
        return {name: values[0] for name, values in found.items()}

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") == "chunked":
            body = b""
            while length := int(self.rfile.readline().partition(b";")[0], 16):
                body += self.rfile.read(length)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if "aws-chunked" not in self.headers.get("Content-Encoding", ""):
            return body
        content, rest = b"", body
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            length = int(size.partition(b";")[0], 16)
            if not length:
                break
            content, rest = content + rest[:length], rest[length + 2 :]
        return content

    def _answer(
        self,
        code: int,
        content: bytes = b"",
        headers: dict[str, str] | None = None,
        length: int | None = None,
    ) -> None:
        self.send_response(code)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@contextmanager
def fake_s3() -> Iterator[tuple[str, dict[str, bytes]]]:
    """Run such a server; give its address, for AWS_ENDPOINT_URL, and what it holds, by bucket and key."""
    with _Store() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", server.objects
        finally:
            server.shutdown()
            thread.join()
