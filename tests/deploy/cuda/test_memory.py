"""Memory on the GPU and pinned memory: used again, never too early, and all given back."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from asag_deploy.cuda import Device
from asag_deploy.cuda.memory import bucket_of
from asag_deploy.errors import BackendError
from support.simulated_gpu.fake_cuda import FakeCuda

FLOAT = np.dtype(np.float32)


@pytest.mark.parametrize("size", [0, 1, 512, 513, 4096, 4097, 10**6, 2**30, 2**30 + 1, 3 * 10**9])
def test_buckets_hold_what_they_are_for(size: int) -> None:
    bucket = bucket_of(size)
    assert size <= bucket <= max(size * 9 / 8, size + 512)
    assert bucket == bucket_of(bucket)


def test_memory_is_allocated_once(cuda: FakeCuda, device: Device) -> None:
    for _ in range(5):
        arrays = [device.empty((3, size), FLOAT) for size in (1, 10, 1000)]
        del arrays
    assert cuda.allocations == 3


def test_what_is_in_use_is_not_given_out(cuda: FakeCuda, device: Device) -> None:
    held = [device.empty((4,), FLOAT) for _ in range(10)]
    assert len({array.pointer for array in held}) == 10
    again = held.pop(3).pointer
    assert device.empty((5,), FLOAT).pointer == again


def test_the_same_calls_give_the_same_addresses(device: Device) -> None:
    """In whatever order the arrays of the calls before went."""

    def call(order: int) -> list[int]:
        arrays = [device.empty((size,), FLOAT) for size in (7, 5000, 7, 9, 5000)]
        pointers = [array.pointer for array in arrays]
        while arrays:
            arrays.pop(order if len(arrays) > 1 else 0)
        return pointers

    call(0)  # allocates
    assert call(0) == call(-1) == call(1) == call(0)


def test_memory_that_runs_out_is_taken_from_other_sizes(cuda: FakeCuda, device: Device) -> None:
    cuda.limit = 100_000
    for size in (10_000, 15_000, 20_000):
        device.empty((size,), FLOAT)
    assert device.allocated <= 100_000
    with pytest.raises(BackendError, match="CUDA could not allocate"):
        device.empty((30_000,), FLOAT)


def test_uploads_of_small_arrays_are_remembered(cuda: FakeCuda, device: Device) -> None:
    first = device.upload(np.arange(5))
    assert device.upload(np.arange(5)).pointer == first.pointer
    assert device.upload(np.arange(6)).pointer != first.pointer
    assert len(cuda.copies) == 2
    for i in range(300):
        device.upload(np.array([i]))
    assert device.download(first).tolist() == [0, 1, 2, 3, 4]
    assert device.download(device.upload(np.arange(5))).tolist() == [0, 1, 2, 3, 4]


def test_pinned_memory_is_not_overwritten_before_it_is_copied(cuda: FakeCuda, device: Device) -> None:
    uploaded = [device.upload(np.full(2000, i)) for i in range(20)]
    assert [int(device.download(array)[0]) for array in uploaded] == list(range(20))
    slots = len(cuda.pinned.alive)
    for i in range(20):
        assert int(device.download(device.upload(np.full(2000, i)))[0]) == i
    assert len(cuda.pinned.alive) == slots


def test_scratch_grows_and_stays(device: Device) -> None:
    small = device.scratch(1000)
    assert device.scratch(500) is small
    large = device.scratch(100_000)
    assert large.size >= 100_000
    assert device.scratch(1000) is large


def test_scratch_is_taken_once_for_all_that_may_come(cuda: FakeCuda, device: Device) -> None:
    device.expect_scratch(50_000)
    device.expect_scratch(9000)
    assert cuda.leaked().get("device") is None  # nobody has asked for any
    first = device.scratch(100)
    assert first.size >= 50_000
    assert device.scratch(50_000) is first
    assert device.allocated == first.size


def test_no_room_for_scratch_that_may_never_be_needed(cuda: FakeCuda, device: Device) -> None:
    cuda.limit = 20_000
    device.expect_scratch(50_000)
    assert 100 <= device.scratch(100).size < 20_000
    with pytest.raises(BackendError, match="could not allocate"):
        device.scratch(30_000)


def test_what_is_kept_goes_once_the_stream_is_done(cuda: FakeCuda, device: Device) -> None:
    class Array:
        gone = 0

        def __del__(self) -> None:
            Array.gone += 1

    device.keep(Array())
    device.keep(Array())
    assert Array.gone == 0
    device.synchronize()
    device.keep(None)
    assert Array.gone == 2
    device.close()
    assert cuda.leaked() == {}


def test_close_gives_everything_back(cuda: FakeCuda, device: Device) -> None:
    held = device.upload(np.arange(10_000))
    device.download(held)
    device.scratch(5000)
    device.close()
    device.close()
    assert cuda.leaked() == {"device": 1}
    del held
    gc.collect()
    assert cuda.leaked() == {}


def test_pinned_memory_comes_back_though_nobody_asks_for_a_download(cuda: FakeCuda, device: Device) -> None:
    """What is begun may be dropped, when something else has gone wrong."""
    array = device.upload(np.arange(5000))
    device.download(array)
    before = cuda.leaked()["pinned"]
    for _ in range(5):
        device.begin_download([array])
        device.synchronize()
    assert cuda.leaked()["pinned"] <= before + 1
    np.testing.assert_array_equal(device.download(array), np.arange(5000))
