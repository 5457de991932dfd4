"""Peers learn, can be stopped and taken up again, and are deployed as they were trained."""

from __future__ import annotations

import csv
import dataclasses
import json
import shlex
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from asag_bench.cli import main
from asag_bench.light_peers.evaluation import DETECTIONS, evaluate_peer
from asag_bench.light_peers.graph import PeerStage
from asag_bench.light_peers.peer import RECIPE, WEIGHTS, TrainedPeer, build, load_peer, read_said, unfinished
from asag_bench.light_peers.recipe import PeerName, peer_recipe, stretched
from asag_bench.light_peers.runner import PeerDetector
from asag_bench.light_peers.training import PeerTraining, check_queries
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.detector_options import DetectorOptions
from asag_deploy.errors import CheckpointError, ConfigError, TrainingError
from asag_evaluation.data.coco import CocoDataset
from asag_evaluation.evaluate import coco_results
from asag_evaluation.metrics.coco import CocoMetrics, coco_metrics
from asag_training.losses.targets import Targets
from asag_training.run.log import STEPS
from asag_training.run.state import STATE, Position, write_state
from asag_training.settings import Schedule
from support.small_light_peers import small_said, training
from support.tiny_bundle import make_bundle
from support.training_runs import write_pictures

SLOW = pytest.mark.slow
PEERS = [pytest.param("yolox-lite"), pytest.param("d-fine-lite", marks=SLOW)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_pictures(root, count=48)
    write_pictures(root, "val2017", count=12, seed=100)
    return root


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four updates an epoch."""
    return write_pictures(tmp_path_factory.mktemp("few"), count=16)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(make_bundle(tmp_path_factory.mktemp("bundle") / "bundle").path)


def _steps(folder: Path) -> list[dict[str, str]]:
    with (folder / "steps.csv").open(newline="") as file:
        return [
            {name: value for name, value in row.items() if name != "ms_cpu"} for row in csv.DictReader(file)
        ]


@SLOW
def test_it_learns_and_is_deployed_as_it_was_trained(data: Path, bundle: Bundle, tmp_path: Path) -> None:
    """From random weights, measured as it is deployed: exported, in ONNX Runtime, with its own NMS."""
    training(small_said("yolox-lite", data, epochs=10), data, tmp_path / "run")(quiet=True)
    detector = PeerDetector(load_peer(tmp_path / "run"), bundle, DetectorOptions(threads=1))
    assert _ap50(detector, data) > 0.25


@SLOW
def test_the_detr_like_one_learns_too(few: Path, bundle: Bundle, tmp_path: Path) -> None:
    training(small_said("d-fine-lite", few, epochs=5), few, tmp_path / "run")(quiet=True)
    losses = [float(row["loss"]) for row in _steps(tmp_path / "run")]
    assert np.mean(losses[-4:]) < 0.7 * np.mean(losses[:4])
    loaded = load_peer(tmp_path / "run")
    sample = CocoDataset.open(few)[0]
    found = PeerDetector(loaded, bundle, DetectorOptions(threads=1))(sample.image)
    stage = PeerStage(loaded, (96, 96)).eval()
    with torch.no_grad():
        scores, _, boxes = stage(torch.from_numpy(sample.image[None]), torch.tensor([[96, 96]]))
    order = scores[0].argsort(descending=True)
    assert np.allclose(found.confidence, scores[0, order].numpy(), atol=1e-3)
    assert np.allclose(found.xyxy[:10], 96 * boxes[0, order[:10]].clamp(0, 1).numpy(), atol=0.5)


@SLOW
@pytest.mark.parametrize("weighs", [False, True])
def test_six_layers_learn_with_query_weighting_and_without(
    weighs: bool, data: Path, bundle: Bundle, tmp_path: Path
) -> None:
    said = small_said("adamixer-6", data, epochs=12)
    said = dataclasses.replace(said, recipe=said.recipe.with_changes(query_weighting=weighs))
    training(said, data, tmp_path / "run")(quiet=True)
    peer = load_peer(tmp_path / "run")
    deployed = PeerDetector(peer, bundle, DetectorOptions(threads=1))
    found = evaluate_peer(tmp_path / "run", data, quiet=True).ap50 or 0.0
    # Query Weighting's loss cannot tell: boxes weigh the more the better they get, so that it hardly falls.
    assert found > 0.2
    assert found == pytest.approx(_ap50(deployed, data), abs=0.02)


def test_query_weighting_is_all_that_differs(few: Path) -> None:
    """Every layer is trained; the negatives count the same, the matched ones by score and IoU."""
    said = small_said("adamixer-6", few)
    both = [build(said.recipe.with_changes(query_weighting=weighs), 0) for weighs in (False, True)]
    for one, other in zip(both[0].parameters(), both[1].parameters(), strict=True):
        assert torch.equal(one, other)
    image, size = torch.randn(2, 3, 96, 96), torch.tensor([[96, 96], [80, 96]])
    targets = [
        Targets(torch.tensor([[0.5, 0.5, 0.4, 0.4]]), torch.tensor([1])),
        Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)),
    ]
    plain, weighed = (network.losses(image, targets, size) for network in both)  # type: ignore[operator]
    names = {f"{term}_{layer}" for term in ("loss_ce", "loss_bbox", "loss_giou") for layer in range(6)}
    assert plain.keys() == weighed.keys() == names
    assert all(torch.isfinite(loss) for loss in plain.values())
    for layer in range(6):
        # Boxes that fit badly count for a fifth of what they do without.
        assert 0.15 < weighed[f"loss_bbox_{layer}"] / plain[f"loss_bbox_{layer}"] < 1
    with pytest.raises(ConfigError, match="query_weighting True"):
        small_said("yolox-lite", few).recipe.with_changes(query_weighting=True)


def _ap50(detector: PeerDetector, data: Path) -> float:
    dataset = CocoDataset.open(data, "val2017")
    results = [
        result
        for sample in (dataset[i] for i in range(len(dataset)))
        for result in coco_results(sample.image_id, detector(sample.image), dataset.categories)
    ]
    return coco_metrics(dataset.ground_truth(), results).ap50 or 0.0


@pytest.mark.parametrize("peer", PEERS)
def test_a_run_that_is_stopped_goes_on_as_if_it_had_not_been(
    peer: PeerName, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = small_said(peer, few)
    whole = training(said, few, tmp_path / "whole")
    whole(quiet=True)
    stopped = training(said, few, tmp_path / "stopped")
    update, updates = stopped._update, 0

    def until_interrupted(*arguments: object) -> object:
        nonlocal updates
        if updates == 5:
            raise KeyboardInterrupt
        updates += 1
        return update(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(stopped, "_update", until_interrupted)
    with pytest.raises(KeyboardInterrupt):
        stopped(quiet=True)
    resumed = training(said, few, tmp_path / "stopped")
    assert resumed.position.step == 5
    resumed(quiet=True)
    assert _steps(tmp_path / "stopped") == _steps(tmp_path / "whole")
    assert (tmp_path / "stopped" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    assert len(_steps(tmp_path / "whole")) == 8
    with pytest.raises(TrainingError, match="its lr is"):
        training(small_said(peer, few, lr=0.5), few, tmp_path / "stopped")


@pytest.mark.parametrize("peer", PEERS)
def test_what_is_deployed_computes_what_was_trained(peer: PeerName, few: Path, tmp_path: Path) -> None:
    """Branches merged and statistics folded, on padded pictures too."""
    run = training(small_said(peer, few, epochs=1), few, tmp_path / "run")
    run(quiet=True)
    loaded = load_peer(tmp_path / "run")
    pixels = torch.randint(0, 256, (1, 96, 128, 3), dtype=torch.uint8, generator=torch.Generator())
    size = torch.tensor([[80, 128]])
    stage = PeerStage(loaded, (96, 128)).eval()
    with torch.no_grad():
        scores, labels, boxes = stage(pixels, size)
        beyond = pixels.clone()
        beyond[:, 80:] = 7
        again = stage(beyond, size)
        (image,) = stage.normalize(pixels, size)
        network = run.network.eval()
        if peer == "yolox-lite":
            cells = network(image)
            best, expected = cells.logits.max(dim=-1)
            assert torch.equal(labels, expected)
            assert torch.allclose(scores, best.sigmoid() * cells.objectness.sigmoid(), atol=1e-4)
            sides = torch.tensor([128.0, 96.0])
            assert torch.allclose(
                (boxes[..., :2] + boxes[..., 2:]) / 2 * sides, cells.boxes[..., :2], atol=1e-2
            )
        else:
            logits, _ = network(image)
            expected_scores = logits.sigmoid().flatten(1).topk(scores.shape[1]).values
            assert torch.allclose(scores.sort(descending=True).values, expected_scores, atol=1e-3)
    assert all(torch.equal(one, other) for one, other in zip((scores, labels, boxes), again, strict=True))


def test_the_same_pictures_in_the_same_order_as_asag() -> None:
    """Data, augmentation, size, batches and the form of the schedule are the recipe's."""
    from asag_training.recipes import recipe

    for like in ("scenes-lite", "bccd-lite"):
        of, ours = recipe(like), peer_recipe("yolox-lite", like)
        assert ours.augmentation == of.augmentation
        assert ours.preprocessing == of.preprocessing
        assert ours.batch_size == of.optimisation.batch_size
        assert ours.schedule == of.schedule
        assert ours.network == of.network
    assert stretched(Schedule(epochs=9, drops=(7, 8)), 18).drops == (14, 16)
    assert stretched(Schedule(epochs=9, drops=(7, 8)), 2).drops == ()
    with pytest.raises(ConfigError, match="ImageNet"):
        peer_recipe("yolox-lite", "asag-a-lite-s-3x")
    with pytest.raises(ConfigError, match="unknown peer 'yolo'"):
        peer_recipe("yolo", "scenes-lite")


def test_damaged_peers_are_refused(data: Path, tmp_path: Path) -> None:
    run = training(small_said("yolox-lite", data), data, tmp_path / "run")
    with pytest.raises(CheckpointError, match=f"no {WEIGHTS}"):
        load_peer(tmp_path / "run")
    run.save()
    load_peer(tmp_path / "run")
    content = (tmp_path / "run" / WEIGHTS).read_bytes()
    (tmp_path / "run" / WEIGHTS).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        load_peer(tmp_path / "run")
    (tmp_path / "run" / RECIPE).write_text(json.dumps({"recipe": 3}))
    with pytest.raises(CheckpointError, match="not a peer's"):
        load_peer(tmp_path / "run")
    with pytest.raises(CheckpointError, match=f"no {RECIPE}"):
        load_peer(tmp_path / "nowhere")


def test_the_command(few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--data", str(few), "--output-dir", str(tmp_path / "run"), "--orientation", "stored"]
    assert main(["train-peer", "yolox", *where]) == 2
    assert (
        "unknown peer 'yolox'; those that can be trained are yolox-lite, d-fine-lite"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "run").exists()
    assert main(["train-peer", "yolox-lite", *where, "--epochs", "1"]) == 0
    run = tmp_path / "run"
    measures = f"asag-bench eval-peer {run} --data {few} --orientation stored"
    said = f"{run}: yolox-lite, seed 0, 4 updates; `{measures}` measures it\n"
    assert capsys.readouterr().out == said
    (run / RECIPE).unlink()
    assert main(["train-peer", "yolox-lite", *where, "--epochs", "1", "--quiet"]) == 0  # done already
    assert read_said(run).recipe.peer == "yolox-lite"  # without which nobody could measure it
    assert capsys.readouterr().out == ""


def test_the_accuracy_of_a_peer_by_command(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = small_said("adamixer-6", data, epochs=1)
    training(said, data, tmp_path / "run").save()
    (tmp_path / "run" / STATE).unlink()  # which would tell that it has not been trained
    figures = tmp_path / "figures.json"
    arguments = ["eval-peer", str(tmp_path / "run"), "--data", str(data), "--limit", "4", "--quiet"]
    assert main([*arguments, "--output", str(figures)]) == 0
    assert "AP50" in capsys.readouterr().out
    assert json.loads(figures.read_text())["coco"]["ap"] is not None
    assert main(["eval-peer", str(tmp_path), "--data", str(data)]) == 2
    assert f"holds no {RECIPE} of a peer" in capsys.readouterr().err
    told = json.loads(figures.read_text())
    assert told["detections"] == DETECTIONS == 300


def test_figures_count_as_many_detections_as_a_front(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures have up to 200 objects, of which COCO's 100 detections could find half."""
    training(small_said("yolox-lite", data, epochs=1), data, tmp_path / "run").save()
    (tmp_path / "run" / STATE).unlink()
    counted: list[int] = []

    def metrics(*given: Any, most: int) -> CocoMetrics:
        counted.append(most)
        return coco_metrics(*given, most=most)

    monkeypatch.setattr("asag_bench.light_peers.evaluation.coco_metrics", metrics)
    assert main(["eval-peer", str(tmp_path / "run"), "--data", str(data), "--limit", "1", "--quiet"]) == 0
    told = capsys.readouterr().out
    assert counted == [300]
    assert "AR 300" in told
    assert told.endswith("of the 300 best detections of each picture, as `asag-bench front` counts\n")


def test_more_queries_than_there_are_cells_are_refused_before_training(
    few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pictures of 96x96 become 320x320: 1600, 400 and 100 cells."""
    where = ["--data", str(few), "--output-dir", str(tmp_path / "run"), "--epochs", "1"]
    assert main(["train-peer", "d-fine-lite", *where, "--queries", "2101"]) == 2
    error = capsys.readouterr().err
    assert "a picture of 320x320 have 2100 cells, too few for the peer's 2101 queries" in error
    assert "--queries 2100 at most" in error
    assert not (tmp_path / "run").exists()
    check_queries(peer_recipe("d-fine-lite", "scenes-lite").with_changes(queries=2100), CocoDataset.open(few))


def test_a_picture_too_small_for_the_queries_is_refused_where_it_is_measured(few: Path) -> None:
    said = small_said("d-fine-lite", few)
    peer = TrainedPeer(said=said, network=build(said.recipe, 0))
    with pytest.raises(ConfigError, match="a picture of 32x64 have 42 cells, too few for the peer's 60"):
        PeerStage(peer, (32, 64))


def test_a_folder_in_which_nothing_was_trained_is_free(few: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    said, other = small_said("yolox-lite", few), small_said("yolox-lite", few, seed=1)
    training(said, few, run)
    (run / STEPS).write_text("step,loss\n")
    training(other, few, run)
    assert json.loads((run / RECIPE).read_text())["seed"] == 1
    (run / STEPS).write_text("step,loss\n1,2.5\n")
    with pytest.raises(ConfigError, match="the recipe of another run"):
        training(said, few, run)
    training(other, few, run)  # which begins anew
    (run / STEPS).unlink()
    (run / WEIGHTS).write_bytes(b"weights")
    with pytest.raises(ConfigError, match="the recipe of another run"):
        training(said, few, run)


@pytest.mark.parametrize(
    ("name", "content"), [(RECIPE, '{"a": 1}'), (RECIPE, "{"), (STEPS, "a,b"), (WEIGHTS, "")]
)
def test_what_no_run_has_written_is_not_replaced(few: Path, tmp_path: Path, name: str, content: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / name).write_text(content)
    with pytest.raises(ConfigError, match=f"holds a '{name}' that no run has written"):
        training(small_said("yolox-lite", few), few, run)
    assert (run / name).read_text() == content


@pytest.mark.parametrize("begun", [False, True])
def test_a_run_of_asag_train_is_called_that(
    few: Path, tmp_path: Path, begun: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    from asag_training.recipes import recipe

    run = tmp_path / "asag"
    run.mkdir()
    (run / RECIPE).write_text(json.dumps({**recipe("scenes-lite").to_dict(), "seed": 0}))
    if begun:
        write_state(run, {"seed": 0}, Position(), {})
    train = ["train-peer", "yolox-lite", "--data", str(few), "--output-dir", str(run)]
    assert main(train) == 2
    assert f"'{run}' holds a run of asag-train: give another folder" in capsys.readouterr().err
    assert main(["eval-peer", str(run), "--data", str(few)]) == 2
    assert f"'{run}' is a run of asag-train, no peer's" in capsys.readouterr().err
    assert "network" in json.loads((run / RECIPE).read_text())


def test_a_run_that_is_not_at_its_end_is_told_of(few: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    under_way = training(small_said("yolox-lite", few, epochs=3), few, run)
    assert unfinished(run, 3) is None  # nothing tells
    under_way.position = Position(epoch=1, update=2, step=6)
    under_way.save()
    with pytest.warns(RuntimeWarning, match=r"is not at its end: it has done 1 of 3 epochs \(6 updates\)"):
        assert unfinished(run, 3) == "1 of 3 epochs"
    assert unfinished(run, 1) is None
    (run / STATE).write_bytes((run / STATE).read_bytes()[:-100])
    assert unfinished(run, 3) is None


def test_evaluating_warns_of_a_run_that_is_not_at_its_end(data: Path, tmp_path: Path) -> None:
    training(small_said("yolox-lite", data, epochs=2), data, tmp_path / "run").save()
    with pytest.warns(RuntimeWarning, match="0 of 2 epochs"):
        main(["eval-peer", str(tmp_path / "run"), "--data", str(data), "--limit", "1", "--quiet"])


def test_interrupted_it_says_how_to_go_on(
    few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(PeerTraining, "__call__", interrupted)
    where = ["--data", str(few), "--output-dir", str(tmp_path / "run")]
    assert main(["train-peer", "yolox-lite", *where]) == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "asag-bench: interrupted; the same command goes on\n"
    monkeypatch.setattr("asag_bench.light_peers.evaluation.evaluate_peer", interrupted)
    (tmp_path / "run" / STATE).unlink(missing_ok=True)
    assert main(["eval-peer", str(tmp_path / "run"), "--data", str(few)]) == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "asag-bench: interrupted\n"


def test_the_command_that_is_shown_can_be_pasted(
    few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PeerTraining, "__call__", lambda *_, **__: None)
    run = tmp_path / "my run"
    assert main(["train-peer", "yolox-lite", "--data", str(few), "--output-dir", str(run)]) == 0
    command = capsys.readouterr().out.split("`")[1]
    assert shlex.split(command) == ["asag-bench", "eval-peer", str(run), "--data", str(few)]
