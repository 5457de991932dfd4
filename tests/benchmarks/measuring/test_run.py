"""`asag-bench run` from its command line to its files, on a tiny bundle."""

from __future__ import annotations

import copy
import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from asag_bench import cli
from asag_bench.measuring import run
from asag_bench.reports import report
from asag_bench.reports.columns import COLUMNS, latency_rows
from asag_bench.result import Result, parse_result
from asag_bench.runners.graphs import PYRAMID, UNSPLIT, pyramid_bundle, unsplit_bundle
from asag_bench.runners.references import REFERENCES
from asag_bench.runners.runner import PHASES, Run
from asag_deploy.backends import BACKENDS, open_network
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.detector import Detector
from asag_deploy.processing.postprocess import detections_of
from support.bundle_edits import replace_graph
from support.coco_files import write_coco
from support.tiny_bundle import make_bundle, picture

QUICK = ("--duration", "0.05", "--warmup", "1", "--threads", "1", "--quiet")


def main(arguments: list[str]) -> int:
    return cli.main(["run", *arguments])


def typed(data: dict[str, Any]) -> Result:
    return parse_result(data, Path("result.json"))


def markdown(data: dict[str, Any]) -> str:
    return report.markdown(typed(data))


def on_screen(data: dict[str, Any]) -> str:
    return report.on_screen(typed(data))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("bench") / "bundle")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for each exit level, and one that is deeper than all."""
    folder = tmp_path_factory.mktemp("photos")
    for name, colour in {"p5": (0, 0), "p4": (4, 0), "p3": (5, 2), "p3-worst": (9, 6)}.items():
        cv2.imwrite(str(folder / f"{name}.png"), picture(*colour)[..., ::-1])
    return folder


@pytest.fixture(scope="module")
def result(bundle: Bundle, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Everything but PyTorch, in one run."""
    folder = tmp_path_factory.mktemp("result")
    arguments = [str(bundle.path), "--images", str(photos), "--output-dir", str(folder), *QUICK]
    arguments += ["--reference", "unsplit", "--reference", "always-probe", "--batch", "1", "--batch", "2"]
    assert main([*arguments, "--percentile", "50,99.9"]) == 0
    files = {"result.json", "result.md", "latency.png", "stages.png"}
    assert {path.name for path in folder.iterdir()} == files
    for plot in folder.glob("*.png"):
        drawn = cv2.imread(str(plot))
        assert drawn is not None
        assert np.ptp(drawn) > 100
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    assert (folder / "result.md").read_text() == markdown(found)
    return found


def test_image_groups(result: dict[str, Any]) -> None:
    assert result["input"]["exit_levels"] == {"P5": 1, "P4": 1, "P3": 2}
    names = [(group["images"], group["batch"]) for group in result["strata"]]
    assert names == [(name, batch) for batch in (1, 2) for name in ("P5", "P4", "P3", "worst")]
    by_name = {group["images"]: group for group in result["strata"]}
    assert by_name["worst"]["pictures"] == ["p3-worst.png"]
    assert by_name["P5"]["patches"] == [0]
    exits = {name: group["subjects"]["onnxruntime"]["exits"] for name, group in by_name.items()}
    stopped = by_name["P3"]["subjects"]["onnxruntime (stopped at P5)"]
    assert list(stopped["exits"]) == ["P5"]
    assert [list(levels) for levels in exits.values()] == [["P5"], ["P4"], ["P3"], ["P3"]]


def test_figures(result: dict[str, Any]) -> None:
    for group in result["strata"]:
        stopped = ["onnxruntime (stopped at P5)"] if group["images"] == "P3" else []
        assert list(group["subjects"]) == ["onnxruntime", *stopped, "unsplit", "always-probe"]
        for runner in group["subjects"].values():
            calls = [ms for window in runner["windows_ms"] for ms in window]
            assert runner["calls"] == len(calls) >= 1
            assert runner["ms"]["max"] == max(calls)
            assert set(runner["ms"]) == {"p50", "p99.9", "mean", "min", "max"}
        split = group["subjects"]["onnxruntime"]
        assert split["backbone_and_neck_ms"] > 0
        assert group["subjects"]["unsplit"]["backbone_and_neck_ms"] is None
        assert sum(split["share_of_total"].values()) == pytest.approx(1, abs=0.01)
        assert split["times_as_long_as_the_first"] == {"median": 1, "p25": 1, "p75": 1}
        assert group["subjects"]["unsplit"]["phases_ms"] == {}
        probed = {"P5": set(), "P4": {"probe_p4"}}.get(group["images"], {"probe_p4", "probe_p3"})
        assert set(split["phases_ms"]) == {*PHASES} - {"probe_p4", "probe_p3"} | probed
        assert "probe_p3" in group["subjects"]["always-probe"]["phases_ms"]


def test_what_it_was_measured_on(result: dict[str, Any], bundle: Bundle) -> None:
    assert result["machine"]["packages"]["onnxruntime"]
    assert result["machine"]["processor"]
    assert result["command"].startswith("asag-bench run ")
    assert result["options"]["threads"] == 1
    assert result["bundle"]["graphs"]["decoder"] == bundle.manifest.graph("decoder").sha256
    assert result["bundle"]["trained"] is False
    assert result["memory"]["peak_mib"] > 10
    assert set(result["memory"]["subjects"]) == {"onnxruntime", "unsplit", "always-probe"}


def test_load_times_and_memory_are_columns(result: dict[str, Any]) -> None:
    result = copy.deepcopy(result)
    titles, *rows = latency_rows(typed(result))
    load, added = titles.index("load s"), titles.index("MiB")
    for row in rows:
        found = result["memory"]["subjects"].get(row[2])
        assert row[load] == ("-" if found is None else f"{found['load_s']:.2f}")
        assert row[added] == ("-" if found is None else f"{found['added_mib']:.0f}")
    assert "growth MiB" not in titles
    for found in result["memory"]["subjects"].values():
        del found["load_s"]  # as in results of earlier releases
    assert "load s" not in latency_rows(typed(result))[0]
    assert "memory of unsplit: " in on_screen(result)


def test_the_help_says_how_each_column_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = "".join(capsys.readouterr().out.split())
    for name, meaning in {**REFERENCES, **{column.title: column.measured for column in COLUMNS}}.items():
        assert f"{name},{meaning}".replace(" ", "") in text


def test_the_detectors_options_are_used_and_recorded(bundle: Bundle, photos: Path, tmp_path: Path) -> None:
    arguments = [str(bundle.path), "--images", str(photos), "--output-dir", str(tmp_path), *QUICK]
    options = ["--max-level", "P4", "--loop", "host", "--requests", "2", "--deadline-ms", "60000"]
    memory = ["--memory-images", "21", "--reference", "always-probe", "--no-plots"]
    assert main([*arguments, *options, *memory]) == 0
    found = json.loads((tmp_path / "result.json").read_text())
    asked = {"max_level": "P4", "loop": "host", "requests": 2, "deadline_ms": 60000, "memory_images": 21}
    assert {name: found["options"][name] for name in asked} == asked
    assert found["input"]["exit_levels"] == {"P5": 1, "P4": 3}
    for group in found["strata"]:
        for runner in group["subjects"].values():
            assert "P3" not in runner["exits"]
    assert found["memory"]["subjects"]["onnxruntime"]["growth_mib"] is not None
    text = markdown(found)
    assert (
        "the detector was loaded with --max-level P4, --deadline-ms 60000, --loop host, --requests 2" in text
    )
    assert "| growth MiB |" in text


def test_what_else_finds_the_same(result: dict[str, Any]) -> None:
    assert result["agreement"] == {
        "with": "onnxruntime fp32",
        "least_in_float32": 0.98,
        "subjects": {"onnxruntime": {"pictures": 4, "same_stops": 4, "detections": 1.0}},
    }
    assert "agrees: onnxruntime finds 100.0% of what onnxruntime fp32 finds" in markdown(result)
    rows = latency_rows(typed(result))
    column = rows[0].index("agrees")
    assert {row[2]: row[column] for row in rows[1:4]} == {
        "onnxruntime": "100.0",
        "unsplit": "-",
        "always-probe": "-",
    }
    other = copy.deepcopy(result)
    other["agreement"]["subjects"]["onnxruntime"] |= {"detections": 0.979, "same_stops": 3}
    note = "DIFFERENT: onnxruntime finds 97.9% of what onnxruntime fp32 finds"
    assert note in on_screen(other)
    assert "; 3 of 4 pictures stop at the same level" in on_screen(other)
    other["bundles"]["onnxruntime"]["computed_in"] = "bf16"
    assert note not in on_screen(other)
    del other["agreement"]  # as in results of earlier releases
    assert "agrees" not in on_screen(other)


def test_tables(result: dict[str, Any]) -> None:
    screen, page = on_screen(result), markdown(result)
    for text in (screen, page):
        assert "UNTRAINED weights" in text
        assert "exit levels: P5 1, P4 1, P3 2" in text
        assert "p99.9" in text
        assert all(phase in text for phase in PHASES)
        assert "'p3-worst.png': it stops at P3" in text
    stable = all(group["stable"] for group in result["strata"])
    assert ("NOT STABLE" in screen) is not stable
    tables = [block.splitlines() for block in page.split("\n\n") if block.startswith("|")]
    assert len(tables) == 2
    assert all(len({line.count("|") for line in table}) == 1 for table in tables)
    other = copy.deepcopy(result)
    other["strata"][0]["subjects"]["unsplit"]["stable"] = other["strata"][0]["stable"] = False
    assert "NOT STABLE: P5, batch 1: " in on_screen(other)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_unsplit_finds_what_the_loop_finds(backend: str, bundle: Bundle, tmp_path: Path) -> None:
    missing = BACKENDS[backend].problem()
    if missing is not None:
        pytest.skip(str(missing))
    network = open_network(backend, unsplit_bundle(bundle, tmp_path), threads=1)
    images = [picture(5, 2), picture(0), picture(3)]
    given = {
        "pixels": network.upload(np.stack(images)),
        "image_size": network.upload(np.full((3, 2), 64)),
    }
    outputs = network.stage(UNSPLIT)(given)
    scores, labels, boxes = (network.download(outputs[n]) for n in ("det_scores", "det_labels", "det_boxes"))
    with Detector.load(bundle, threads=1) as detector:
        for i, expected in enumerate(detector(images, channel_order="rgb")):
            found = detections_of(scores[i], labels[i], boxes[i], original_shape=(64, 64), nms_iou=None)
            np.testing.assert_allclose(found.xyxy, expected.xyxy, atol=1e-4)
            np.testing.assert_allclose(found.confidence, expected.confidence, atol=1e-6)
            np.testing.assert_array_equal(found.class_id, expected.class_id)


def test_backbone_and_neck_alone(bundle: Bundle, tmp_path: Path) -> None:
    network = open_network(None, pyramid_bundle(bundle, tmp_path), threads=1)
    outputs = network.stage(PYRAMID)({"image": network.upload(np.zeros((1, 3, 64, 96), np.float32))})
    assert list(outputs) == ["p2", "p3", "p4", "p5"]
    assert network.download(outputs["p3"]).shape == (1, 3, 8, 12)


def test_levels_where_no_picture_stops(
    bundle: Bundle, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cv2.imwrite(str(tmp_path / "only.png"), picture(4)[..., ::-1])
    (tmp_path / "torn.png").write_bytes(b"")
    loud = [option for option in QUICK if option != "--quiet"]
    assert main([str(bundle.path), "--images", str(tmp_path), *loud]) == 0
    text = capsys.readouterr().out
    assert "P5 (manual stop)" in text
    assert "no picture stops by itself at P5: these rows are of a manual stop" in text
    assert "no picture reaches P3: that is not measured" in text
    assert "pictures that could not be read: 1, beginning with: " in text


def test_generated_scenes(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(bundle.path), "--limit", "2", "--mode", "fast", *QUICK[:-1]]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "2 pictures (generated scenes)" in text
    assert "fast mode" in text


def test_pictures_of_one_shape(bundle: Bundle, photos: Path, tmp_path: Path) -> None:
    for given, origin in (
        (["--limit", "2"], "generated scenes of 64x96"),
        (["--images", str(photos)], f"folder {photos.name} of 64x96"),
    ):
        arguments = [
            str(bundle.path),
            *given,
            "--shape",
            "64x96",
            "--output-dir",
            str(tmp_path),
            *QUICK,
            "--no-plots",
        ]
        assert main(arguments) == 0
        found = json.loads((tmp_path / "result.json").read_text())
        assert found["input"]["origin"] == origin
        assert {shape for group in found["strata"] for shape in group["network_shapes"]} == {"64x96"}
        assert "fp32, 64x96" in markdown(found).splitlines()[0]


def test_bundles_of_two_precisions_side_by_side(bundle: Bundle, tmp_path: Path) -> None:
    """The second only says that it is quantised, which is what the result goes by."""
    other_bundle = shutil.copytree(bundle.path, tmp_path / "int8")
    manifest = other_bundle / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"fp32"', '"int8"'))
    write_coco(tmp_path / "data", **two_scenes(bundle))
    arguments = [str(bundle.path), str(other_bundle), "--data", str(tmp_path / "data"), *QUICK[:-1]]
    assert main([*arguments, "--output-dir", str(tmp_path / "out"), "--no-plots"]) == 0
    found = json.loads((tmp_path / "out" / "result.json").read_text())
    names = ["onnxruntime fp32", "onnxruntime int8"]
    assert list(found["bundles"]) == names
    assert list(found["accuracy"]) == names
    assert [found["bundles"][name]["computed_in"] for name in names] == ["fp32", "int8"]
    for group in found["strata"]:
        assert set(names) <= set(group["subjects"])
        one, other = (group["subjects"][name] for name in names)
        assert one["calls"] == other["calls"]
        assert other["after_the_neck"]["median"] > -1
    text = markdown(found)
    assert "- onnxruntime int8: times as fast as onnxruntime fp32: P5 " in text
    assert "fp32, int8" in text.splitlines()[0]


def test_compared_detectors_are_said_to_be_random(
    bundle: Bundle, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow:
        name = "adamixer-6"

        def __call__(self, images: Any, max_level: Any) -> Run:
            return Run(total_ms=1e6, phases_ms={"backbone": 4e5, "decoder": 6e5})

    monkeypatch.setattr(run, "open_reference", lambda *_, **__: Slow())
    arguments = [str(bundle.path), "--images", str(photos), "--output-dir", str(tmp_path)]
    arguments += ["--reference", "adamixer-6", "--no-plots"]
    assert main([*arguments, *QUICK]) == 0
    found = json.loads((tmp_path / "result.json").read_text())
    assert "adamixer-6 carries random weights: it is for speed and has no accuracy" in found["notes"]
    assert found["headline"]["six_layers"]["adamixer-6"]["P5"]["median"] > 1000
    assert "adamixer-6, random weights: times as long as onnxruntime: P5 " in markdown(found)


def test_a_reference_that_does_not_run_says_the_cause(
    bundle: Bundle,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """PyTorch's compiler says it in its second line, after the call with all of its arguments."""

    class Broken:
        name = "adamixer-6"

        def __call__(self, images: Any, max_level: Any) -> Run:
            raise RuntimeError(
                f"making fake tensors\n\n  In call({'FakeTensor, ' * 99}): cpu is not cuda!\n  Hint"
            )

    monkeypatch.setattr(run, "open_reference", lambda *_, **__: Broken())
    arguments = [str(bundle.path), "--images", str(photos), "--output-dir", str(tmp_path / "out")]
    assert main([*arguments, "--reference", "adamixer-6", *QUICK]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "'adamixer-6' does not run on this machine: making fake tensors: In call(FakeTensor" in line
    assert line.endswith("cpu is not cuda!")
    assert len(line) < 500


def test_precisions_of_one_bundle(bundle: Bundle, photos: Path, tmp_path: Path) -> None:
    arguments = [str(bundle.path), "--images", str(photos), "--output-dir", str(tmp_path), *QUICK]
    arguments += ["--no-plots", "--precision", "fp32", "--backend", "onnxruntime,onnxruntime"]
    assert main(arguments) == 0
    found = json.loads((tmp_path / "result.json").read_text())
    assert list(found["bundles"]) == ["onnxruntime"]
    assert found["options"]["precisions"] == ["fp32"]


def two_scenes(bundle: Bundle) -> dict[str, Any]:
    """A data set of the bundle's classes."""
    return {
        "annotations": [{"image_id": 1, "bbox": [1, 1, 20, 20], "category_id": 10}],
        "split": "val2017",
        "pictures": [picture(5, 2), picture(0)],
        "categories": [{"id": 10 * i, "name": c.name} for i, c in enumerate(bundle.manifest.categories, 1)],
    }


def test_accuracy_of_what_is_timed(bundle: Bundle, tmp_path: Path) -> None:
    write_coco(tmp_path, **two_scenes(bundle))
    arguments = [str(bundle.path), "--data", str(tmp_path), "--output-dir", str(tmp_path / "out"), *QUICK]
    assert main(arguments) == 0
    found = json.loads((tmp_path / "out" / "result.json").read_text())
    assert found["accuracy"]["onnxruntime"]["images"] == 2
    assert 0 <= found["accuracy"]["onnxruntime"]["ap"] <= 1
    assert found["input"]["pictures"] == 2
    assert "| AP |" in markdown(found)
    assert (tmp_path / "out" / "speed_accuracy.png").is_file()


def test_accuracy_without_its_library(
    bundle: Bundle, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    arguments = ["--images", str(photos), "--data", str(tmp_path), "--limit", "1"]
    assert main([str(bundle.path), *arguments, *QUICK[:-1]]) == 0
    assert "accuracy was not measured: it needs faster_coco_eval" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--percentile 50,abc", "--percentile is abc; it must be from 0 to 100"),
        ("--percentile 101", "--percentile is 101"),
        ("--percentile ,", "--percentile is ; it must be"),
        ("--batch 1,many", "--batch is many; it must be"),
        ("--batch 0", "--batch is 0; it must be"),
        ("--duration 0", "--duration is 0; it must be"),
        ("--duration nan", "--duration is nan; it must be"),
        ("--warmup -1", "--warmup is -1"),
        ("--threads 0", "--threads is 0"),
        ("--limit 0", "--limit is 0"),
        ("--backend tensorflow", "unknown backend 'tensorflow'; the backends are onnxruntime"),
        ("--reference yolo", f"unknown reference 'yolo'; the references are {', '.join(REFERENCES)}"),
        ("--reference torch", "the reference 'torch' needs the weights the bundle was exported from"),
        ("--reference adamixer-6", "how wide a detector compared with 'tiny' is to be is not known"),
        ("--reference torch-sparse-rcnn-6", "the reference 'torch-sparse-rcnn-6' needs the weights"),
        ("--baseline torch", "--baseline is 'torch', which is not measured; choose one of onnxruntime"),
        ("--precision int8", "--precision is 'int8', but what was given computes in fp32"),
        ("--shape 800", "--shape is '800'; expected height x width in pixels, such as 800x1088"),
        ("--shape 0x64", "--shape is '0x64'"),
        ("--shape 640x480", "pictures of --shape 640x480 would be resized to"),
        ("--images absent", "there is no folder 'absent' with pictures"),
        ("--data absent", "absent"),
        ("--mode slow", "invalid choice: 'slow'"),
        ("--requests 0", "--requests is 0"),
        ("--deadline-ms 0", "--deadline-ms is 0"),
        ("--loop device", "loop 'device' needs a backend that runs on a GPU"),
        ("--loop device --deadline-ms 5", "loop 'device' cannot keep a deadline"),
        ("--memory-images 5", "--memory-images is 5; give more than the first 20"),
    ],
)
def test_wrong_input(
    bundle: Bundle, capsys: pytest.CaptureFixture[str], arguments: str, sentence: str
) -> None:
    assert main([str(bundle.path), *arguments.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("asag-bench: error: ")
    assert sentence in err
    assert err.count("\n") == 1


def test_wrong_bundles_and_missing_backends(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "absent")]) == 2
    assert "there is no bundle" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main([str(bundle.path), "--images", str(tmp_path / "empty")]) == 2
    assert "holds no images" in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert main([str(bundle.path), "--backend", "openvino"]) == 2
    assert "pip install 'asag-deploy[openvino]'" in capsys.readouterr().err


def test_plots_without_their_library(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main([str(bundle.path), "--output-dir", str(tmp_path / "out")]) == 2
    assert "drawing plots needs the package matplotlib" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_backbone_that_cannot_be_cut_is_only_a_note(
    bundle: Bundle, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:  # fmt: skip
    from asag_bench.runners import graphs

    broken = replace_graph(bundle, "backbone", b"no graph", tmp_path / "broken")
    monkeypatch.setattr(graphs, "pyramid_bundle", lambda *_: broken)
    assert main([str(bundle.path), "--images", str(photos), *QUICK[:-1]]) == 0
    assert "backbone and neck alone were not timed: the backend 'onnxruntime'" in capsys.readouterr().out
