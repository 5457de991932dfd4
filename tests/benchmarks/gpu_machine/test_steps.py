"""Steps and programs with a limit, and the report they leave."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from asag_bench.gpu_machine.programs import Logs, Program, start
from asag_bench.gpu_machine.report import MOST_BYTES, page, write_report
from asag_bench.gpu_machine.steps import Result, Skip, Step, run_steps
from asag_deploy.errors import BackendError
from support.programs import in_python


def step(name: str, action: Callable[[float], dict[str, Any]], limit: float = 60) -> Step:
    return Step(name=name, limit=limit, action=action)


class TestSteps:
    def test_what_goes_wrong_in_a_step_is_its_result(self) -> None:
        def skip(_: float) -> dict[str, Any]:
            raise Skip("no compiler")

        def fail(_: float) -> dict[str, Any]:
            raise BackendError("the GPU is on fire")

        def crash(_: float) -> dict[str, Any]:
            return {"nothing": 1 / 0}

        reported: list[int] = []
        actions = (skip, fail, crash, lambda limit: {"detail": "fine", "limit": limit})
        steps = [step(action.__name__, action) for action in actions]
        results = run_steps(steps, time.monotonic() + 100, lambda results: reported.append(len(results)))
        assert [(result.state, result.detail) for result in results] == [
            ("skipped", "no compiler"),
            ("failed", "the GPU is on fire"),
            ("failed", "ZeroDivisionError: division by zero"),
            ("passed", "fine"),
        ]
        assert results[-1].data == {"limit": 60}
        assert reported == [1, 2, 3, 4]  # after each

    def test_the_whole_has_a_limit(self) -> None:
        given: list[float] = []

        def wait(limit: float) -> dict[str, Any]:
            given.append(limit)
            time.sleep(0.2)
            return {}

        results = run_steps(
            [step("first", wait), step("second", wait)], time.monotonic() + 5.1, lambda _: None
        )
        assert [result.state for result in results] == ["passed", "skipped"]
        assert results[1].detail == "no time was left"
        assert given[0] <= 5.1  # less than its own limit of 60


class TestPrograms:
    def test_what_a_program_writes(self, tmp_path: Path) -> None:
        logs = Logs()
        text = "import os, sys; print(os.environ['GIVEN']); sys.stderr.write('and this')"
        assert in_python(text, tmp_path, logs).wait(60) == "by the step\nand this"
        assert "ended with 0" in logs.parts[0]

    def test_one_that_fails_is_quoted(self, tmp_path: Path) -> None:
        with pytest.raises(BackendError) as error:
            in_python("print('last words\\n   ^^^~~\\n'); raise SystemExit(3)", tmp_path).wait(60)
        assert str(error.value).endswith("ended with 3: last words")

    def test_one_that_takes_too_long_is_ended_with_all_it_started(self, tmp_path: Path) -> None:
        child = "import time; time.sleep(600)"
        text = (
            "import subprocess, sys, time\n"
            f"child = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
            "print(child.pid, flush=True)\n"
            "time.sleep(600)"
        )
        logs = Logs()
        program = in_python(text, tmp_path, logs)
        while not (tmp_path / "log").read_text():
            time.sleep(0.05)
        with pytest.raises(BackendError, match="was ended after its limit of 0 s"):
            program.wait(0.1)
        child_pid = int((tmp_path / "log").read_text().split()[0])
        deadline = time.monotonic() + 30
        while _runs(child_pid):
            assert time.monotonic() < deadline, "the child still runs"
            time.sleep(0.05)
        assert f"{child_pid}" in logs.parts[0]

    def test_one_that_ignores_the_interrupt(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Program.stop, "__defaults__", (0.1,))
        text = (
            "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
            "print('deaf', flush=True); time.sleep(600)"
        )
        program = in_python(text, tmp_path)
        while not (tmp_path / "log").read_text():
            time.sleep(0.05)
        with pytest.raises(BackendError, match=r"was ended after its limit .*: deaf"):
            program.wait(0.1)

    def test_one_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(BackendError, match="`/no/such` could not be started"):
            start(["/no/such"], log=tmp_path / "log", logs=Logs(), cwd=tmp_path, environment={})

    def test_only_the_end_of_a_long_output_is_kept(self, tmp_path: Path) -> None:
        logs = Logs()
        in_python("print('x' * 700_000); print('the end')", tmp_path, logs).wait(60)
        assert len(logs.parts[0]) < 600_000
        assert "the end" in logs.parts[0]


class TestReport:
    def test_a_few_files_complete_at_any_time(self, tmp_path: Path) -> None:
        results = [
            Result(name="one", state="failed", detail="a | b\nc", seconds=1.5),
            Result(name="two", state="passed", data={"page": "## Table\n", "more": [1]}),
        ]
        write_report(tmp_path, {"gpu": "Imaginary", "packages": {"numpy": "2"}}, results, ["log"])
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "gpu_machine.json",
            "gpu_machine.log",
            "gpu_machine.md",
        ]
        report = json.loads((tmp_path / "gpu_machine.json").read_text())
        assert [found["state"] for found in report["steps"]] == ["failed", "passed"]
        text = page({"gpu": "Imaginary", "packages": {"numpy": "2"}}, results)
        assert "| one | failed | 1.5 | a / b c |" in text
        assert "- packages: numpy 2" in text
        assert text.endswith("## two\n\n## Table\n")

    def test_what_a_program_wrote_is_no_html_and_no_link(self) -> None:
        said = r"say `pip install x[y]`; \x1b[1m[E:a] [b] C<d::e> 2*3"
        result = Result(name="one", state="failed", seconds=1, detail=said)
        assert r"say `pip install x[y]`; \x1b\[1m\[E:a] \[b] C\<d::e> 2\*3 |" in page({}, [result])

    def test_folders_of_the_machine_are_not_in_it(self, tmp_path: Path) -> None:
        results = [Result(name="one", state="passed", data={"page": "`asag-bench run /home/me/tree/x`"})]
        write_report(tmp_path, {}, results, ["$ python /home/me/tree/benchmarks"], {"/home/me/tree": "."})
        texts = [path.read_text() for path in tmp_path.iterdir()]
        assert not any("/home/me" in text for text in texts)
        assert any("$ python ./benchmarks" in text for text in texts)

    def test_no_file_is_too_large(self, tmp_path: Path) -> None:
        large = "x" * (MOST_BYTES + 10)
        result = Result(name="one", state="passed", data={"page": large})
        write_report(tmp_path, {}, [result], [large, "the end"])
        assert all(path.stat().st_size <= MOST_BYTES for path in tmp_path.iterdir())
        report = json.loads((tmp_path / "gpu_machine.json").read_text())
        assert report["steps"][0]["data"] == {"left out": "the report would have been too large"}
        assert (tmp_path / "gpu_machine.log").read_text().endswith("the end")


def _runs(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
