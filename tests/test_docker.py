"""The Dockerfiles: linted, and what they name exists.  No image is built: that needs Docker."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCKER = ROOT / "docker"
FILES = sorted(DOCKER.glob("*.Dockerfile"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CONSTRAINTS = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
)
SHORT_COMMANDS = {"detect": "asag-detect", "build": "asag-build", "serve": "asag-serve"}

each_file = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """One instruction of a Dockerfile, continuation lines joined."""

    name: str
    value: str


def instructions(file: Path) -> list[Instruction]:
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    parts = [line.partition(" ") for line in joined.splitlines() if line.strip()]
    return [Instruction(name=name, value=value.strip()) for name, _, value in parts]


def values(file: Path, name: str) -> list[str]:
    return [step.value for step in instructions(file) if step.name == name]


def arguments(file: Path) -> dict[str, str]:
    given = [value.partition("=") for value in values(file, "ARG")]
    return {name: value.strip('"') for name, equals, value in given if equals}


def filled(file: Path, text: str) -> str:
    """`text` with the file's build arguments put in; one without a default stays as it stands."""
    defaults = arguments(file)
    return re.sub(r"\$\{(\w+)\}", lambda match: defaults.get(match[1], match[0]), text)


def copied(file: Path) -> list[str]:
    """What is copied from the build context."""
    lists = [shlex.split(value) for value in values(file, "COPY")]
    return [source for words in lists if not words[0].startswith("--from") for source in words[:-1]]


def test_there_are_images_for_cpu_gpu_tensorrt_and_serving() -> None:
    assert [file.stem for file in FILES] == ["cpu", "gpu", "serve", "tensorrt"]


@each_file
def test_linter_finds_nothing(file: Path) -> None:
    assert lint(file) == []


def test_linter_finds_what_is_wrong(tmp_path: Path) -> None:
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM python:latest\nRUN pip install numpy\n")
    assert {"DL3007", "DL3013", "DL3042"} <= set(lint(bad))


def lint(file: Path) -> list[str]:
    program = Path(sys.executable).with_name("hadolint")
    command = [str(program), "--no-color", "--format", "json", str(file)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=DOCKER)
    assert run.stderr == ""
    return [finding["code"] for finding in json.loads(run.stdout)]


@each_file
def test_base_images_are_pinned(file: Path) -> None:
    stages = {value.split()[-1] for value in values(file, "FROM") if " AS " in value}
    bases = [filled(file, value.split()[0]) for value in values(file, "FROM")]
    for base in bases:
        assert base in stages or re.search(r":\d+\.\d+\.\d+-", base), base


@each_file
def test_what_is_copied_exists_and_reaches_the_builder(file: Path) -> None:
    sources = copied(file)
    assert "asag_deploy" in sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert is_sent(source), source


def is_sent(path: str) -> bool:
    """Whether .dockerignore lets a path through: the last pattern for it or a folder above decides."""
    sent = True
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = line.removeprefix("!")
        above = [path, *(str(parent) for parent in Path(path).parents)]
        if line and not line.startswith("#") and any(fnmatch.fnmatch(p, pattern) for p in above):
            sent = line.startswith("!")
    return sent


def test_nothing_else_reaches_the_builder() -> None:
    assert not any(map(is_sent, ("tests", "docs/gallery.jpg", ".git/config", ".venv/bin/python", "runs")))


@each_file
def test_stages_that_are_copied_from_exist(file: Path) -> None:
    stages = {value.split()[-1] for value in values(file, "FROM") if " AS " in value}
    wanted = {match[1] for value in values(file, "COPY") if (match := re.match(r"--from=(\S+)", value))}
    assert wanted == stages


@each_file
def test_the_whole_distribution_is_installed_with_the_pinned_versions(file: Path) -> None:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    assert set(tool["hatch"]["build"]["targets"]["wheel"]["packages"]) <= set(copied(file))
    install = next(value for value in values(file, "RUN") if ".[" in value)
    assert "--constraint constraints.txt" in install
    assert "constraints.txt" in copied(file)
    extras = set(arguments(file)["EXTRAS"].split(","))
    assert extras <= set(PROJECT["optional-dependencies"])
    # Nothing that an image runs needs PyTorch.
    assert not extras & {"train", "export", "bench", "dev"}
    assert ("serve" in extras) or file.stem == "cpu"


@each_file
def test_versions_agree_with_the_constraints(file: Path) -> None:
    """Whatever is pinned in a Dockerfile and in constraints.txt has the same version in both."""
    pins = re.findall(r"([\w.-]+)==([\w.]+)", filled(file, file.read_text(encoding="utf-8")))
    for name, version in pins:
        assert CONSTRAINTS.get(name, version) == version, name
    python = re.search(r"\bpython(?::|3=)(3\.\d+)", filled(file, file.read_text(encoding="utf-8")))
    assert python is not None
    assert f"Programming Language :: Python :: {python[1]}" in PROJECT["classifiers"]


@each_file
def test_it_runs_as_an_ordinary_user(file: Path) -> None:
    assert values(file, "USER") == ["10001:10001"]
    names = [step.name for step in instructions(file)]
    assert names.index("USER") > max(i for i, name in enumerate(names) if name == "RUN")


@each_file
def test_the_last_stage_has_no_compiler(file: Path) -> None:
    steps = instructions(file)
    last = max(i for i, step in enumerate(steps) if step.name == "FROM")
    text = " ".join(step.value for step in steps[last:])
    assert "-devel" not in text
    assert not re.search(r"\b(build-essential|gcc|g\+\+|cmake|pip install)\b", text)


@each_file
def test_what_it_starts_exists(file: Path) -> None:
    entry = json.loads(values(file, "ENTRYPOINT")[-1])
    assert entry == ["asag-entrypoint"]
    assert "docker/entrypoint.sh /usr/local/bin/asag-entrypoint" in values(file, "COPY")
    assert os.access(DOCKER / "entrypoint.sh", os.X_OK)
    command = json.loads(values(file, "CMD")[-1])
    assert command[0] in SHORT_COMMANDS or command == ["--doctor"]


def test_serving_image_is_watched_where_it_serves() -> None:
    command = json.loads(values(DOCKER / "serve.Dockerfile", "CMD")[-1])
    port = command[command.index("--port") + 1]
    assert command[command.index("--host") + 1] == "0.0.0.0"  # reached from outside the container
    assert values(DOCKER / "serve.Dockerfile", "EXPOSE") == [port]
    check = values(DOCKER / "serve.Dockerfile", "HEALTHCHECK")[0]
    assert f"http://127.0.0.1:{port}/health" in check
    program = json.loads(check[check.index("CMD ") + 4 :])
    compile(program[2], "HEALTHCHECK", "exec")


@pytest.mark.parametrize(
    ("given", "started"),
    [
        (["detect", "/bundle", "my photos"], ["asag-detect", "/bundle", "my photos"]),
        (["build", "/bundle"], ["asag-build", "/bundle"]),
        (["serve", "/bundle", "--port", "80"], ["asag-serve", "/bundle", "--port", "80"]),
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


def test_the_libraries_are_where_the_plugins_are_installed() -> None:
    """The file names that the environment promises are targets of plugins/CMakeLists.txt."""
    cmake = (ROOT / "plugins" / "CMakeLists.txt").read_text(encoding="utf-8")
    for file in FILES:
        named = re.findall(r"/opt/kernels/lib/lib(\w+)\.so", file.read_text(encoding="utf-8"))
        assert bool(named) == (file.stem in ("gpu", "tensorrt"))
        assert all(f"install(TARGETS {name} LIBRARY DESTINATION lib)" in cmake for name in named)
    assert "asag_plugins.so" in (DOCKER / "tensorrt.Dockerfile").read_text(encoding="utf-8")


@each_file
def test_readme_builds_and_runs_it(file: Path) -> None:
    readme = (DOCKER / "README.md").read_text(encoding="utf-8")
    assert f"docker build -f docker/{file.name} -t asag-deploy:{file.stem} ." in readme
    assert re.search(rf"docker run .*asag-deploy:{file.stem}", readme.replace("\\\n", " "))
