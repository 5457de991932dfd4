"""`asag-batch` before Ray is asked for anything: bad input is one sentence, and writes nothing."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from threading import Thread

import pytest

from asag_deploy.backends.tensorrt.backend import TensorRt
from asag_deploy.batch import cli, cluster
from asag_deploy.batch.cli import main, parse_arguments
from asag_deploy.batch.cluster import Crew
from asag_deploy.batch.index import Part
from asag_deploy.batch.worker import Plan, Report, Worker
from asag_deploy.errors import BackendError, ConfigError
from support.batch_runs import make_pictures, parts, rows
from support.tiny_bundle import make_bundle


@pytest.fixture
def given(tmp_path: Path) -> Path:
    """A bundle, pictures, an empty folder and lists."""
    pytest.importorskip("ray", reason="Ray is not installed")
    make_bundle(tmp_path / "bundle")
    make_pictures(tmp_path / "a", 1)
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.csv").write_text("file,size\na.png,3\n")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["bundle", "empty"], "'{}/empty' has no pictures in it"),
        (
            ["bundle", "list.csv"],
            "the list '{}/list.csv' has no column 'path', but 'file', 'size': --column names that of",
        ),
        (["bundle", "nowhere"], "'nowhere' does not exist: name a list of paths or a folder of pictures"),
        (["nowhere", "a"], "there is no bundle 'nowhere'; check the path, or make one with"),
        (["bundle", "a", "--column", "x"], "--column is for lists in Parquet or CSV, and none is given"),
        (["bundle", "a", "--backend", "caffe"], "unknown backend 'caffe'"),
        (
            ["bundle", "a", "--max-detections", "11"],
            "--max-detections is 11, and the bundle was exported for 10",
        ),
        (["bundle", "a", "--address", "somewhere"], "--address is 'somewhere'; it must be host:port"),
        (["bundle", "a", "--address", "ray://h:10001"], "--address is 'ray://h:10001'; it must be host:port"),
        (
            ["bundle", "a", "--address", "no.such.host.invalid:6379"],
            "there is no Ray cluster at 'no.such.host",
        ),
        (["bundle", ".", "a"], "--output '{}/out' and '{}' lie one within the other"),
    ],
)
def test_bad_input_is_one_sentence(
    given: Path,
    arguments: list[str],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(given)
    assert main([*arguments, "--output", "out", "--quiet"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("asag-batch: error: " + sentence.replace("{}", str(given)))
    assert err.count("\n") == 1
    assert not (given / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["b", "--output", "o"], "INDEX_OR_FOLDER"),
        (["b", "a"], "--output"),
        (["b", "a", "--output", ""], "an empty path names nothing"),
        (["b", "a", "--output", "o", "--threshold", "2"], "--threshold"),
        (["b", "a", "--output", "o", "--actors", "0"], "--actors is 0"),
        (["b", "a", "--output", "o", "--requests", "2"], "--requests divides the threads of an actor"),
    ],
)
def test_bad_options(arguments: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_arguments(arguments)


def test_a_cluster_that_goes_ends_the_program(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    codes: list[int] = []
    watch: cluster._Watch

    def end(code: int) -> None:
        codes.append(code)
        watch.stop()

    monkeypatch.setattr(cluster, "_KNOCK_S", 0.01)
    monkeypatch.setattr(cluster, "_GONE_S", 0.05)
    monkeypatch.setattr(os, "_exit", end)
    with socket.create_server(("127.0.0.1", 0)) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        watch = cluster._Watch("h:6379", address)
        watch.start()
        watch.join(0.2)
        assert codes == []
    watch.join(30)
    assert codes == [2]
    assert capsys.readouterr().err == (
        "asag-batch: error: the Ray cluster ('h:6379') has gone: start it anew, and give the same "
        "command again\n"
    )


@pytest.mark.parametrize("answer", [None, b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"+OK"])
def test_what_answers_but_is_no_cluster(
    given: Path,
    answer: bytes | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cluster, "_SPEAK_S", 0.5)
    with socket.create_server(("", 0)) as other:

        def serve() -> None:
            taken, _ = other.accept()
            with taken:
                if answer is not None:
                    taken.sendall(answer)
                    taken.shutdown(socket.SHUT_WR)
                while taken.recv(64):
                    pass

        thread = Thread(target=serve)
        thread.start()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        arguments = [str(given / "bundle"), str(given / "a"), "--output", str(given / "out")]
        assert main([*arguments, "--address", address]) == 2
        thread.join(30)
    said = f"asag-batch: error: at '{address}' something answers, but no Ray cluster does: check the address"
    assert capsys.readouterr().err.startswith(said)
    assert not (given / "out").exists()


def test_nothing_is_listed_or_written_before_a_cluster_is_there(
    given: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import inspect

    from ray._private import services

    said = "Could not find any running Ray instance"
    assert said in inspect.getsource(services)
    monkeypatch.setattr(cluster, "_ask", lambda *_: {"error": f"ConnectionError: {said}. Please specify"})
    arguments = [str(given / "bundle"), str(given / "a"), "--output", str(given / "out")]
    assert main([*arguments, "--address", "auto"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("asag-batch: error: no Ray cluster runs on this machine: start one (`ray start")
    assert err.count("\n") == 1
    assert not (given / "out").exists()


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("RuntimeError: no.\nmore", "RuntimeError: no."),
        ("\n  first\nmore", "first"),
        (
            "RuntimeError: no. Last: Traceback (most recent call last):\n  File 'a'\nray.Lost: gone\n",
            "ray.Lost: gone",
        ),
        ("error: Traceback (most recent call last):\n", "error:"),
        ("", ""),
    ],
)
def test_the_line_of_a_message_that_says_why(message: str, line: str) -> None:
    assert cluster.own_line(message) == line


@pytest.mark.parametrize(
    ("wants", "mode"), [("disabled", "disabled"), ("token", "token"), ("another", None), ("gone", None)]
)
def test_a_token_is_given_where_one_is_wanted(
    wants: str, mode: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined: list[str] = []

    def ask(address: str, mode: str) -> dict[str, object]:
        if wants == "gone":
            return {"error": "ray.exceptions.RpcError: RPC error: gone"}
        return {"cpus": 3} if mode == wants else {"error": "ray.exceptions.AuthenticationError: RPC error"}

    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.setattr(cluster, "_ask", ask)
    monkeypatch.setattr(cluster, "_join_with", joined.append)
    if mode is None:
        said = {"another": "takes nobody without its token", "gone": r"cannot be used \(RPC error: gone\)"}
        with pytest.raises(BackendError, match=said[wants]):
            cluster.cpus_of("h:6379")
    else:
        assert cluster.cpus_of("h:6379") == 3
    assert joined == ([] if mode is None else [mode])


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have parts done in this process, in their order."""

    def done_here(plan: Plan, parts: Sequence[Part], crew: Crew) -> Iterator[Report]:
        return map(Worker(plan).do, parts)

    monkeypatch.setattr(cli, "ray_here", lambda address, crew: nullcontext())
    monkeypatch.setattr(cli, "reports", done_here)


def test_a_retry_that_fails_or_is_ended_costs_no_results(
    given: Path, without_ray: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = make_pictures(given / "many", 45)
    broken = {i: pictures[i].read_bytes() for i in (1, 42)}
    for i in broken:
        pictures[i].unlink()
        pictures[i].write_bytes(b"nothing")
    arguments = [str(given / name) for name in ("bundle", "many")] + ["--output", str(given / "out")]
    arguments += ["--actors", "2"]
    retry = [*arguments, "--retry-failed"]
    assert main(arguments) == 1
    before = rows(given / "out")
    for i, content in broken.items():
        pictures[i].write_bytes(content)

    def failing(address: str | None, crew: Crew) -> nullcontext[None]:
        raise BackendError("no Ray today")

    with monkeypatch.context() as patch:
        patch.setattr(cli, "ray_here", failing)
        assert main(retry) == 2
    assert rows(given / "out") == before

    def ended(plan: Plan, parts: Sequence[Part], crew: Crew) -> Iterator[Report]:
        yield Worker(plan).do(parts[0])
        raise KeyboardInterrupt

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(cli, "reports", ended)
        assert main(retry) == 130
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("20 images, ")
    assert "done before: 20 images" in said
    assert "left: 5 images; the same command goes on" in said
    assert [row["error"] is None for row in rows(given / "out")] == [i != 42 for i in range(45)]

    capsys.readouterr()
    kept = {file: file.stat().st_mtime_ns for file in parts(given / "out")[:2]}
    assert main(retry) == 0
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    assert [row["error"] for row in rows(given / "out")] == [None] * 45
    assert [row["path"] for row in rows(given / "out")] == [row["path"] for row in before]
    assert re.search(r"by 1 actor of 1 thread$", capsys.readouterr().out, re.MULTILINE)  # one part was left
    assert main(retry) == 0
    assert (
        capsys.readouterr().out
        == f"nothing is left to do\ndone before: 45 images\nresults: {given}/out/results\n"
    )


def test_what_failed_is_told_apart_by_when(
    given: Path, without_ray: None, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(given / name) for name in ("bundle", "a")] + ["--output", str(given / "out")]
    lines = []
    for name in (None, "broken.png", "more.png", None):
        if name is not None:
            (given / "a" / name).write_bytes(b"nothing")
        main(arguments)
        lines.append([line for line in capsys.readouterr().out.splitlines() if line.startswith("failed")])
    why = "(the column 'error' says why)"
    assert lines == [
        [],
        [f"failed: 1 {why}"],
        [f"failed: 1, and 1 before {why}"],
        [f"failed: 2 before {why}"],
    ]


def test_gpus_of_an_actor() -> None:
    given = ["b", "a", "--output", "o"]
    assert parse_arguments(given).gpus_of_an_actor == 0
    assert parse_arguments([*given, "--backend", "tensorrt-rtx"]).gpus_of_an_actor == 1
    assert parse_arguments([*given, "--gpus", "0.5"]).gpus_of_an_actor == 0.5


def test_a_backend_that_cannot_run_here_is_told_before_anything_is_written(
    given: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(TensorRt, "problem", lambda self: "it has no GPU")
    arguments = [str(given / "bundle"), str(given / "a"), "--output", str(given / "out")]
    assert main([*arguments, "--backend", "tensorrt"]) == 2
    said = "asag-batch: error: the backend 'tensorrt' cannot run on this machine: it has no GPU\n"
    assert capsys.readouterr().err == said
    assert not (given / "out").exists()
    # That of a cluster is asked of its machines: here the cluster is what is missing.
    assert main([*arguments, "--backend", "tensorrt", "--address", "127.0.0.1:1"]) == 2
    assert "there is no Ray cluster at '127.0.0.1:1'" in capsys.readouterr().err
