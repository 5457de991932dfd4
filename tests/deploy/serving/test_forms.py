"""Forms, as browsers and curl send them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from support.served import IMAGE, GatedDetector, Served, serving

PLAIN = 'form-data; name="{}"'
FILE = 'form-data; name="{}"; filename="{}"'
Part = tuple[str, bytes]


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[Served, GatedDetector]]:
    gated = GatedDetector()
    with serving(gated, max_bytes=10_000, body_seconds=5) as server:
        yield server, gated


def file(name: str = "image", data: bytes = IMAGE) -> Part:
    return FILE.format(name, "photo.png"), data


def field(name: str, value: str) -> Part:
    return PLAIN.format(name), value.encode()


def written(parts: Sequence[Part], boundary: str = "----xyz") -> bytes:
    head = "--{}\r\nContent-Disposition: {}\r\nContent-Type: image/png\r\n\r\n"
    pieces = [head.format(boundary, kind).encode() + data + b"\r\n" for kind, data in parts]
    return b"".join(pieces) + f"--{boundary}--\r\n".encode()


def send(server: Served, body: bytes, query: str = "") -> tuple[int, dict[str, str]]:
    return server.detect(body, query, **{"Content-Type": "multipart/form-data; boundary=----xyz"})


@pytest.mark.parametrize(
    "parts",
    [
        [file()],
        [file("upload")],
        [file("other", b"no image"), file()],
        [field("max_level", "P4"), file()],
        [file(), field("max_level", "P4")],
        [(PLAIN.format("image"), IMAGE)],
        [(FILE.format("image", 'ü";.png').replace('ü"', "%22ü"), IMAGE)],
    ],
)
def test_a_form_with_an_image(shared: tuple[Served, GatedDetector], parts: list[Part]) -> None:
    server, detector = shared
    assert send(server, written(parts))[0] == 200
    wants = any("max_level" in kind for kind, _ in parts)
    assert detector.asked[-1] == ({"max_level": "P4"} if wants else {})


def test_fields_and_query_are_one(shared: tuple[Served, GatedDetector]) -> None:
    server, detector = shared
    assert send(server, written([file(), field("mode", "fast")]), "?max_level=P5")[0] == 200
    assert detector.asked[-1] == {"mode": "fast", "max_level": "P5"}
    status, answer = send(server, written([file(), field("mode", "fast")]), "?mode=fast")
    assert (status, answer["error"]) == (400, "mode is given more than once; give it once")


@pytest.mark.parametrize(
    ("body", "status", "sentence"),
    [
        (written([]), 400, "the form holds no file; send the image as its field 'image'"),
        (written([field("threshold", "0.5")]), 400, "holds no file"),
        (written([file(data=b"")]), 400, "the form's file is empty"),
        (
            written([file("a"), file("b")]),
            400,
            "holds 2 files; send one image, as its field 'image'",
        ),
        (written([file(), file()]), 400, "holds 2 files of that name"),
        (written([file(), field("treshold", "1")]), 400, "unknown parameter 'treshold'"),
        (written([file(), field("deadline_ms", "0")]), 400, "deadline_ms is '0'"),
        (written([file(), field("threshold", "0_1")]), 400, "threshold is '0_1', which is not a number"),
        (written([file(), field("threshold", "x" * 2000)]), 400, "'threshold' is longer than 1024 bytes"),
        (written([file()])[:-9], 400, "the form breaks off"),
        (written([file()], "other"), 400, "the form cannot be read"),
        (b"", 400, "the form breaks off"),
        (written([file(), file("threshold", b".5")]), 400, "field 'threshold' is a file; send its value"),
        (written([*[field(f"f{i}", "") for i in range(40)]]), 400, "more than 32 fields"),
        (written([file(data=b"no image")]), 422, "damaged or is not an image"),
        (written([file(data=bytes(10_001))]), 413, "larger than"),
        (written([file(data=bytes(90_000))]), 413, "larger than"),
        (written([(PLAIN.format("x") + "; a=" + "b" * 9000, b"")]), 400, "the form cannot be read"),
    ],
)
def test_a_form_that_is_refused(
    shared: tuple[Served, GatedDetector], body: bytes, status: int, sentence: str
) -> None:
    got, answer = send(shared[0], body)
    assert (got, list(answer)) == (status, ["error"])
    assert sentence in answer["error"]
    assert send(shared[0], written([file()]))[0] == 200


def test_fields_that_nobody_has_filled_in(shared: tuple[Served, GatedDetector]) -> None:
    server, detector = shared
    assert send(server, written([file(), field("max_level", ""), field("threshold", "")]))[0] == 200
    assert detector.asked[-1] == {}


def test_a_file_that_is_no_image(shared: tuple[Served, GatedDetector]) -> None:
    status, answer = send(shared[0], written([file(data=b"no image")]))
    assert status == 422
    assert answer["error"].startswith("'file of the form' is damaged or is not an image")


def test_a_form_without_boundary(shared: tuple[Served, GatedDetector]) -> None:
    status, answer = shared[0].detect(written([file()]), **{"Content-Type": "multipart/form-data"})
    assert status == 400
    assert "what stands between its parts" in answer["error"]


def test_a_form_that_is_compressed(shared: tuple[Served, GatedDetector]) -> None:
    headers = {"Content-Type": "multipart/form-data; boundary=x", "Content-Encoding": "gzip"}
    assert shared[0].detect(written([file()]), **headers)[0] == 415


def test_a_form_that_never_ends(detector: GatedDetector) -> None:
    head = b"POST /detect HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=----xyz\r\n"
    with serving(detector, body_seconds=0.05) as server:
        got = server.say(head + b"Content-Length: 9000\r\n\r\n" + written([file()])[:200])
    assert got.startswith(b"HTTP/1.1 408 ")
