"""Several processes train as one would."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from asag_deploy.errors import ConfigError
from asag_training.run.process import Process, joined, wait_for_all
from support.training_runs import TINY, make_loader, make_trainer, options_of, tiny_recipe, write_pictures

ROOT = Path(__file__).parents[3]

RECIPE = tiny_recipe("patches.box_noise=0", "loss.patch_images=2")
"""Processes draw their own noise, so there is none; pictures of 96 pixels have one patch only."""

PROCESS = """
import sys
from pathlib import Path
sys.path[:0] = [{tests!r}, {here!r}]
from test_distributed import train_one_update
from asag_training.run.process import joined
with joined("cpu") as process:
    assert process.world_size == 2
    train_one_update(Path({data!r}), Path({output!r}), process)
"""


def train_one_update(data: Path, output: Path, process: Process) -> None:
    """Train an epoch of two updates; save the gradients of the first and the weights in the end."""
    torch.set_num_threads(1)
    trainer = make_trainer(data, output / f"run{process.rank}", RECIPE, process=process)
    loader = make_loader(data, RECIPE, rank=process.rank, world_size=process.world_size)
    gradients: dict[str, torch.Tensor] = {}

    def before_step(*_: object) -> None:
        for name, parameter in trainer.model.named_parameters():
            if parameter.grad is not None:
                gradients.setdefault(name, parameter.grad.clone())

    trainer.optimizer.register_step_pre_hook(before_step)
    assert trainer.updates_per_epoch(loader) == 2
    trainer.train_epoch(loader)
    trainer.save()
    assert (output / f"run{process.rank}" / "state.pt").exists() == process.is_main
    result = {"gradients": gradients, "weights": trainer.model.state_dict()}
    torch.save(result, output / f"result{process.rank}.pt")


def torchrun(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensors[name].flatten().float() for name in sorted(tensors)])


@pytest.mark.slow
def test_two_processes_give_the_gradients_of_one(tmp_path: Path) -> None:
    data = write_pictures(tmp_path / "data", objects=None)  # so that sums over ranks matter
    (tmp_path / "one").mkdir()
    train_one_update(data, tmp_path / "one", Process())

    script, here = tmp_path / "process.py", Path(__file__).parent
    paths = {"tests": str(here.parents[1]), "here": str(here), "data": str(data), "output": str(tmp_path)}
    script.write_text(PROCESS.format(**paths))
    done = torchrun(str(script))
    assert done.returncode == 0, done.stderr

    one = torch.load(tmp_path / "one" / "result0.pt", weights_only=True)
    two = [torch.load(tmp_path / f"result{rank}.pt", weights_only=True) for rank in range(2)]
    for kind in ("gradients", "weights"):
        assert two[0][kind].keys() == one[kind].keys()
        assert torch.equal(flat(two[0][kind]), flat(two[1][kind]))
        difference = (flat(two[0][kind]) - flat(one[kind])).norm() / flat(one[kind]).norm()
        assert difference < 1e-4


@pytest.mark.slow
def test_torchrun_trains_and_resumes(tmp_path: Path) -> None:
    data = write_pictures(write_pictures(tmp_path / "data"), "val2017", count=2)
    run = tmp_path / "run"
    words = [str(ROOT / "training" / "train.py"), "--data", str(data), "--output-dir", str(run)]
    words += [
        *options_of(TINY),
        "--workers",
        "0",
        "--device",
        "cpu",
        "--pictures",
        "1",
        "--evaluate-every",
        "2",
    ]
    first = torchrun(*words)
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("starting, on cpu") == 1
    assert len((run / "steps.csv").read_text().splitlines()) == 1 + 4
    assert len((run / "evaluations.csv").read_text().splitlines()) == 1 + 1
    assert torch.load(run / "state.pt", weights_only=True)["run"]["number of processes"] == 2
    again = torchrun(*words, "--resume")
    assert again.returncode == 0, again.stderr
    assert "resuming, 2 of 2 epochs are done" in again.stdout


def test_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")  # as other launchers do; torchrun says more
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with joined("cpu") as process:
        assert (process.rank, process.world_size, process.is_main) == (0, 1, True)
        assert process.device == torch.device("cpu")
        wait_for_all()
    assert not dist.is_initialized()


def test_one_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    port = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
    for name, value in port.items():
        monkeypatch.setenv(name, value)
    with joined("cpu") as process:
        assert dist.is_initialized()
        assert process.is_main
        wait_for_all()
    assert not dist.is_initialized()


def test_others_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "RANK": "one", "WORLD_SIZE": "2"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(ConfigError, match=r"could not join the other processes at 127\.0\.0\.1:1"),
        joined("cpu"),
    ):
        pass


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="unknown device 'gpu'; choose cpu, cuda or auto"), joined("gpu"):
        pass
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no usable CUDA device"), joined("cuda"):
        pass
    with joined("auto") as process:
        assert process.device.type == "cpu"


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "3")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match="process 3 of this machine has no GPU: start 2"), joined("cuda"):
        pass
