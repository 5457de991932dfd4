"""What is made of results: comparing two runs, the page of recorded results, and its plot."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from asag_bench.cli import main
from asag_bench.gpu_machine.report import page as report_page
from asag_bench.gpu_machine.steps import Result as Step
from asag_bench.measuring.headline import headline
from asag_bench.measuring.machine import describe_machine
from asag_bench.reports import compare, page
from asag_bench.reports.plots import draw_summary, images_per_second
from asag_bench.reports.report import markdown, sentences
from asag_bench.result import Result, parse_result, to_json
from asag_deploy.errors import ConfigError, SourceError
from asag_deploy.kernels.structures import INTERFACE_VERSION
from support.tiny_bundle import make_bundle, picture

ROOT = Path(__file__).parents[3]
RECORDED = ROOT / "benchmarks" / "results"


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A real run on a tiny bundle; every row said to be stable, so that they claim something."""
    folder = tmp_path_factory.mktemp("recorded")
    bundle = make_bundle(folder / "bundle")
    (folder / "photos").mkdir()
    for name, colour in {"p5": (0, 0), "p4": (4, 0), "p3": (5, 2)}.items():
        cv2.imwrite(str(folder / "photos" / f"{name}.png"), picture(*colour)[..., ::-1])
    arguments = ["run", str(bundle.path), "--images", str(folder / "photos")]
    arguments += ["--output-dir", str(folder / "out")]
    arguments += ["--reference", "unsplit,always-probe", "--baseline", "unsplit", "--batch", "1,2"]
    assert (
        main([*arguments, "--duration", "0.03", "--warmup", "1", "--threads", "1", "--quiet", "--no-plots"])
        == 0
    )
    found: dict[str, Any] = json.loads((folder / "out" / "result.json").read_text())
    for group in found["strata"]:
        for runner in group["subjects"].values():
            runner["stable"] = True
    return found


def parsed(result: dict[str, Any]) -> Result:
    return parse_result(result, Path("result.json"))


def write(folder: Path, **results: Any) -> Path:
    for name, value in results.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def slower(result: dict[str, Any], factor: float) -> dict[str, Any]:
    """The same run, but for one row that takes longer."""
    changed = copy.deepcopy(result)
    runner = changed["strata"][0]["subjects"]["onnxruntime"]
    runner["ms"]["p50"] *= factor
    return changed


def test_the_headline(result: dict[str, Any]) -> None:
    typed = parsed(result)
    again = headline(
        typed.groups,
        baseline=typed.baseline,
        references=typed.options.references,
        accuracy=typed.accuracy,
    )
    found = to_json(again)
    assert found == result["headline"]
    assert found["reference"] == "unsplit"
    assert list(found["subjects"]) == ["onnxruntime", "unsplit", "always-probe"]
    own = found["subjects"]["onnxruntime"]
    first = result["strata"][0]["subjects"]
    assert own["times_as_fast"]["P5"] == first["onnxruntime"]["times_as_fast_as_the_reference"]
    assert found["subjects"]["unsplit"]["times_as_fast"]["P5"] == {"median": 1, "p25": 1, "p75": 1}
    assert set(own["after_the_neck"]) == {"P5", "P4", "P3", "worst"}
    assert own["after_the_neck"]["P5"] == first["onnxruntime"]["after_the_neck"]
    assert own["probing_costs"]["median"] > -1
    assert own["loop_ms"] == max(
        group["subjects"]["onnxruntime"]["phases_ms"]["loop"]
        for group in result["strata"]
        if group["batch"] == 1
    )
    lines = "\n".join(sentences(again))
    for text in (
        "onnxruntime: times as fast as unsplit: P5 ",
        "onnxruntime: everything after the neck, on top of backbone and neck: P5 ",
        "onnxruntime: probing costs ",
        "onnxruntime: the loop's own overhead: ",
    ):
        assert text in lines


def test_two_runs_that_agree(
    result: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path, a=result, b=slower(result, 1.04), c=slower(result, 1.06))
    assert main(["compare", str(folder / "a.json"), str(folder / "b.json")]) == 0
    rows = sum(len(group["subjects"]) for group in result["strata"])
    assert f"{rows} of {rows} stable rows agree within 5%" in capsys.readouterr().out
    assert main(["compare", str(folder / "a.json"), str(folder / "c.json")]) == 1
    out = capsys.readouterr().out
    assert f"{rows - 1} of {rows} stable rows agree" in out
    assert sum(line.endswith("NO") for line in out.splitlines()) == 1
    assert main(["compare", str(folder / "a.json"), str(folder / "c.json"), "--tolerance", "0.1"]) == 0


def test_rows_that_are_not_stable_claim_nothing(
    result: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    far = slower(result, 2.0)
    far["strata"][0]["subjects"]["onnxruntime"]["stable"] = False
    folder = write(tmp_path, a=result, b=far)
    assert main(["compare", str(folder / "a.json"), str(folder / "b.json")]) == 0
    out = capsys.readouterr().out
    rows = sum(len(group["subjects"]) for group in result["strata"])
    assert f"{rows - 1} of {rows - 1} stable rows agree within 5%; 1 of all {rows} are not stable" in out
    for group in far["strata"]:
        for runner in group["subjects"].values():
            runner["stable"] = False
    write(tmp_path, b=far)
    assert main(["compare", str(folder / "a.json"), str(folder / "b.json")]) == 1
    assert "0 of 0 stable rows" in capsys.readouterr().out


def test_runs_that_cannot_be_compared(
    result: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = copy.deepcopy(result)
    other["machine"]["processor"] = "another"
    with pytest.raises(ConfigError, match="of different processors"):
        compare.pairs_of(parsed(result), parsed(other))
    other = copy.deepcopy(result)
    other["machine"]["compiled_operators"] = "interface 10"
    with pytest.raises(ConfigError, match="of different compiled operators"):
        compare.pairs_of(parsed(result), parsed(other))
    other = copy.deepcopy(result)
    other["bundles"]["onnxruntime"]["graphs"]["decoder"] = "0"
    with pytest.raises(ConfigError, match="of different graphs"):
        compare.pairs_of(parsed(result), parsed(other))
    folder = write(tmp_path, a=result, b={"no": "result"})
    for second, sentence in (
        ("b.json", "is no result of asag-bench"),
        ("absent.json", "cannot read the result"),
    ):
        assert main(["compare", str(folder / "a.json"), str(folder / second)]) == 2
        err = capsys.readouterr().err
        assert sentence in err
        assert err.count("\n") == 1
    assert main(["compare", str(folder / "a.json"), str(folder / "a.json"), "--tolerance", "2"]) == 2


def test_whether_operators_were_compiled(
    result: dict[str, Any], tmp_path: Path, host_library_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record says so, and so does its page; an older one, which does not, can still be compared."""
    assert result["machine"]["compiled_operators"] == "none"
    monkeypatch.setenv("ASAG_CPU_KERNELS_LIBRARY", str(host_library_path))
    assert describe_machine().compiled_operators == f"interface {INTERFACE_VERSION}"
    monkeypatch.setenv("ASAG_CPU_KERNELS_LIBRARY", str(tmp_path / "none.so"))
    assert describe_machine().compiled_operators == "none"
    older = copy.deepcopy(result)
    del older["machine"]["compiled_operators"]
    assert "\n- compiled operators: none\n" in markdown(parsed(result))
    assert "compiled operators" not in markdown(parsed(older))
    throughput = {"command": "asag-bench throughput", "machine": result["machine"]}
    listed = page.page(page.read_results(write(tmp_path, a=throughput)))
    assert re.search(r"\| .*, \d+ cores, compiled operators: none \|", listed)
    told, agrees = compare.compare(parsed(result), parsed(older), 0.05)
    assert agrees
    assert told.splitlines()[-1].startswith("not every result says whether operators were compiled")


def test_the_recorded_page_is_of_the_recorded_results() -> None:
    results = page.read_results(RECORDED)
    assert (RECORDED / page.PAGE).read_text(encoding="utf-8") == page.page(results), (
        "benchmarks/results has changed: run `asag-bench page`"
    )
    if page.shown(results)[0] is not None:
        assert page.fingerprint(results).encode() in (ROOT / page.PLOT).read_bytes()


@pytest.mark.parametrize("file", sorted(RECORDED.glob("asag-bench-*.json")), ids=lambda file: file.stem)
def test_a_recorded_result_is_read_as_it_was_written(file: Path) -> None:
    """What earlier releases did not write has its default; all else is the same, in the same order."""
    data = json.loads(file.read_text(encoding="utf-8"))
    assert holds(to_json(parsed(data)), data) == []


@pytest.mark.parametrize("file", sorted(RECORDED.glob("gpu-machine-*.json")), ids=lambda file: file.stem)
def test_the_page_of_a_recorded_report_is_of_the_report(file: Path) -> None:
    report = json.loads(file.read_text(encoding="utf-8"))
    steps = [Step(**step) for step in report["steps"]]
    assert file.with_suffix(".md").read_text(encoding="utf-8") == report_page(report["machine"], steps)


def holds(whole: Any, part: Any, path: str = "") -> list[str]:
    """The paths at which `part` is not what `whole` holds there."""
    if not isinstance(part, dict):
        return [] if whole == part else [path]
    if [key for key in whole if key in part] != list(part):
        return [path]
    return [wrong for key in part for wrong in holds(whole[key], part[key], f"{path}.{key}")]


def test_a_result_that_lacks_something_is_refused_by_name(result: dict[str, Any]) -> None:
    other = copy.deepcopy(result)
    del other["strata"][0]["subjects"]["onnxruntime"]["calls"]
    with pytest.raises(SourceError, match=r"`strata\[0\].subjects.onnxruntime.calls` is missing"):
        parsed(other)


def test_page_and_plot(result: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    older = {"command": "python -m other", "machine": result["machine"]}
    machine = {**result["machine"], "gpu": "a GPU (sm86)"}
    report = {"machine": machine, "steps": []}
    options = {"machine": {"command": "asag-bench gpu run --only loops", **machine}, "steps": []}
    front = {"command": "asag-bench front", "machine": machine, "contenders": []}
    seeds = {"command": "asag-paper seeds", "machine": machine, "runs": [], "seeds": []}
    folder = write(tmp_path, a=older, b=result, c=report, d=options, e=front, f=seeds)
    plot = tmp_path / "plot.png"
    assert main(["page", "--results", str(folder), "--plot", str(plot)]) == 0
    text = (folder / "README.md").read_text()
    assert "| [a.json](a.json) | `python -m other` |" in text
    assert "| [c.json](c.json), [its page](c.md) | `python benchmarks gpu run` | a GPU (sm86) |" in text
    assert "[its page](d.md) | `asag-bench gpu run --only loops` |" in text
    assert "[e.json](e.json), [what it shows](../../docs/front.md#results) | `asag-bench front` |" in text
    assert "| [f.json](f.json), [its page](f.md) | `asag-paper seeds` |" in text
    assert f"`{result['command']}`" in text
    assert "### Latency" in text
    assert "[b.json](b.json)" in text
    results = page.read_results(folder)
    assert page.shown(results) == ("b.json", None)
    assert page.fingerprint(results).encode() in plot.read_bytes()
    drawn = cv2.imread(str(plot))
    assert drawn is not None
    assert np.ptp(drawn) > 100
    write(folder, b=slower(result, 2.0))
    changed = page.read_results(folder)
    assert page.page(changed) != text
    assert page.fingerprint(changed).encode() not in plot.read_bytes()


def test_folders_that_are_no_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SourceError, match="there are no results"):
        page.read_results(tmp_path)
    (tmp_path / "a.json").write_text("[]")
    assert main(["page", "--results", str(tmp_path)]) == 2
    assert "is no result of this project's benchmarks" in capsys.readouterr().err


def test_speed_beside_accuracy(result: dict[str, Any], tmp_path: Path) -> None:
    measured = copy.deepcopy(result)
    measured["accuracy"] = {"onnxruntime": {"images": 3, "ap": 0.5, "ap50": 0.6, "ap75": 0.5}}
    draw_summary(parsed(result), parsed(measured), tmp_path / "plot.png", "a fingerprint")
    assert b"a fingerprint" in (tmp_path / "plot.png").read_bytes()
    for group in measured["strata"]:
        speed = {"P5": 10.0, "P4": 5.0, "P3": 2.0}.get(group["images"], 1.0)
        group["subjects"]["onnxruntime"]["images_per_second"] = speed
    assert images_per_second(parsed(measured), "onnxruntime") == pytest.approx(3 / (0.1 + 0.2 + 0.5))
