"""What a capture forbids waits until it is over, whoever wants it and whenever."""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest

from asag_deploy.cuda import Cuda, Device, open_cuda
from asag_deploy.cuda.captures import Captures, captures
from asag_deploy.cuda.graph import capture
from asag_deploy.errors import BackendError
from support.simulated_gpu.fake_cuda import FakeCuda


def test_a_finaliser_frees_memory_after_the_capture(cuda: FakeCuda, api: Cuda, stream: int) -> None:
    """Of a network that has been closed, whose last array goes in the midst of another one's capture."""
    closed = Device(open_cuda())
    held = [closed.upload(np.arange(5000)), closed.upload(np.arange(3))]
    closed.close()
    assert cuda.leaked()["device"] == 2

    def work() -> None:
        held.clear()
        assert cuda.leaked()["device"] == 2

    api.destroy_graph(capture(api, stream, work))
    assert "device" not in cuda.leaked()


def test_a_capture_that_fails_holds_nothing_back(cuda: FakeCuda, api: Cuda, stream: int) -> None:
    closed = Device(open_cuda())
    held = [closed.upload(np.arange(5000))]
    closed.close()

    def work() -> None:
        held.clear()
        raise BackendError("the engine could not be started")

    with pytest.raises(BackendError, match="could not be started"):
        capture(api, stream, work)
    assert cuda.leaked() == {"streams": 1}


def test_closing_a_network_during_a_capture(cuda: FakeCuda, api: Cuda, stream: int) -> None:
    """By another thread, as a finaliser may: its memory, pinned and not, goes when the capture is over."""
    other = Device(open_cuda())
    other.download(other.upload(np.arange(5000)))
    before = {"device", "pinned", "streams"}
    assert before <= set(cuda.leaked())

    def work() -> None:
        thread = threading.Thread(target=other.close)
        thread.start()
        thread.join()
        assert {"device", "pinned"} <= set(cuda.leaked())

    api.destroy_graph(capture(api, stream, work))
    assert cuda.leaked() == {"streams": 1}


def test_the_garbage_collector_rests(api: Cuda, stream: int) -> None:
    """For it would run the finalisers of other libraries, which free memory as they please."""
    states: list[bool] = []
    assert gc.isenabled()
    api.destroy_graph(capture(api, stream, lambda: states.append(gc.isenabled())))
    assert states == [False]
    assert gc.isenabled()


def test_a_collector_that_is_off_stays_off(api: Cuda, stream: int) -> None:
    gc.disable()
    try:
        api.destroy_graph(capture(api, stream, lambda: None))
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_wait_for_the_device_waits_for_captures(cuda: FakeCuda, api: Cuda, stream: int) -> None:
    """Since it would spoil that of another thread."""
    thread = threading.Thread(target=api.synchronize_device)

    def work() -> None:
        thread.start()
        thread.join(0.05)
        assert thread.is_alive()

    api.destroy_graph(capture(api, stream, work))
    thread.join()
    assert cuda.leaked() == {"streams": 1}


def test_one_capture_at_a_time() -> None:
    gate, order = Captures(), []
    first_is_in, second_is_done = threading.Event(), threading.Event()

    def first() -> None:
        with gate.going_on():
            first_is_in.set()
            second_is_done.wait(0.05)
            order.append("first")

    def second() -> None:
        first_is_in.wait()
        with gate.going_on():
            order.append("second")
        second_is_done.set()

    threads = [threading.Thread(target=target) for target in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert order == ["first", "second"]


def test_what_is_put_off_and_fails_is_lost() -> None:
    done: list[str] = []

    def fail() -> None:
        raise BackendError("the GPU is gone")

    with captures.going_on():
        captures.when_over(fail)
        captures.when_over(lambda: done.append("late"))
        assert done == []
    assert done == ["late"]
    captures.when_over(lambda: done.append("at once"))
    assert done == ["late", "at once"]
    with pytest.raises(BackendError, match="the GPU is gone"):
        captures.when_over(fail)
