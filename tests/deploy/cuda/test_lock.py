"""What changes a device's books waits for whoever holds its lock."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest

from asag_deploy.cuda import Device

BYTES = np.dtype(np.uint8)
LARGE = np.zeros(1 << 16, dtype=np.uint8)

OPERATIONS: dict[str, Callable[[Device], object]] = {
    "empty": lambda device: device.empty((4,), BYTES),
    "scratch": lambda device: device.scratch(16),
    "expect_scratch": lambda device: device.expect_scratch(16),
    "capture_stream": lambda device: device.capture_stream,
    "upload a small array": lambda device: device.upload(np.arange(3)),
    "upload a large array": lambda device: device.upload(LARGE),
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS.keys())
def test_it_waits_for_the_lock(device: Device, operation: Callable[[Device], object]) -> None:
    done = threading.Event()

    def operate() -> None:
        operation(device)
        done.set()

    thread = threading.Thread(target=operate)
    with device.lock:
        thread.start()
        assert not done.wait(0.2)  # without the lock it would be done in far less
    thread.join()
    assert done.is_set()
