"""`asag-batch` with Ray: what it finds, and that each picture is done once, whatever is killed."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.batch_runs import cluster, make_pictures, parts, rows, run, start, wait_until, word_of
from support.tiny_bundle import make_bundle

pytest.importorskip("ray", reason="Ray is not installed")
pytest.importorskip("pyarrow", reason="pyarrow is not installed")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with cluster() as found:
        yield found


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    make_bundle(folder / "bundle")
    return folder / "bundle"


@pytest.fixture(scope="module")
def joined(address: str) -> list[str | Path]:
    return ["--address", address, "--actors", "2"]


def test_results_are_those_of_asag_detect(tmp_path: Path, bundle: Path, joined: list[str | Path]) -> None:
    folder = tmp_path / "pictures"
    make_pictures(folder, 45)
    (folder / "broken.png").write_bytes((folder / "0000.png").read_bytes()[:40])
    (folder / "empty.jpg").touch()
    out = tmp_path / "out"
    code, said, err = run([bundle, folder, "--output", out, "--actors", "1", "--threshold", "0.1"])
    assert code == 1, err
    assert "failed: 2 (the column 'error' says why)" in said
    assert said.startswith("45 images, ")
    exits = re.findall(r"P[345] (\d+)", said.splitlines()[1])
    assert sum(map(int, exits)) == 45
    rate, seconds = re.findall(r"([\d.]+) images/s, .* in ([\d.]+) s,", said)[0]
    assert float(rate) * float(seconds) == pytest.approx(45, rel=0.02)

    detect = [
        sys.executable,
        "-m",
        "asag_deploy.detect.cli",
        str(bundle),
        str(folder),
        "--threshold",
        "0.1",
        "--quiet",
    ]
    subprocess.run([*detect, "--json", str(tmp_path / "all.json")], check=False, capture_output=True)
    expected = {entry["source"]: entry for entry in json.loads((tmp_path / "all.json").read_text())}
    found = {row["path"]: row for row in rows(out)}
    assert sum(len(entry["detections"]) for entry in expected.values()) > 0
    assert {path for path, row in found.items() if row["error"] is None} == set(expected)
    for path, entry in expected.items():
        row = found[path]
        assert (row["width"], row["height"]) == (entry["width"], entry["height"])
        assert [[round(v, 2) for v in box] for box in row["boxes"]] == [
            one["box"] for one in entry["detections"]
        ]
        assert [round(v, 6) for v in row["scores"]] == [one["confidence"] for one in entry["detections"]]
        assert row["labels"] == [one["class_id"] for one in entry["detections"]]
        assert row["names"] == [one["name"] for one in entry["detections"]]
        trace = entry["trace"]
        assert (row["exit_level"], row["stop"]) == (trace["exit_level"], trace["stop"])
        assert row["anchors"] == trace["anchor_count"]
        assert row["patches"] == sum(level["patches"] for level in trace["levels"])
        assert 0 < row["preprocess_ms"] < row["total_ms"]
    for name in ("broken.png", "empty.jpg"):
        error = found[str(folder / name)]["error"]
        assert f"asag-batch: skipped: {error}\n" in err
        assert name in error
    assert not (out / "attempts").exists()

    (folder / "broken.png").write_bytes((folder / "0000.png").read_bytes())
    arguments: list[str | Path] = [bundle, folder, "--output", out, "--threshold", "0.1"]
    code, said, _ = run(arguments)
    assert (code, said.splitlines()[:3]) == (
        1,
        [
            "nothing is left to do",
            "done before: 47 images, of which 2 failed",
            "failed: 2 before (the column 'error' says why)",
        ],
    )
    code, said, _ = run([*arguments, "--retry-failed", *joined])
    assert (code, said.splitlines()[-2]) == (1, "failed: 1 (the column 'error' says why)")
    assert [row["path"] for row in rows(out) if row["error"] is not None] == [str(folder / "empty.jpg")]
    assert len(rows(out)) == 47


def test_a_second_run_does_nothing_again_and_takes_new_pictures(
    tmp_path: Path, bundle: Path, joined: list[str | Path]
) -> None:
    folder, out = tmp_path / "pictures", tmp_path / "out"
    make_pictures(folder, 30)
    arguments = [bundle, folder, "--output", out, *joined]
    assert run(arguments)[0] == 0
    before = {file: file.stat().st_mtime_ns for file in parts(out)}
    code, said, _ = run(arguments)
    assert (code, said.splitlines()[1]) == (0, "done before: 30 images")
    make_pictures(folder / "more", 5)
    code, said, _ = run(arguments)
    assert code == 0
    assert said.startswith("5 images, ")
    assert before.items() <= {file: file.stat().st_mtime_ns for file in parts(out)}.items()
    assert len({row["path"] for row in rows(out)}) == len(rows(out)) == 35


def test_a_driver_that_is_killed_again_and_again(
    tmp_path: Path, bundle: Path, joined: list[str | Path]
) -> None:
    folder, out = tmp_path / "pictures", tmp_path / "out"
    paths = make_pictures(folder, 1600)
    arguments = [bundle, folder, "--output", out, *joined, "--quiet"]
    chance = random.Random(5)
    killed = 0
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        more = len(parts(out)) + chance.randint(1, 12)
        with start(arguments) as process:
            wait_until(lambda more=more: len(parts(out)) >= more, process)  # type: ignore[misc]
            time.sleep(chance.random() * 0.1)
            process.send_signal(number)
            code = process.wait(60)
            killed += code == -signal.SIGKILL
            assert code in (-signal.SIGKILL, 128 + signal.SIGTERM)
    assert killed == 2
    assert 0 < len(parts(out)) < 80
    assert run(arguments)[0] == 0
    found = [row["path"] for row in rows(out)]
    assert found == [str(path) for path in paths]
    assert sorted(item.name for item in out.iterdir()) == [".lock", "index", "results", "run.json"]


def test_an_actor_that_dies_is_replaced_and_a_picture_that_kills_is_given_up(
    tmp_path: Path, bundle: Path, joined: list[str | Path]
) -> None:
    paths = make_pictures(tmp_path / "pictures", 3)
    os.mkfifo(tmp_path / "hangs.png")
    out = tmp_path / "out"
    listed = [*map(str, paths[:2]), "hangs.png", str(paths[2])]
    (tmp_path / "list.txt").write_text("\n".join(listed))
    with start([bundle, tmp_path / "list.txt", "--output", out, *joined]) as process:
        last = 0
        for careful in (False, True, True):
            wait_until(
                lambda last=last, careful=careful: (  # type: ignore[misc]
                    word_of(out).get("process", last) != last and (word_of(out).get("at") == 2 or not careful)
                ),
                process,
            )
            last = word_of(out)["process"]
            os.kill(last, signal.SIGKILL)
        said, err = process.communicate(timeout=60)
    assert process.returncode == 1, err
    assert "a process that detects has died and was replaced" in err
    assert said.startswith("3 images, ")
    assert "failed: 1 (" in said
    found = {row["path"]: row["error"] for row in rows(out)}
    assert list(found.values()).count(None) == 3
    assert "'hangs.png': the process that detected in it died 2 times" in found["hangs.png"]


def test_a_cluster_that_is_not_there(tmp_path: Path, bundle: Path) -> None:
    make_pictures(tmp_path / "pictures", 1)
    with socket.socket() as unused:
        unused.bind(("", 0))
        port = unused.getsockname()[1]
        begin = time.monotonic()
        address = f"127.0.0.1:{port}"
        out = tmp_path / "out"
        code, _, err = run([bundle, tmp_path / "pictures", "--output", out, "--address", address])
        assert time.monotonic() - begin < 60  # Ray alone would wait two minutes
    assert code == 2
    assert err.startswith(f"asag-batch: error: there is no Ray cluster at '{address}' (connection refused)")
    assert err.count("\n") == 1
    assert not out.exists()


def test_a_cluster_that_wants_a_token_is_joined_with_it(
    tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A second each, until it is known that a token is wanted.
    monkeypatch.setenv("RAY_NUM_REDIS_GET_RETRIES", "2")
    make_pictures(tmp_path / "pictures", 2)
    for name in ("with", "without"):
        (tmp_path / name / ".ray").mkdir(parents=True)
    (tmp_path / "with" / ".ray" / "auth_token").write_text("0123456789abcdef" * 4)
    out = tmp_path / "out"
    with cluster(tmp_path / "with") as wants_token:
        arguments: list[str | Path] = [
            bundle,
            tmp_path / "pictures",
            "--output",
            out,
            "--address",
            wants_token,
        ]
        code, _, err = run(arguments, tmp_path / "without")
        assert code == 2
        assert f"the Ray cluster at '{wants_token}' takes nobody without its token: put what" in err
        assert err.count("\n") == 1
        assert not out.exists()
        code, said, err = run(arguments, tmp_path / "with")
    assert code == 0, err
    assert said.startswith("2 images, ")
    assert "by 1 actor of 1 thread" in said


def test_a_token_that_a_cluster_does_not_want_is_not_given(
    tmp_path: Path, bundle: Path, joined: list[str | Path]
) -> None:
    make_pictures(tmp_path / "pictures", 2)
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("0123456789abcdef" * 4)
    code, said, err = run([bundle, tmp_path / "pictures", "--output", tmp_path / "out", *joined], tmp_path)
    assert code == 0, err
    assert said.startswith("2 images, ")
