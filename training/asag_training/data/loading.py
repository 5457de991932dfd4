"""Batches of a data set: order, augmentation, workers, padding.

What an epoch holds, and in which order, follows from the seed and the epoch's number alone.  It can therefore
be taken up in the middle, and N processes with batches of b images see together what one process with
batches of N x b would.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver, queues, resource_tracker, util
from typing import NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from asag_deploy.bundle.manifest import Preprocessing
from asag_deploy.errors import ConfigError, DataError, TrainingError, plural
from asag_deploy.interruption import held_back
from asag_evaluation.data.coco import CocoDataset, Sample
from asag_training.data.transforms import Augmentation, augment, sample_rng
from asag_training.losses.targets import Targets

_PATIENCE_S = 5.0
_LONGEST_FOLDER = 107 - len("/pymp-12345678/listener-12345678")
"""Bytes of a folder in which Python's processes can have sockets."""


class Batch(NamedTuple):
    """B images, ready for the network."""

    image: Tensor
    """float32 (B, 3, H, W), normalised RGB; zero right of and below each image."""
    image_size: Tensor
    """int64 (B, 2) valid height and width in pixels."""
    targets: list[Targets]
    """Per image, boxes cx, cy, w, h relative to its valid size, and labels."""
    image_ids: list[int]

    def to(self, device: torch.device | str) -> Batch:
        """Move the batch to a device."""
        there = [Targets(*(t.to(device, non_blocking=True) for t in target)) for target in self.targets]
        image = self.image.to(device, non_blocking=True)
        return Batch(image, self.image_size.to(device, non_blocking=True), there, self.image_ids)

    def pin_memory(self) -> Batch:
        """Copy the batch to page-locked memory, from where copies to a GPU need not be waited for."""
        targets = [Targets(*(t.pin_memory() for t in target)) for target in self.targets]
        return Batch(self.image.pin_memory(), self.image_size.pin_memory(), targets, self.image_ids)


def collate(samples: Sequence[Sample], preprocessing: Preprocessing) -> Batch:
    """Normalise images and stack them, padded to the largest and to a multiple of `size_divisor`."""
    sizes = np.array([sample.image.shape[:2] for sample in samples], dtype=np.int64)
    height, width = (
        -(-int(side) // preprocessing.size_divisor) * preprocessing.size_divisor for side in sizes.max(0)
    )
    image = np.zeros((len(samples), 3, height, width), dtype=np.float32)
    for slot, sample in zip(image, samples, strict=True):
        h, w = sample.image.shape[:2]
        slot[:, :h, :w] = normalise(sample.image, preprocessing)
    return Batch(
        image=torch.from_numpy(image),
        image_size=torch.from_numpy(sizes),
        targets=[targets_of(sample) for sample in samples],
        image_ids=[sample.image_id for sample in samples],
    )


def normalise(image: NDArray[np.uint8], preprocessing: Preprocessing) -> NDArray[np.float32]:
    """Convert uint8 (H, W, 3) to float32 (3, H, W), as the `normalize` stage of inference does it."""
    planes = image.transpose(2, 0, 1).astype(np.float32)
    planes -= np.array(preprocessing.mean, dtype=np.float32)[:, None, None]
    planes /= np.array(preprocessing.std, dtype=np.float32)[:, None, None]
    return planes


def targets_of(sample: Sample) -> Targets:
    """Return the objects of a sample as the losses take them."""
    height, width = sample.image.shape[:2]
    low, high = sample.boxes[:, :2], sample.boxes[:, 2:]
    size = np.array([width, height], dtype=np.float32)
    boxes = np.concatenate([(low + high) / 2 / size, (high - low) / size], axis=1)
    return Targets(torch.from_numpy(boxes.astype(np.float32)), torch.from_numpy(sample.labels.copy()))


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Which images make up each batch of an epoch: lists of (epoch, index).

    The order is drawn anew for every epoch.  Images that fill no whole batch of all processes are left out,
    unless there are so few that no batch would be left: then some come twice.
    """

    def __init__(
        self, length: int, batch_size: int, *, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        if length < 1 or batch_size < 1:
            raise ConfigError(
                f"no batches of {batch_size} can be made of {plural(length, 'image')}: expected 1 or more"
            )
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank {rank} is not among {plural(world_size, 'process')}")
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.batches = max(length // (batch_size * world_size), 1)
        """Batches in a whole epoch, for each process."""
        self.epoch, self.start = 0, 0

    def seek(self, epoch: int, start: int = 0) -> None:
        """Say what the next iteration gives: an epoch, from its batch number `start` on."""
        if not 0 <= start <= self.batches:
            raise ConfigError(f"batch {start} is not in an epoch of {self.batches} batches")
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return self.batches - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch
        together = self.batch_size * self.world_size
        order = np.random.default_rng([self.seed, epoch]).permutation(self.length)
        grid = np.resize(order, (self.batches, self.world_size, together // self.world_size))
        for batch in grid[self.start :, self.rank]:
            yield [(epoch, int(index)) for index in batch]


class TrainingLoader:
    """Augmented batches, epoch by epoch.

    `workers` processes prepare them, or this one if 0; they live until the loader is dropped, or this process
    ends, however it ends.  What a terminal sends to them too, by Ctrl-C or when it is closed, they leave to
    this process.
    """

    def __init__(
        self,
        dataset: CocoDataset,
        augmentation: Augmentation,
        *,
        batch_size: int,
        seed: int,
        preprocessing: Preprocessing | None = None,
        workers: int = 2,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
    ) -> None:
        self._order = EpochBatches(len(dataset), batch_size, seed=seed, rank=rank, world_size=world_size)
        self._loader: DataLoader[Sample | DataError] = DataLoader(
            _Augmented(dataset, augmentation, seed),
            batch_sampler=self._order,
            collate_fn=_Collate(preprocessing or Preprocessing()),
            num_workers=workers,
            persistent_workers=workers > 0,
            # Forked copies of a process that has threads (torch, OpenCV) can hang.
            multiprocessing_context="forkserver" if workers else None,
            worker_init_fn=_start_worker if workers else None,
            pin_memory=pin_memory,
        )
        weakref.finalize(self, _end_workers, self._loader)

    @property
    def batches_per_epoch(self) -> int:
        """Batches in a whole epoch, for each process."""
        return self._order.batches

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch, from its batch number `start` on.

        Raises DataError at the batch that holds an image which cannot be read, TrainingError where this
        machine lets no processes be started.
        """
        self._order.seek(number, start)
        # One that is interrupted while it starts is known to nobody: it would outlive its semaphores.
        with held_back(), _without_the_terminal():
            if self._loader.num_workers:
                _check_processes()
            batches = iter(self._loader)
        for batch in batches:
            if isinstance(batch, DataError):
                raise batch
            yield batch


class _Augmented(Dataset[Sample | DataError]):
    """The data set as workers hold it, addressed by (epoch, index).

    Errors are handed on as values: raised in a worker, they would arrive with its traceback as their message.
    """

    def __init__(self, dataset: CocoDataset, augmentation: Augmentation, seed: int) -> None:
        self.dataset, self.augmentation, self.seed = dataset, augmentation, seed

    def __getitem__(self, key: tuple[int, int]) -> Sample | DataError:
        epoch, index = key
        try:
            sample = self.dataset[index]
        except DataError as error:
            return DataError(str(error))
        return augment(sample, self.augmentation, sample_rng(self.seed, epoch, index))


class _Collate:
    def __init__(self, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing

    def __call__(self, items: list[Sample | DataError]) -> Batch | DataError:
        samples = []
        for item in items:
            if isinstance(item, DataError):
                return item
            samples.append(item)
        return collate(samples, self.preprocessing)


@contextmanager
def _without_the_terminal() -> Iterator[None]:
    """Let the processes that the body starts never see SIGINT or SIGHUP, not even while they import."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        resource_tracker.ensure_running()  # which unblocks SIGINT when it has started, and heeds none itself
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_workers(loader: DataLoader[Sample | DataError]) -> None:
    """End the processes, and then the threads that sent them what to read.

    Such a thread may be the last to hold a semaphore, and removes it then.  PyTorch leaves it to itself: a
    program that ends meanwhile is followed by a warning of Python's about a leak.
    """
    iterator = loader._iterator
    if iterator is None or not loader.num_workers:
        return
    iterator._shutdown_workers()  # type: ignore[attr-defined]
    for to_worker in iterator._index_queues:  # type: ignore[attr-defined]
        if to_worker._thread is not None:
            to_worker._thread.join(_PATIENCE_S)


def _settle_on_a_folder_for_sockets() -> None:
    """Let the processes meet in /tmp where TMPDIR, such as a scheduler's, is too long for a socket's name."""
    named = tempfile.gettempdir()
    if len(os.fsencode(named)) <= _LONGEST_FOLDER:
        return
    tempfile.tempdir = "/tmp"
    try:
        util.get_temp_dir()  # remembers what it has made
    finally:
        tempfile.tempdir = named


def _check_processes() -> None:
    """Start what DataLoader is about to, which would leave a traceback of its own if it could not."""
    try:
        multiprocessing.get_context("forkserver").Lock()
        _settle_on_a_folder_for_sockets()
        forkserver.ensure_running()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise TrainingError(
            f"no processes that read images can be started on this machine ({reason}, as where neither "
            "/dev/shm nor TMPDIR can be written): --workers 0 takes none"
        ) from error


def _start_worker(number: int) -> None:
    cv2.setNumThreads(0)  # the workers are the parallelism
    # It would print a traceback, drop the batch and let the training wait for it for ever.
    queues.Queue._on_queue_feeder_error = staticmethod(_end_without_room)  # type: ignore[attr-defined]
    # Where the training ends while it fetches a batch, what serves that here has nobody left to tell.
    sys.excepthook = lambda *error: None
    threading.Thread(target=_end_with_the_training, daemon=True).start()


def _end_without_room(error: Exception, item: object) -> None:
    """End a worker that cannot hand a batch over, for want of shared memory or of open files."""
    os._exit(1)


def _end_with_the_training() -> None:
    """Wait for the process that trains to end, even by SIGKILL; PyTorch watches the server that forks."""
    training = multiprocessing.parent_process()
    if training is not None:
        training.join()
        os._exit(1)
