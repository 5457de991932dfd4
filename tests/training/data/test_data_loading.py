"""Batches: padding, normalisation, order, and workers that change nothing."""

from __future__ import annotations

import errno
import multiprocessing.util
import queue
import subprocess
import sys
import tempfile
import threading
from multiprocessing import forkserver
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from asag_deploy.bundle.manifest import Preprocessing
from asag_deploy.errors import ConfigError, DataError, TrainingError
from asag_evaluation.data.coco import CocoDataset, Sample
from asag_training.data.loading import Batch, EpochBatches, TrainingLoader, collate
from asag_training.data.transforms import Augmentation
from asag_training.network.stages import NormalizeStage
from support.coco_files import box, gradient, write_coco

AUGMENTATION = Augmentation(shorter_sides=(32, 48), longer_side=80, colour=0.3)


def sample(height: int, width: int, *boxes: tuple[float, float, float, float]) -> Sample:
    return Sample(
        image=gradient(height, width),
        boxes=np.array(boxes, dtype=np.float32).reshape(-1, 4),
        labels=np.arange(len(boxes)),
        image_id=height,
        original_shape=(height, width),
    )


def test_batch_is_padded_and_normalised_as_inference_does() -> None:
    samples = [sample(40, 60, (6, 10, 18, 30)), sample(65, 50)]
    batch = collate(samples, Preprocessing())
    assert batch.image.shape == (2, 3, 96, 64)
    assert batch.image.dtype == torch.float32
    assert batch.image_size.tolist() == [[40, 60], [65, 50]]
    assert batch.image_size.dtype == torch.int64
    assert batch.image_ids == [40, 65]

    pixels = np.zeros((2, 96, 64, 3), dtype=np.uint8)
    for slot, one in zip(pixels, samples, strict=True):
        slot[: one.image.shape[0], : one.image.shape[1]] = one.image
    expected = NormalizeStage(Preprocessing())(torch.from_numpy(pixels), batch.image_size)[0]
    assert torch.allclose(batch.image, expected, atol=1e-6)
    assert (batch.image[0, :, 40:] == 0).all()
    assert (batch.image[0, :, :, 60:] == 0).all()


def test_targets_are_relative_to_the_valid_image() -> None:
    batch = collate([sample(40, 60, (6, 10, 18, 30), (0, 0, 60, 40)), sample(65, 50)], Preprocessing())
    boxes, labels = batch.targets[0]
    assert torch.allclose(boxes, torch.tensor([[0.2, 0.5, 0.2, 0.5], [0.5, 0.5, 1.0, 1.0]]))
    assert labels.tolist() == [0, 1]
    assert labels.dtype == torch.int64
    assert batch.targets[1].boxes.shape == (0, 4)
    assert batch.to("cpu").targets[0].labels.tolist() == [0, 1]


def test_order_visits_everything_once_and_differs_by_epoch() -> None:
    order = EpochBatches(12, 3, seed=1)
    epochs = []
    for epoch in (0, 1):
        order.seek(epoch)
        keys = [key for batch in order for key in batch]
        assert {number for number, _ in keys} == {epoch}
        assert sorted(index for _, index in keys) == list(range(12))
        epochs.append([index for _, index in keys])
    assert epochs[0] != epochs[1]
    assert epochs[0] != sorted(epochs[0])
    assert [index for batch in EpochBatches(12, 3, seed=2) for _, index in batch] != epochs[0]


def test_order_can_be_taken_up_in_the_middle() -> None:
    order = EpochBatches(13, 3, seed=1)
    assert len(order) == 4  # the last image is left out
    order.seek(5)
    whole = list(order)
    order.seek(5, 3)
    assert len(order) == 1
    assert list(order) == whole[3:]
    order.seek(5, 4)
    assert list(order) == []
    with pytest.raises(ConfigError, match="batch 5 is not in an epoch of 4"):
        order.seek(5, 5)


def test_processes_share_the_batches_of_one() -> None:
    alone = list(EpochBatches(20, 6, seed=1))
    shared = [list(EpochBatches(20, 2, seed=1, rank=rank, world_size=3)) for rank in range(3)]
    assert [[*a, *b, *c] for a, b, c in zip(*shared, strict=True)] == alone


def test_few_images_come_twice() -> None:
    batches = list(EpochBatches(3, 4, seed=0, world_size=2))
    assert len(batches) == 1
    assert {index for _, index in batches[0]} == {0, 1, 2}


@pytest.mark.parametrize(
    ("length", "batch", "rank", "problem"),
    [(0, 1, 0, "0 images"), (5, 0, 0, "batches of 0"), (5, 1, 2, "rank 2")],
)
def test_impossible_orders(length: int, batch: int, rank: int, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        EpochBatches(length, batch, seed=0, rank=rank, world_size=2)


def loader(root: Path, workers: int = 0) -> TrainingLoader:
    return TrainingLoader(CocoDataset.open(root), AUGMENTATION, batch_size=2, seed=4, workers=workers)


def equal(a: Batch, b: Batch) -> bool:
    return a.image_ids == b.image_ids and torch.equal(a.image, b.image)


def test_loader_repeats_and_resumes(tmp_path: Path) -> None:
    write_coco(tmp_path, [box(i, [5, 5, 20, 20]) for i in range(1, 7)], shapes=[(40, 60)] * 6)
    first = loader(tmp_path)
    assert first.batches_per_epoch == 3
    epochs = [list(first.epoch(number)) for number in (0, 1)]
    assert [len(epoch) for epoch in epochs] == [3, 3]
    assert sorted(i for batch in epochs[0] for i in batch.image_ids) == [1, 2, 3, 4, 5, 6]
    resumed = list(loader(tmp_path).epoch(1, 1))
    assert len(resumed) == 2
    assert all(equal(a, b) for a, b in zip(resumed, epochs[1][1:], strict=True))


def test_workers_change_nothing_and_report_damage(tmp_path: Path) -> None:
    write_coco(tmp_path, [box(i, [5, 5, 20, 20]) for i in range(1, 5)], shapes=[(40, 60)] * 4)
    with_worker = loader(tmp_path, workers=1)
    for epoch in (0, 1):
        for a, b in zip(with_worker.epoch(epoch), loader(tmp_path).epoch(epoch), strict=True):
            assert equal(a, b)
    (tmp_path / "train2017" / "3.png").write_bytes(b"nothing")
    for damaged in (with_worker, loader(tmp_path)):
        with pytest.raises(DataError, match=r"^'[^\n]*3\.png' is damaged[^\n]*$"):
            list(damaged.epoch(2))


def test_where_no_processes_can_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_coco(tmp_path, [box(1, [5, 5, 20, 20])], shapes=[(40, 60)])
    monkeypatch.setattr(forkserver, "ensure_running", Mock(side_effect=OSError(errno.EROFS, "Read-only")))
    with pytest.raises(TrainingError, match=r"can be started on this machine \(read-only, .*: --workers 0 "):
        next(loader(tmp_path, workers=1).epoch(0))


@pytest.mark.parametrize(("folder", "settled"), [("/tmp/a", []), (f"/tmp/{'a' * 76}", ["/tmp"])])
def test_processes_meet_where_sockets_can_be_named(
    folder: str, settled: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folders for what is temporary that schedulers give are long."""
    write_coco(tmp_path, [box(1, [5, 5, 20, 20])], shapes=[(40, 60)])
    made: list[str] = []
    monkeypatch.setattr(multiprocessing.util, "get_temp_dir", lambda: made.append(tempfile.gettempdir()))
    monkeypatch.setattr(forkserver, "ensure_running", Mock(side_effect=OSError(errno.EAGAIN, "enough")))
    monkeypatch.setattr(tempfile, "tempdir", folder)
    with pytest.raises(TrainingError, match="enough"):
        next(loader(tmp_path, workers=1).epoch(0))
    assert tempfile.gettempdir() == folder
    assert made == settled


@pytest.mark.slow
def test_a_batch_that_cannot_be_handed_over_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where /dev/shm is a container's, of 64 MB: a queue drops what it cannot send."""
    # PyTorch looks every five seconds whether the processes are alive.
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.2,))
    write_coco(tmp_path, [box(1, [5, 5, 20, 20])], shapes=[(40, 60)])
    with_worker = loader(tmp_path, workers=1)
    with_worker._loader.collate_fn = queue.Queue  # something that no process can send

    def give_up() -> None:
        for worker in with_worker._loader._iterator._workers:  # type: ignore[union-attr]
            worker.kill()

    patience = threading.Timer(60, give_up)
    patience.start()
    with pytest.raises(RuntimeError, match=r"DataLoader worker .* exited unexpectedly"):
        next(with_worker.epoch(0))
    patience.cancel()


_INTERRUPTED = """
import os, signal, sys, threading, time
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from asag_deploy.interruption import Interruption
from asag_evaluation.data.coco import CocoDataset
from asag_training.data.loading import TrainingLoader
from asag_training.data.transforms import Augmentation

class SlowToArrive(CocoDataset):
    def __setstate__(self, state):
        time.sleep(2)
        self.__dict__.update(state)

def interrupt_once(descriptor, read=forkserver.read_signed):
    forkserver.read_signed = read
    os.kill(os.getpid(), signal.SIGTERM)
    return read(descriptor)

def slowly(*semaphore, unregister=resource_tracker.unregister):
    if threading.current_thread() is not threading.main_thread():
        time.sleep(0.5)
    unregister(*semaphore)

if __name__ == "__main__":
    resource_tracker.unregister = slowly
    forkserver.read_signed = interrupt_once
    data = CocoDataset.open(Path(sys.argv[1]))
    data.__class__ = SlowToArrive
    try:
        with Interruption():
            next(TrainingLoader(data, Augmentation(), batch_size=2, seed=4, workers=1).epoch(0))
    except KeyboardInterrupt:
        print("interrupted")
"""


def test_an_interruption_while_workers_start_leaves_no_traceback(tmp_path: Path) -> None:
    """A worker that nobody knows reads what it is given when that is gone with the process that trains; a
    thread that is not waited for leaves semaphores behind."""
    write_coco(tmp_path, [box(1, [5, 5, 20, 20])], shapes=[(40, 60)])
    script = tmp_path / "interrupted.py"
    script.write_text(_INTERRUPTED)
    done = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("interrupted\n", "")
