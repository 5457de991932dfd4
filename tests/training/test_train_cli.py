"""`asag-train` from the command line."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from asag_evaluation.data.coco import CocoDataset
from asag_evaluation.evaluate import evaluate
from asag_training.checkpoints import load_checkpoint, pack
from asag_training.cli import main
from asag_training.evaluation.checkpoint_predictor import checkpoint_predictor
from asag_training.run import progress_pictures
from asag_training.run.run_loop import Rhythm, TrainingRun, summary
from asag_training.run.state import Position
from asag_training.run.trainer import Trainer
from support.coco_files import write_coco
from support.training_runs import TINY, make_loader, make_trainer, options_of, tiny_recipe, write_pictures

SETTINGS = options_of(TINY)
ONE_EPOCH = options_of(["schedule.epochs=1", "patches.target_patch_epochs=0"])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_pictures(root)
    return write_pictures(root, "val2017", count=3, seed=1)


def train(data: Path, output_dir: Path, *options: str) -> int:
    common = ["--data", str(data), "--output-dir", str(output_dir), "--workers", "0", "--device", "cpu"]
    return main([*common, *SETTINGS, *options])


def refused(capsys: pytest.CaptureFixture[str], code: int) -> str:
    """The one sentence on stderr."""
    error = capsys.readouterr().err.split("\r")[-1].strip().splitlines()[-1]
    assert code == 2
    assert error.startswith("asag-train: error: ")
    assert error.endswith(tuple("abcdefghijklmnopqrstuvwxyz)01234567890'"))
    return error.removeprefix("asag-train: error: ")


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_run_and_its_end(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sure = list[object]()

    def noting(picture: object, *, confidence: object, **boxes: object) -> None:
        sure.append(confidence)

    monkeypatch.setattr(progress_pictures, "draw_detections", noting)
    run = tmp_path / "run"
    assert train(data, run, "--pictures", "2") == 0
    assert sure == [None] * 4, "nobody annotates a confidence"
    assert {path.name for path in run.iterdir()} - {"tensorboard"} == {
        "best.safetensors",
        "evaluations.csv",
        "last.safetensors",
        "pictures",
        "recipe.json",
        "state.pt",
        "steps.csv",
    }
    steps, evaluations = rows(run / "steps.csv"), rows(run / "evaluations.csv")
    assert [row["step"] for row in steps] == ["1", "2", "3", "4"]
    assert [row["epoch"] for row in evaluations] == ["1", "2"]
    assert sum(float(evaluations[0][f"exit_{level}"]) for level in ("P5", "P4", "P3")) == 1
    assert {"AP", "AP50", "anchors", "patches_P4", "patches_P3", "anchor_AR100"} < set(evaluations[0])
    assert len(list((run / "pictures").glob("epoch*-image*.jpg"))) == 4
    written = json.loads((run / "recipe.json").read_text())
    assert (written["seed"], written["network"]["hidden_dim"], written["network"]["num_classes"]) == (
        0,
        32,
        2,
    )

    output = capsys.readouterr()
    assert "training:   8 images, 16 objects" in output.out
    assert "starting, on cpu" in output.out
    assert "after epoch 2: AP " in output.err

    predictor = checkpoint_predictor(run / "last.safetensors")
    validation = CocoDataset.open(data, "val2017", categories=predictor.detector.manifest.categories)
    measured = summary(evaluate(predictor.detector, validation))
    assert measured["AP"] == pytest.approx(float(evaluations[1]["AP"]), abs=1e-6)
    assert measured["anchors"] == pytest.approx(float(evaluations[1]["anchors"]), rel=1e-5)


def test_resuming_goes_on(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run is cut off after its first epoch, in the evaluation; the rest is as if it had not been."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train(data, whole, "--pictures", "0") == 0
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("asag_training.run.run_loop.evaluate", _interrupted)
        assert train(data, cut, "--pictures", "0") == 128 + signal.SIGTERM
    assert "with --resume goes on" in capsys.readouterr().err
    assert len(rows(cut / "steps.csv")) == 2
    assert not rows_or_none(cut / "evaluations.csv")

    assert train(data, cut, "--pictures", "0", "--resume") == 0
    assert "resuming, 1 of 2 epochs are done" in capsys.readouterr().out
    for name in ("steps.csv", "evaluations.csv"):
        of_cut, of_whole = rows(cut / name), rows(whole / name)
        assert [_untimed(row) for row in of_cut] == [_untimed(row) for row in of_whole]
    states = [load_checkpoint(folder / "last.safetensors").state for folder in (cut, whole)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])

    assert train(data, cut, "--pictures", "0", "--resume") == 0  # it is at its end
    assert len(rows(cut / "evaluations.csv")) == 2


def _interrupted(*_: object, **__: object) -> None:
    signal.raise_signal(signal.SIGTERM)


def rows_or_none(path: Path) -> list[dict[str, str]]:
    return rows(path) if path.exists() else []


def _untimed(row: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in row.items() if not name.startswith("ms_")}


def test_resuming_what_is_not_there_starts(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(data, run, *ONE_EPOCH, "--resume", "--pictures", "0") == 0
    assert (run / "recipe.json").exists()
    assert len(rows(run / "steps.csv")) == 2


def test_starting_from_a_checkpoint(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    once = (*ONE_EPOCH, "--pictures", "0", "--evaluate-images", "1")
    assert train(data, tmp_path / "a", *once) == 0
    checkpoint = str(tmp_path / "a" / "last.safetensors")
    assert train(data, tmp_path / "b", *once, "--init", checkpoint, "--seed", "1") == 0
    first = [float(rows(tmp_path / run / "steps.csv")[0]["loss"]) for run in ("a", "b")]
    assert first[1] < first[0]
    capsys.readouterr()

    other = ("--set", "network.decoder=sparse-rcnn", "--init", checkpoint)
    message = refused(capsys, train(data, tmp_path / "c", *once, *other))
    assert "last.safetensors' is not a checkpoint of" in message
    assert not (tmp_path / "c").exists()
    message = refused(capsys, train(data, tmp_path / "c", "--init", checkpoint, "--backbone", checkpoint))
    assert message == "--init brings a whole network: leave --backbone out"


def test_a_run_is_not_overwritten(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "state.pt").touch()
    assert "holds a run already: add --resume" in refused(capsys, train(data, run))
    assert "which is damaged" in refused(capsys, train(data, run, "--resume"))
    (run / "state.pt").rename(run / "best.safetensors")
    assert "checkpoints of another run" in refused(capsys, train(data, run, "--resume"))
    (tmp_path / "file").touch()
    assert "could not make the folder" in refused(capsys, train(data, tmp_path / "file" / "run"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--recipe", "resnet"), "unknown recipe 'resnet'; the recipes are asag-a-r50"),
        (("--set", "network.size=3"), "unknown setting 'network.size'"),
        (
            ("--set", "optimisation.accumulate=3"),
            "batch_size 4 is not possible: expected a multiple of the 3",
        ),
        (("--train-split", "train"), "there is no split 'train' in"),
        (("--device", "tpu"), "unknown device 'tpu'; choose cpu, cuda or auto"),
        (("--init", "missing.safetensors"), "missing.safetensors"),
        (("--workers", "-1"), "--workers is -1; it must be a whole number from 0 to 2147483647"),
        (("--evaluate-every", "0"), "--evaluate-every is 0; it must be a whole number from 1"),
        (("--evaluate-images", "0"), "--evaluate-images is 0; it must be a whole number from 1"),
        (("--seed", "99999999999999999999"), "--seed is 99999999999999999999; it must be"),
        (("--seed", "x"), "--seed is x; it must be a whole number from 0"),
        (("--epochs", "3"), "unrecognized arguments: --epochs 3 (see asag-train --help)"),
    ],
)
def test_options_that_are_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    assert message in refused(capsys, train(data, tmp_path / "run", *options))
    assert not (tmp_path / "run").exists()


def test_data_that_is_refused(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert "there is no data folder" in refused(capsys, train(tmp_path / "nowhere", run))
    (tmp_path / "empty").mkdir()
    assert "it has no folder 'annotations'" in refused(capsys, train(tmp_path / "empty", run))
    write_coco(tmp_path / "without", [])
    write_coco(tmp_path / "without", [], split="val2017")
    assert "there is nothing to train on" in refused(capsys, train(tmp_path / "without", run))
    assert not run.exists()


def test_a_damaged_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_pictures(tmp_path / "data")
    write_pictures(root, "val2017", count=1)
    path = root / "train2017" / "5.png"
    path.write_bytes(path.read_bytes()[:200])
    message = refused(capsys, train(root, tmp_path / "run"))
    assert "5.png'" in message
    assert "image 5 of the data set" in message


def test_help_names_the_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "asag-a-r50-100-1x" in capsys.readouterr().out.replace("\n", "").replace(" ", "")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_killed_run_loses_nothing(data: Path, tmp_path: Path, number: signal.Signals) -> None:
    """With workers, in a process group of its own that gets the signal as a whole, as from a terminal.

    SIGKILL is for the main process alone; that stderr ends shows that the workers have ended with it.
    """
    script = Path(__file__).parents[2] / "training" / "train.py"
    run = tmp_path / "run"
    words = [sys.executable, str(script), "--data", str(data), "--output-dir", str(run), *SETTINGS]
    words += ["--workers", "1", "--device", "cpu", "--pictures", "0", "--set", "schedule.epochs=1000"]
    words += ["--evaluate-every", "1000", "--save-every", "1000"]
    with subprocess.Popen(
        words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True
    ) as process:
        deadline = time.monotonic() + 120
        while len(rows_or_none(run / "steps.csv")) < 3:
            assert process.poll() is None, process.stderr and process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        (os.kill if number == signal.SIGKILL else os.killpg)(process.pid, number)
        try:
            error = process.communicate(timeout=60)[1]
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if number == signal.SIGKILL:
        assert "Traceback" not in error  # Python's own process says which semaphores it removed
        return
    assert process.returncode == 128 + number
    assert "Traceback" not in error
    assert "leaked" not in error
    assert error.strip().endswith("asag-train: interrupted; the same command with --resume goes on")
    steps = rows(run / "steps.csv")
    state = torch.load(run / "state.pt", weights_only=True)
    assert state["position"]["step"] == int(steps[-1]["step"])
    assert load_checkpoint(run / "last.safetensors").trained


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal"),
            "a process that reads images has died",
        ),
        (
            RuntimeError("Too many open files. Communication with the workers is no longer possible."),
            "or allow more (a container's --shm-size, `ulimit -n`); --resume goes on",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory"),
            "the GPU's memory ran out: raise optimisation.accumulate",
        ),
    ],
)
def test_memory_that_runs_out(
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: RuntimeError,
    message: str,
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(Trainer, "train_epoch", fail)
    assert message in refused(capsys, train(data, tmp_path / "run"))


def test_a_mistake_of_ours_is_not_hidden(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(Trainer, "train_epoch", fail)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        train(data, tmp_path / "run")


def test_long_epochs_are_saved_in_between(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[Position] = []
    monkeypatch.setattr(Trainer, "save", lambda trainer: saved.append(trainer.position))
    trainer = make_trainer(data, tmp_path / "run", tiny_recipe("schedule.epochs=1"))
    validation = CocoDataset.open(data, "val2017", categories=trainer.categories)
    TrainingRun(trainer, make_loader(data), validation, Rhythm(save_minutes=0, pictures=0))()
    assert [(position.epoch, position.update) for position in saved] == [(0, 1), (0, 2), (1, 0), (1, 0)]
    assert [position.evaluated for position in saved] == [0, 0, 0, 1]
    assert trainer.model.training


@pytest.mark.parametrize("more", [(), ("--resume",)])
def test_a_peers_run_is_called_that(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...]
) -> None:
    (tmp_path / "recipe.json").write_text('{"recipe": {"peer": "yolox-lite"}, "categories": [], "seed": 0}')
    (tmp_path / "state.pt").write_bytes(b"a peer's")
    message = refused(capsys, train(data, tmp_path, *more))
    assert f"'{tmp_path}' holds a run of `asag-bench train-peer`: give another folder" in message


@pytest.mark.parametrize(
    ("name", "content"), [("recipe.json", '{"flour": 500}'), ("steps.csv", "left,right")]
)
def test_files_of_others_are_not_replaced(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str
) -> None:
    (tmp_path / name).write_text(content)
    assert f"holds a '{name}' that no run has written" in refused(capsys, train(data, tmp_path))
    assert (tmp_path / name).read_text() == content


def test_a_checkpoint_is_not_packed_over_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.safetensors").write_text("weights")
    assert pack.main([str(tmp_path / "a.safetensors")] * 2) == 2
    assert "which is read: choose another place" in capsys.readouterr().err
    assert (tmp_path / "a.safetensors").read_text() == "weights"
