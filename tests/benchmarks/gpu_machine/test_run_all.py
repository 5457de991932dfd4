"""The command for a GPU machine: what it does in which order, what it leaves, and what ends it."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from asag_bench.cli import _parser, main
from asag_bench.gpu_machine import plan, work
from asag_bench.gpu_machine.plan import time_loops
from asag_bench.gpu_machine.programs import Program
from asag_bench.gpu_machine.run import chosen
from asag_bench.gpu_machine.steps import Failed, Skip, run_step
from asag_bench.gpu_machine.work import BUILD_VARIABLE, ROOT, Work
from asag_deploy.backends import BACKENDS
from asag_deploy.cuda import why_no_cuda
from asag_deploy.errors import BackendError, ConfigError
from asag_evaluation.data.coco import VAL_SPLIT
from asag_export.demo import networks as demo
from support import plugin_builds
from support.programs import in_python
from support.simulated_gpu.fake_cuda import FakeCuda
from support.simulated_gpu.fake_gpu import install_cuda

PROGRAMS = ("asag_export.cli", "asag_evaluation.data.cli", "asag_deploy.engines.cli")
"""Modules that are run."""
COMMANDS = {
    "run": ("asag_bench.measuring.run", "asag_bench.reports.report"),
    "parity": ("asag_bench.measuring.parity", "asag_export.gate.parity"),
    "training-step": ("asag_bench.measuring.training_step",),
    "torch-cuda-loop": ("asag_bench.measuring.torch_cuda_loop",),
}
"""Commands of `asag-bench` that are run, and what they import when they are."""
CLONE = ROOT / "benchmarks"
"""What Python runs where nothing is installed."""
MISSING = (
    *("faster_coco_eval", "supervision", "starlette", "uvicorn", "openvino", "hatchling", "matplotlib"),
    *("PIL", "pycocotools", "tensorrt", "tensorrt_rtx", "cupy", "tensorboard"),
)
"""What the machine to plan for does not have."""
WITHOUT_THEM = f"""
import sys
for name in {MISSING!r}:
    sys.modules[name] = None  # importing it now raises
"""


class TestPlan:
    def test_the_order_is_that_of_worth(self, tmp_path: Path) -> None:
        names = [step.name for step in plan.plan(Work(folder=tmp_path, gpu="sm90"))]
        expected = [
            *("compile the kernels", "kernels against the CPU", "tests: tests/plugins/test_on_gpu.py"),
            *("both loops over PyTorch's stages", "tests: tests/export/test_engines_on_gpu.py"),
            "engines of tensorrt-rtx",
            *("compute-sanitizer memcheck", "compute-sanitizer racecheck", "a training step in fp16"),
            *("parity of onnxruntime-cuda, float32", "AP of onnxruntime-cuda"),
            *(
                "time onnxruntime-cuda, float16",
                "time PyTorch, eager and as graphs",
                "time PyTorch, compiled",
            ),
        ]
        assert [name for name in names if name in expected] == expected
        assert len(set(names)) == len(names)

    def test_some_steps_alone(self, tmp_path: Path) -> None:
        steps = plan.plan(Work(folder=tmp_path, gpu="sm90"))
        names = [step.name for step in chosen(steps, ["loops over", "memcheck"])]
        assert names == [
            *("compile the kernels", "both loops over PyTorch's stages", "compute-sanitizer memcheck")
        ]
        assert chosen(steps, []) == steps
        with pytest.raises(ConfigError, match="no step has 'lops' in its name; the steps are: kernels"):
            chosen(steps, ["lops"])

    def test_every_file_with_a_test_for_the_gpu_is_run(self) -> None:
        files = plan.gpu_tests()
        assert {"tests/plugins/test_on_gpu.py", "tests/deploy/cuda/test_runtime.py"} <= set(files)
        assert "tests/deploy/bundle/test_bundle.py" not in files

    def test_what_is_said_twice_is_the_same(self) -> None:
        assert (plan.CHECKPOINT, plan.SEED, plan.VAL_SPLIT) == (demo.CHECKPOINT, demo.SEED, VAL_SPLIT)

        assert plugin_builds.BUILD_VARIABLE == BUILD_VARIABLE

    @pytest.mark.parametrize("backend", ["tensorrt-rtx", "tensorrt"])
    def test_engines_that_this_gpu_cannot_have_are_skipped_in_the_backends_words(
        self, tmp_path: Path, backend: str
    ) -> None:
        missing = BACKENDS[backend].problem()
        if missing is None:
            pytest.skip("there is a GPU on this machine")
        with pytest.raises(Skip) as reason:
            plan.build_engines(Work(folder=tmp_path, gpu="sm90"), backend, 60)
        assert str(reason.value) == str(missing)

    def test_without_a_gpu_what_needs_one_says_so(self, tmp_path: Path) -> None:
        here = Work(folder=tmp_path, gpu=None, no_gpu="there is no driver")
        with pytest.raises(Skip, match="no GPU: there is no driver"):
            plan.build_engines(here, "tensorrt-rtx", 60)
        with pytest.raises(Skip, match="since the kernels were not compiled"):
            plan.sanitize(here, "memcheck", 60)

    def test_only_this_gpus_kernels_are_compiled(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        commands: list[Sequence[Any]] = []
        monkeypatch.setattr(Work, "run", lambda self, command, limit, packages=(): commands.append(command))
        monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
        plan.compile_kernels(Work(folder=tmp_path, gpu="sm120"), 60)
        assert "-DCMAKE_CUDA_ARCHITECTURES=120-real" in commands[0]
        assert "Ninja" in commands[0]
        monkeypatch.setattr(shutil, "which", lambda name: None)
        with pytest.raises(Skip, match="cmake is not installed"):
            plan.compile_kernels(Work(folder=tmp_path, gpu="sm120"), 60)

    def test_every_program_takes_its_options(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """With a GPU, for which no rehearsal can stand in."""
        commands: list[list[str]] = []

        def note(self: Work, command: Sequence[Any], *_: Any, **__: Any) -> Any:
            commands.append([str(part) for part in command])
            raise BackendError("nothing is run here")

        monkeypatch.setattr(Work, "start", note)
        monkeypatch.setattr(Work, "made", lambda self, name, limit: self.folder / name)
        monkeypatch.setattr(plan, "missing", lambda work, backend: None)
        here = Work(folder=tmp_path, gpu="sm86")
        for step in plan.plan(here):
            assert run_step(step, 1000).state in ("failed", "skipped")
        monkeypatch.setattr(Work, "start", lambda self, command, **_: commands.append([*map(str, command)]))
        plan.begin(here, plan.plan(here))
        called: set[str] = set()
        for command in commands:
            if str(CLONE) in command:
                arguments = command[command.index(str(CLONE)) + 1 :]
                _parser().parse_args(arguments)
                called.add(arguments[0])
            elif "-m" in command and "pytest" not in command:
                module, *arguments = command[command.index("-m") + 1 :]
                importlib.import_module(module)._parser().parse_args(arguments)
                called.add(module)
        assert {*PROGRAMS, *COMMANDS} <= called

    def test_what_an_earlier_run_made_is_not_made_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        started: list[str] = []
        monkeypatch.setattr(Work, "start", lambda self, command, **_: started.append(Path(command[-1]).name))
        (tmp_path / plan.HALF).mkdir()
        (tmp_path / plan.HALF / "manifest.json").touch()
        (tmp_path / plan.DATA / "val2017").mkdir(parents=True)  # without its annotations
        here = Work(folder=tmp_path, gpu="sm90")
        plan.begin(here, plan.plan(here))
        assert sorted(started) == sorted([plan.SCENES, plan.SCENES_HALF, plan.DATA, plan.FULL])
        assert not (tmp_path / plan.DATA).exists()

    @pytest.mark.parametrize(
        ("gpu", "word", "made"),
        [
            ("sm90", "memcheck", []),
            ("sm90", "AP of", [plan.SCENES, plan.DATA]),
            ("sm90", "eager and as graphs", [plan.HALF]),
            (None, "eager and as graphs", [plan.SCENES]),  # which stands in for the large network
        ],
    )
    def test_only_what_the_steps_need_is_made(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: str | None, word: str, made: list[str]
    ) -> None:
        started: list[tuple[str, Any]] = []

        def start(self: Work, command: Sequence[Any], beside: Any) -> None:
            started.append((Path(command[-1]).name, beside))

        monkeypatch.setattr(Work, "start", start)
        here = Work(folder=tmp_path, gpu=gpu)
        plan.begin(here, chosen(plan.plan(here), [word]))
        assert started == [(name, (place, len(made))) for place, name in enumerate(made)]

    def test_what_a_step_waits_for_is_what_it_said(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[str] = []

        def made(self: Work, name: str, limit: float) -> Path:
            asked.append(name)
            return self.folder / name

        monkeypatch.setattr(Work, "made", made)
        monkeypatch.setattr(Work, "run", lambda *_: "")
        monkeypatch.setattr(Work, "bench", lambda *_: {"result": {"accuracy": {}}, "detail": ""})
        monkeypatch.setattr(plan, "missing", lambda work, backend: None)
        for gpu in ("sm86", None):
            for step in plan.plan(Work(folder=tmp_path, gpu=gpu)):
                asked.clear()
                run_step(step, 1000)
                assert gpu is None or tuple(asked) == step.needs, step.name
                assert set(asked) <= set(step.needs), step.name

    def test_the_kernels_own_checks(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        commands: list[Sequence[Any]] = []

        def run(self: Work, command: Sequence[Any], limit: float, packages: Sequence[str] = ()) -> str:
            commands.append([Path(part).name for part in command])
            return "12 checks\nall equal\n"

        monkeypatch.setattr(Work, "run", run)
        here = Work(folder=tmp_path, gpu="sm86")
        here.build.mkdir()
        for name in ("asag_check_device", "asag_check_plugins"):
            (here.build / name).touch()
        monkeypatch.delenv("TENSORRT_ROOT", raising=False)
        assert plan.check_kernels(here, 60) == {"detail": "all equal"}
        (tmp_path / "lib").mkdir()
        (tmp_path / "lib" / "libnvinfer.so.10").touch()
        monkeypatch.setenv("TENSORRT_ROOT", str(tmp_path))
        plan.check_kernels(here, 60)
        assert commands == [["asag_check_device"]] * 2 + [["asag_check_plugins", "libnvinfer.so.10"]]

    @pytest.mark.parametrize(
        ("code", "verdict"),
        [(0, None), (9, "errors were found"), (6, "broke off, which is no finding")],
    )
    def test_a_sanitizer_that_breaks_off_has_found_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, verdict: str | None
    ) -> None:
        program, sanitizer = tmp_path / "kernels" / "asag_check_device", tmp_path / "sanitizer"
        program.parent.mkdir()
        program.touch()
        sanitizer.write_text(
            f"""#!/bin/sh
            test "$*" = "--tool racecheck --error-exitcode 9 {program} $6" || exit 1
            echo '========= 0 hazards'
            if [ "$6" = graph ]; then exit {code}; fi
            """
        )
        sanitizer.chmod(0o755)
        monkeypatch.setattr(shutil, "which", lambda name: str(sanitizer))
        here = Work(folder=tmp_path, gpu="sm86")
        if verdict is None:
            assert plan.sanitize(here, "racecheck", 60) == {"detail": "kernels: 0 hazards; graph: 0 hazards"}
            return
        with pytest.raises(Failed) as error:
            plan.sanitize(here, "racecheck", 60)
        ended = f"sanitizer ended with {code}: ========= 0 hazards"
        assert str(error.value) == f"kernels: 0 hazards; graph: {verdict}: {ended}"


FIGURES = {
    "parts": {"pyramid": 1.5, "decoder": 0.5},
    "P3": {
        "loops_wall_ms": {"eager": 9.0, "host": 3.0, "device": 1.8},
        "deciding_us": {"device": 12.3, "wall": 15.0},
        "times_as_fast_as_eager": 5.0,
        "largest_difference": 0.0,
    },
}


class TestLoops:
    @pytest.mark.parametrize("fails", [False, True])
    def test_figures_are_kept_as_far_as_they_came(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
    ) -> None:
        def run(self: Work, command: Sequence[Any], limit: float, packages: Sequence[str] = ()) -> str:
            Path(command[-1]).write_text(json.dumps(FIGURES))
            if fails:
                raise BackendError("was ended after its limit of 120 s")
            return ""

        monkeypatch.setattr(Work, "run", run)
        (step,) = (s for s in plan.plan(Work(folder=tmp_path, gpu="sm90")) if s.name.startswith("both loops"))
        result = run_step(step, 100)
        assert result.state == ("failed" if fails else "passed")
        told = "limit of 120 s" if fails else "P3: host 3.00 ms, device 1.80, eager 9.00"
        assert told in result.detail
        assert (
            "| P3 | 9.00 ms | 3.00 ms | 1.80 ms | 5.00 | 12 us (device), 15 us (wall) |"
            in result.data["page"]
        )
        assert "pyramid 1.500 ms" in result.data["page"]

    def test_a_failure_before_the_first_figure(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def run(self: Work, command: Sequence[Any], limit: float, packages: Sequence[str] = ()) -> str:
            raise BackendError("no kernels")

        monkeypatch.setattr(Work, "run", run)
        with pytest.raises(Failed, match="no kernels") as error:
            time_loops(Work(folder=tmp_path, gpu="sm90"), "asag-a-r50-100", 60)
        assert error.value.data == {}


class TestWork:
    def test_nothing_is_installed(self, tmp_path: Path) -> None:
        """Modules are found in the tree, and carried packages where they are asked for."""
        packages = {name: tmp_path / name for name in ("onnxruntime-gpu", "faster-coco-eval")}
        for name, module in (("onnxruntime-gpu", "onnxruntime"), ("faster-coco-eval", "faster_coco_eval")):
            (packages[name] / module).mkdir(parents=True)
            (packages[name] / module / "__init__.py").touch()
        here = Work(folder=tmp_path, gpu="sm90", packages=packages)
        names = ("onnxruntime", "faster_coco_eval", "asag_bench", "support.small_network")
        ask = f"import importlib.util as u\nfor name in {names}: print(u.find_spec(name).origin)"
        command = [sys.executable, "-P", "-c", ask]
        plain, coco, bench, small = here.run(command, 60).split()
        assert not plain.startswith(str(tmp_path))
        assert coco.startswith(str(tmp_path))
        assert (Path(bench), Path(small)) == (
            ROOT / "benchmarks/asag_bench/__init__.py",
            ROOT / "tests/support/small_network.py",
        )
        assert here.run(command, 60, ["onnxruntime-gpu"]).split()[0].startswith(str(tmp_path))

    def test_tests_that_are_all_skipped_are_a_skipped_step(self, tmp_path: Path) -> None:
        if why_no_cuda() is None:
            pytest.skip("there is a GPU on this machine")
        here = Work(folder=tmp_path, gpu=None)
        with pytest.raises(Skip, match="needs an NVIDIA GPU"):
            here.tests("tests/deploy/cuda/test_runtime.py", 120)

    def test_what_could_not_be_made_in_the_background(self, tmp_path: Path) -> None:
        here = Work(folder=tmp_path, gpu=None)
        here.background["bundle"] = in_python("raise SystemExit('no disk')", tmp_path)
        with pytest.raises(BackendError, match="ended with 1: no disk"):
            here.made("bundle", 60)
        with pytest.raises(BackendError, match="'bundle' could not be made"):
            here.made("bundle", 60)
        here.background["other"] = in_python("import time; time.sleep(600)", tmp_path)
        process = here.background["other"].process
        with pytest.raises(BackendError, match="'other' is still being made after 0 s"):
            here.made("other", 0.1)
        assert process.poll() is None  # for those who ask later
        here.close()
        assert process.returncode is not None

    def test_steps_and_what_is_made_beside_them_share_the_cores(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cores: list[Sequence[int]] = []
        monkeypatch.setattr(work, "start", lambda command, **given: cores.append(given["cores"]))
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 7})
        here = Work(folder=tmp_path, gpu=None)
        here.start(["a"])
        here.start(["a"], beside=(0, 1))
        for place in range(3):
            here.start(["a"], beside=(place, 3))
        assert cores == [[0, 1, 2], [3, 7], [3], [7], [3]]


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process without the missing packages could import, run and collect."""
    output = tmp_path_factory.mktemp("bare") / "found.json"
    modules = [module for imported in COMMANDS.values() for module in imported]
    collect = [*("-m", "gpu", "--collect-only", "-q", "-W", "default", "-p", "no:cacheprovider")]
    text = f"""
import asag_bench.cli, asag_bench.gpu_machine.run, contextlib, importlib, io, json, pathlib, pytest, runpy
found = {{"torch": "torch" in sys.modules, "usages": 0, "tests": []}}
for name in {modules}:
    importlib.import_module(name)
for name in {PROGRAMS}:
    sys.argv = ["program", "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            runpy.run_module(name, run_name="__main__")
        except SystemExit as end:
            found["usages"] += not end.code and said.getvalue().startswith("usage: ")
class Collected:
    def pytest_collection_finish(self, session):
        found["tests"] = [item.nodeid for item in session.items]
found["code"] = int(pytest.main({[*collect, "-p", "no:xdist", *plan.gpu_tests()]!r}, plugins=[Collected()]))
pathlib.Path({str(output)!r}).write_text(json.dumps(found))
"""
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT_THEM + text]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(output.read_text())
    assert found["code"] == 0, done.stdout + done.stderr
    return found


def test_programs_run_where_packages_are_missing(bare: dict[str, Any]) -> None:
    """The command itself takes not even PyTorch; all that it runs does without the missing packages."""
    assert not bare["torch"]
    assert bare["usages"] == len(PROGRAMS)


def test_gpu_tests_are_collected_where_packages_are_missing(bare: dict[str, Any]) -> None:
    """As on the machine: by name, with no cache and no warning an error, and every file has some."""
    assert {test.partition("::")[0] for test in bare["tests"]} == set(plan.gpu_tests())


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    if why_no_cuda() is None:
        pytest.skip("there is a GPU on this machine")
    command = [sys.executable, str(CLONE), "gpu", "run", "--output-dir", str(tmp_path / "report")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("asag-bench: error: there is nothing to check without a GPU: ")
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize("fails", [False, True])
def test_a_whole_run_leaves_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fails: bool
) -> None:
    """On an imaginary GPU, with the programs left out."""
    install_cuda(monkeypatch, FakeCuda())
    started: list[str] = []

    def nothing(self: Work, command: Sequence[Any], **_: Any) -> Program:
        started.append(str(command[0]))
        return in_python(f"raise SystemExit({int(fails)})", tmp_path)

    monkeypatch.setattr(Work, "start", nothing)
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    output = tmp_path / "report"
    monkeypatch.setattr(plan, "gpu_tests", list)
    code = main(["gpu", "run", "--output-dir", str(output), "--work-dir", str(tmp_path / "work")])
    report = json.loads((output / "gpu_machine.json").read_text())
    assert report["machine"]["gpu"] == "Imaginary GPU (sm86)"
    assert report["machine"]["command"].startswith("asag-bench gpu run --output-dir ")
    states = {found["name"]: found["state"] for found in report["steps"]}
    assert states["compile the kernels"] == ("failed" if fails else "passed")
    assert states["compute-sanitizer memcheck"] == "skipped"
    assert "/bin/cmake" in started or "cmake" in started
    assert code == 1  # what the other programs should have written is not there
    assert f"{output}/gpu_machine.md" in capsys.readouterr().out


def test_options_that_make_no_sense(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpu", "run", "--seconds", "1", "--output-dir", str(tmp_path)]) == 2
    assert "--seconds is 1; expected at least 30" in capsys.readouterr().err
    missing = str(tmp_path / "none.tar.xz")
    assert main(["gpu", "run", "--rehearse", "--carried", missing, "--output-dir", str(tmp_path)]) == 2
    assert "none.tar.xz' cannot be unpacked" in capsys.readouterr().err
