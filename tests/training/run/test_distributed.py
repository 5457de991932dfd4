"""Several processes train as one would."""

from __future__ import annotations

import datetime
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE

import pytest
import torch
import torch.distributed as dist

from asag_deploy.errors import ConfigError
from asag_training.cli import main
from asag_training.run import process as training_process
from asag_training.run.process import Process, joined, wait_for_all
from support.training_runs import TINY, make_loader, make_trainer, options_of, tiny_recipe, write_pictures

ROOT = Path(__file__).parents[3]

RECIPE = tiny_recipe("patches.box_noise=0", "loss.patch_images=2")
"""Processes draw their own noise, so there is none; pictures of 96 pixels have one patch only."""

SECOND = """
import sys
from pathlib import Path
sys.path[:0] = [{tests!r}, {here!r}]
from test_distributed import train_one_update
from asag_training.run.process import joined
with joined("cpu") as process:
    train_one_update(Path({data!r}), Path({output!r}), process)
"""


@contextmanager
def beside(*command: str) -> Iterator[None]:
    """Make this process the first of two, of which the second runs `command`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **place, "RANK": "1", "LOCAL_RANK": "1"}
    with pytest.MonkeyPatch.context() as patched:
        # Neither waits forever, should the other fail.
        patched.setattr(training_process, "_PATIENCE", datetime.timedelta(minutes=2))
        for name, value in {**place, "RANK": "0", "LOCAL_RANK": "0"}.items():
            patched.setenv(name, value)
        with subprocess.Popen(command, env=environment, stdout=PIPE, stderr=PIPE, text=True) as second:
            try:
                yield
                output, error = second.communicate(timeout=120)
            finally:
                second.kill()
    assert second.returncode == 0, error
    assert output == ""


def train_one_update(data: Path, output: Path, process: Process) -> None:
    """Train an epoch of two updates; save the gradients of the first and the weights in the end."""
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


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensors[name].flatten().float() for name in sorted(tensors)])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Grad strides do not match bucket view strides")  # it says: no error
def test_two_processes_give_the_gradients_of_one(tmp_path: Path) -> None:
    data = write_pictures(tmp_path / "data", objects=None)  # so that sums over ranks matter
    (tmp_path / "one").mkdir()
    train_one_update(data, tmp_path / "one", Process())

    here = Path(__file__).parent
    paths = {"tests": str(here.parents[1]), "here": str(here), "data": str(data), "output": str(tmp_path)}
    with beside(sys.executable, "-c", SECOND.format(**paths)), joined("cpu") as process:
        assert process.world_size == 2
        train_one_update(data, tmp_path, process)

    one = torch.load(tmp_path / "one" / "result0.pt", weights_only=True)
    two = [torch.load(tmp_path / f"result{rank}.pt", weights_only=True) for rank in range(2)]
    for kind in ("gradients", "weights"):
        assert two[0][kind].keys() == one[kind].keys()
        assert torch.equal(flat(two[0][kind]), flat(two[1][kind]))
        difference = (flat(two[0][kind]) - flat(one[kind])).norm() / flat(one[kind]).norm()
        assert difference < 1e-4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Grad strides do not match bucket view strides")
def test_torchrun_trains_and_the_run_can_be_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_pictures(write_pictures(tmp_path / "data"), "val2017", count=2)
    run, script = tmp_path / "run", str(ROOT / "training" / "train.py")
    words = ["--data", str(data), "--output-dir", str(run), *options_of(TINY), "--device", "cpu"]
    words += ["--workers", "0", "--pictures", "1", "--evaluate-every", "2"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    first = subprocess.run([*command, *words], env=environment, capture_output=True, text=True, timeout=300)
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("starting, on cpu") == 1
    assert len((run / "steps.csv").read_text().splitlines()) == 1 + 4
    assert len((run / "evaluations.csv").read_text().splitlines()) == 1 + 1
    assert torch.load(run / "state.pt", weights_only=True)["run"]["number of processes"] == 2
    with beside(sys.executable, script, *words, "--resume"):
        assert main([*words, "--resume"]) == 0
    assert "resuming, 2 of 2 epochs are done" in capsys.readouterr().out


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
    """Afterwards one can join, and leaving resets PyTorch's count of groups, which all must agree on."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "RANK": "one", "WORLD_SIZE": "2"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(ConfigError, match=r"could not join the other processes at 127\.0\.0\.1:1"),
        joined("cpu"),
    ):
        pass
    for name, value in {"MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    with joined("cpu"):
        assert dist.is_initialized()


@pytest.mark.parametrize(
    ("name", "value"),
    [*(("LOCAL_RANK", value) for value in ("one", "", "-1", "1_0")), ("RANK", "one"), ("WORLD_SIZE", "one")],
)
def test_variables_of_a_launcher_that_are_no_numbers(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
    }
    for variable, said in {**place, name: value}.items():
        monkeypatch.setenv(variable, said)
    sentence = rf"{name} is '{value}', expected a whole number" if name == "LOCAL_RANK" else "could not join"
    with pytest.raises(ConfigError, match=sentence), joined("cpu"):
        pass
    assert not dist.is_initialized()


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
