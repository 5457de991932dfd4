"""The paper's tables: their numbers, what is measured for a cell, and what a row says it lacks."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from asag_bench.paper import measuring
from asag_bench.paper.cli import main
from asag_bench.paper.numbers import TABLES
from asag_bench.paper.roles import ROLES, base_recipe, how_to_make
from asag_bench.paper.tables import chosen_tables
from asag_bench.runners.compared.published import COMPARED
from asag_deploy.bundle.manifest import Preprocessing
from asag_deploy.errors import ConfigError
from asag_evaluation.data.coco import CocoDataset
from asag_evaluation.data.scenes import SCENE_CATEGORIES, write_scenes
from asag_evaluation.evaluate import evaluate
from asag_training.checkpoints import save_checkpoint
from asag_training.evaluation.checkpoint_predictor import checkpoint_predictor
from asag_training.evaluation.sweep import SWEPT, evaluate_ways
from asag_training.recipes import ABLATIONS, recipe
from support.coco_files import box, write_coco
from support.small_network import small_checkpoint


def save_small(path: Path, variant: str = "asag-a-r50-100", classes: int = len(SCENE_CATEGORIES)) -> Path:
    """A network for small scenes, with random weights."""
    made = small_checkpoint(variant, num_classes=classes, patch_size=6, heads=1)
    changes: dict[str, Any] = {"preprocessing": Preprocessing(shorter_side=96, longer_side=160)}
    if classes == len(SCENE_CATEGORIES):
        changes["categories"] = SCENE_CATEGORIES
    save_checkpoint(path, dataclasses.replace(made, **changes))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, count=3, seed=0, size=96, split="val2017")
    return folder


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small(tmp_path_factory.mktemp("network") / "a.safetensors")


def test_every_table_is_whole() -> None:
    rows = {number: len(table.rows) for number, table in TABLES.items()}
    assert list(rows) == ["1", "2", "3", "4", "5a", "5b", "5c", "5d", "5e", "6", "7", "8", "A-1"]
    assert list(rows.values()) == [4, 8, 12, 15, 5, 8, 4, 4, 4, 14, 2, 3, 2]
    for table in TABLES.values():
        for row in table.rows:
            assert len(row.labels) == len(table.heads)
            assert set(row.paper) <= set(table.columns)
            assert row.role is None or table.number in ROLES[row.role].tables, (table.number, row.role)
            assert row.role is not None or row.missing, "a row that nothing fills says why"
            assert set(row.changes) <= set(SWEPT)


def test_the_default_of_each_study_is_the_network_of_table_2() -> None:
    default = TABLES["2"].rows[2].paper
    for number in ("5a", "5b", "5c", "5d", "8", "A-1"):
        of_default = [row.paper for row in TABLES[number].rows if row.paper.get("AP") == default["AP"]]
        assert of_default, number
        shared = of_default[0].keys() & default.keys()
        assert any(all(paper[name] == default[name] for name in shared) for paper in of_default), number


def test_the_other_detectors_numbers_are_those_that_benchmarks_know() -> None:
    for number in ("3", "4"):
        for row in TABLES[number].rows:
            if row.compared is not None:
                name, queries = row.compared
                assert row.paper["F"] == COMPARED[name].gmacs[queries]
                assert row.paper.get("FPS") == COMPARED[name].fps.get(queries)
                assert row.paper["#An"] == queries


def test_every_ablation_of_a_role_is_a_recipe() -> None:
    for role in ROLES.values():
        for base in ("scenes", "asag-a-r50-100-1x"):
            named = re.search(r"--recipe (\S+)`", how_to_make(role, base))
            assert (named is None) == (role.kind == "peer")
            if named is not None:
                made = recipe(named[1])
                assert role.decoder in (None, made.network.decoder), (role.name, base)
    in_roles = {role.recipe.partition("@")[2] for role in ROLES.values()} - {""}
    assert in_roles < set(ABLATIONS)
    assert base_recipe("asag-a-scenes@two-layers") == "scenes"
    assert base_recipe("somebody's") == "asag-a-r50-100-1x"


def test_tables_are_chosen_by_number() -> None:
    assert [table.number for table in chosen_tables(["5", "A-1"])] == ["5a", "5b", "5c", "5d", "5e", "A-1"]
    assert [table.number for table in chosen_tables([])] == list(TABLES)
    with pytest.raises(ConfigError, match="the paper has no table '9' of results; those are 1, 2, "):
        chosen_tables(["9"])


def test_cells_are_what_evaluation_measures(
    data: Path,
    network: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "out"
    command = ["tables", "--data", str(data), "--network", f"asag-a-100={network}", "--quiet"]
    command += ["--output-dir", str(output), "--only", "2,5d,5e,8", "--time-images", "1"]
    assert main(command) == 0
    first = capsys.readouterr().out
    written = json.loads((output / "paper.json").read_text())
    tables = {table["number"]: table for table in written["tables"]}
    predictor = checkpoint_predictor(network)
    dataset = CocoDataset.open(data, "val2017", categories=SCENE_CATEGORIES)
    expected = evaluate(predictor.detector, dataset, proposals=predictor.proposals)
    own = tables["2"]["rows"][2]["here"]
    assert own["#An"] == pytest.approx(expected.anchors.anchors, abs=0.01)
    assert own["AP"] == pytest.approx(100 * (expected.coco.ap or 0), abs=0.01)
    assert own["FPS"] > 0
    assert tables["2"]["rows"][4]["here"]["#An"] != own["#An"]  # the manual stop
    assert tables["5d"]["rows"][1]["here"]["N_P4"] == pytest.approx(expected.anchors.patches_p4, abs=0.01)
    recall = expected.proposal_recall
    assert recall is not None
    assert tables["5e"]["rows"][3]["here"]["AR, 100 queries"] == pytest.approx(
        100 * (recall[1000] or 0), abs=0.01
    )
    assert "asag-a-100 stands in for asag-a-100-3x" in tables["5e"]["rows"][3]["state"]
    assert "random weights beside asag-a-100" in tables["2"]["rows"][0]["state"]
    assert "`asag-train --recipe asag-a-r50-100-1x@two-layers`" in tables["8"]["rows"][1]["state"]
    page = (output / "paper.md").read_text()
    assert "## Table 5d" in page
    assert "| AdaMixer | - | 6 | - (100) | - (42.7) |" in page
    assert "RTX 3090" in page
    assert "random weights" in page

    # Everything is known by now.
    monkeypatch.setattr(measuring, "evaluate_ways", None)
    monkeypatch.setattr(measuring, "network_predictor", None)
    monkeypatch.setattr(measuring, "build_compared", None)
    assert main(command) == 0
    assert capsys.readouterr().out == first


def test_what_was_measured_before_an_interruption_is_kept(
    data: Path,
    network: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["tables", "--data", str(data), "--network", f"asag-a-100={network}", "--time-images", "0"]
    command += ["--output-dir", str(tmp_path), "--only", "5a,5b"]
    whole, asked = evaluate_ways, list[Any]()

    def interrupted(checkpoint: Any, ways: Any, dataset: Any, **more: Any) -> Any:
        asked.append(list(ways))
        found = whole(checkpoint, ways, dataset, **more)
        if len(asked) == 1:
            yield next(found)
            raise KeyboardInterrupt
        yield from found

    monkeypatch.setattr(measuring, "evaluate_ways", interrupted)
    assert main(command) == 130
    said = "asag-paper: interrupted; with --output-dir, the same command goes on\n"
    assert capsys.readouterr().err.endswith(said)
    assert main(command) == 0
    assert len(asked[1]) == len(asked[0]) - 1


def test_persons_are_measured_as_table_6_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = [{"id": 1, "name": "class_0"}]
    write_coco(tmp_path, [box(1, [1, 1, 30, 40], 1)], categories=one, split="val2017")
    network = save_small(tmp_path / "p.safetensors", classes=1)
    content = ["tables", "--data", str(tmp_path), "--network", f"asag-s-crowdhuman={network}", "--only", "6"]
    assert main([*content, "--time-images", "0", "--output-dir", str(tmp_path / "out")]) == 0
    (table,) = json.loads((tmp_path / "out" / "paper.json").read_text())["tables"]
    row = table["rows"][2]
    assert all(row["here"][column] is not None for column in ("AP", "mMR", "R"))
    assert "AP50" not in row["state"]


def test_settings_of_an_ablation_show_something_without_its_training(
    data: Path, network: Path, tmp_path: Path
) -> None:
    command = ["tables", "--data", str(data), "--network", f"asag-a-100={network}", "--only", "5a"]
    assert main([*command, "--output-dir", str(tmp_path)]) == 0
    (table,) = json.loads((tmp_path / "paper.json").read_text())["tables"]
    whole, fixed, unweighted, _, keeping = table["rows"]
    assert whole["here"]["#An"] < fixed["here"]["#An"] <= 100  # which is the most, of every image
    assert keeping["here"]["#An"] > whole["here"]["#An"]
    assert unweighted["here"]["#An"] is None
    assert [row["paper_gain"] for row in table["rows"]] == [None, -2.0, -2.7, -1.0, 0.0]
    for row, name in ((fixed, "fixed-queries"), (keeping, "keep-anchors")):
        assert "asag-a-100 with these settings, and not trained with them" in row["state"]
        assert f"asag-train --recipe asag-a-r50-100-1x@{name}" in row["state"]


def test_any_network_is_put_through_the_sweeps(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = save_small(tmp_path / "s.safetensors", "asag-s-r50-100")
    command = ["tables", "--data", str(data), "--network", f"asag-s-100={network}", "--only", "2,5d"]
    assert main([*command, "--time-images", "0", "--output-dir", str(tmp_path / "out")]) == 0
    two, sweep = json.loads((tmp_path / "out" / "paper.json").read_text())["tables"]
    assert all(row["here"]["#An"] is not None for row in sweep["rows"])
    assert "asag-s-100 stands in for asag-a-100" in sweep["rows"][0]["state"]
    assert all(row["here"]["#An"] is None for row in two["rows"])  # which are of ASAG-A


@pytest.mark.slow
def test_without_networks_the_tables_say_what_to_train(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tables", "--data", str(data), "--only", "3"]) == 0
    out = capsys.readouterr().out
    assert "give it as --network asag-s-100=FILE" in out
    assert "127.9* (130)" in out
    assert "139.8* (140)" in out


def test_roles_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["roles"]) == 0
    out = capsys.readouterr().out
    assert all(f"{name} (tables " in out for name in ROLES)


def test_what_makes_no_sense_is_refused_in_a_sentence(
    data: Path, network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_coco(tmp_path / "other", [box(1, [1, 1, 30, 40])], split="val2017")
    on, good = ["--data", str(data)], f"asag-a-100={network}"
    for arguments, sentence in (
        (
            [*on, "--network", f"asag-b={network}"],
            "unknown role 'asag-b' of a network; the roles are asag-a-100",
        ),
        ([*on, "--network", f"adamixer-6={network}"], "unknown role 'adamixer-6' of a network"),
        ([*on, "--network", str(network)], "expected ROLE=PATH, with one of `asag-paper roles`"),
        ([*on, "--network", good, "--network", good], "names the role asag-a-100 twice"),
        ([*on, "--network", f"asag-s-100={network}"], "takes a network whose decoder is sparse-rcnn"),
        ([*on, "--network", f"8.two-layers={network}"], "takes a network whose decoder_layers is 2; that of"),
        ([*on, "--network", f"asag-a-100={tmp_path / 'nowhere'}"], "nowhere"),
        ([*on, "--peer", f"adamixer-6={tmp_path}"], "holds no recipe.json of a peer"),
        (["--network", good], "give --data DIR"),
        ([*on, "--demo"], "leave --data out, or --demo"),
        (["--data", str(tmp_path / "other"), "--network", good], "class"),
        ([*on, "--device", "tpu"], "device 'tpu'"),
        ([*on, "--only", "5f"], "the paper has no table '5f'"),
    ):
        assert main(["tables", *arguments]) == 2, arguments
        err = capsys.readouterr().err
        assert sentence in err, (arguments, err)
        assert len(err.splitlines()) == 1
    (tmp_path / "paper.md").write_text("mine")
    assert main(["tables", *on, "--output-dir", str(tmp_path)]) == 2
    assert "paper.md' is there, but no 'paper.json'" in capsys.readouterr().err


@pytest.mark.slow
def test_the_demo_prints_every_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["tables", "--demo", "--limit", "6", "--time-images", "2", "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert [line.split(":")[0].split()[1] for line in out.splitlines() if line.startswith("Table ")] == list(
        TABLES
    )
    assert "`asag-train --recipe scenes@no-query-weighting`" in out
    assert "`asag-train --recipe scenes@no-denoising` and give it as --network asag-a-100=FILE" in out
