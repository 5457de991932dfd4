"""Arrays of other libraries on the GPU, in and out, without a copy."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from asag_deploy.cuda import Device, DeviceArray, is_device_array
from asag_deploy.cuda import interchange as capsules
from asag_deploy.errors import ImageError
from support.simulated_gpu.fake_cuda import FakeCuda
from support.simulated_gpu.fake_tensorrt import view


class Foreign:
    """An array with `__cuda_array_interface__`, as PyCUDA has it, that notes when it goes."""

    gone = 0

    def __init__(self, cuda: FakeCuda, content: NDArray[Any], **changes: Any) -> None:
        offset = changes.pop("offset", 0)
        self.pointer = cuda.device.allocate(content.nbytes + offset) + offset
        whole = view(cuda, self.pointer, content.shape, content.dtype)
        whole[...] = content
        self.interface = {
            "version": 3,
            "shape": content.shape,
            "typestr": content.dtype.str,
            "data": (self.pointer, False),
            "strides": None,
            **changes,
        }

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return self.interface

    def __del__(self) -> None:
        Foreign.gone += 1


CONTENT = np.arange(12, dtype=np.float32).reshape(3, 4)


def test_what_lies_on_a_gpu(cuda: FakeCuda, device: Device) -> None:
    assert is_device_array(Foreign(cuda, CONTENT))
    assert is_device_array(device.upload(CONTENT))
    assert not is_device_array(CONTENT)
    assert not is_device_array([1, 2])


def test_an_array_is_used_where_it_lies(cuda: FakeCuda, device: Device) -> None:
    foreign = Foreign(cuda, CONTENT)
    adopted = device.adopt(foreign)
    assert adopted.pointer == foreign.pointer
    np.testing.assert_array_equal(device.download(adopted), CONTENT)


def test_an_array_lives_as_long_as_it_is_used(cuda: FakeCuda, device: Device) -> None:
    before = Foreign.gone
    adopted = device.adopt(Foreign(cuda, CONTENT))
    gc.collect()
    assert Foreign.gone == before
    del adopted
    gc.collect()
    assert Foreign.gone == before + 1


def test_an_array_that_is_not_aligned_is_copied(cuda: FakeCuda, device: Device) -> None:
    foreign = Foreign(cuda, CONTENT, offset=16)
    adopted = device.adopt(foreign)
    assert adopted.pointer != foreign.pointer
    assert adopted.pointer % 256 == 0
    cuda.device.free(foreign.pointer - 16)
    np.testing.assert_array_equal(device.download(adopted), CONTENT)


def test_the_stream_of_the_producer_is_waited_for(cuda: FakeCuda, device: Device) -> None:
    foreign = Foreign(cuda, np.zeros(4, np.float32), stream=1)

    def compute() -> None:
        view(cuda, foreign.pointer, (4,), np.dtype(np.float32))[:] = 7

    cuda.put(1, compute)
    assert device.download(device.adopt(foreign)).tolist() == [7] * 4


def test_strides_are_refused(cuda: FakeCuda, device: Device) -> None:
    with pytest.raises(ImageError, match="not contiguous; pass a contiguous copy"):
        device.adopt(Foreign(cuda, CONTENT, strides=(4, 12)))


def test_an_export_says_which_stream_it_is_computed_on(device: Device) -> None:
    array = device.upload(CONTENT)
    interface = array.__cuda_array_interface__
    assert interface["shape"] == (3, 4)
    assert np.dtype(interface["typestr"]) == np.float32
    assert interface["data"] == (array.pointer, False)
    assert interface["stream"] == device.stream


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int64, np.uint8, np.bool_])
def test_dlpack_there_and_back(device: Device, dtype: type[np.generic]) -> None:
    content = np.ones((2, 3), dtype=dtype)
    array = device.upload(content)
    assert array.__dlpack_device__() == (2, 0)
    imported = capsules.Imported(array.__dlpack__())
    assert (imported.pointer, imported.shape, imported.dtype) == (array.pointer, (2, 3), np.dtype(dtype))


def test_dlpack_keeps_the_array_until_the_consumer_lets_go(cuda: FakeCuda, device: Device) -> None:
    array = device.empty((50_000,), np.dtype(np.float32))
    pointer = array.pointer
    imported = capsules.Imported(array.__dlpack__())
    del array
    assert device.empty((50_000,), np.dtype(np.float32)).pointer != pointer
    del imported
    found = {device.empty((50_000,), np.dtype(np.float32)).pointer for _ in range(3)}
    held = [device.empty((50_000,), np.dtype(np.float32)) for _ in range(3)]
    assert pointer in found | {array.pointer for array in held}


def test_a_capsule_that_nobody_takes_lets_go_too(device: Device) -> None:
    before = len(capsules._alive)
    capsule = device.upload(CONTENT).__dlpack__()
    assert len(capsules._alive) == before + 1
    del capsule
    assert len(capsules._alive) == before


def test_a_capsule_is_taken_once(device: Device) -> None:
    capsule = device.upload(CONTENT).__dlpack__()
    taken = capsules.Imported(capsule)
    with pytest.raises(ImageError, match="that nobody has consumed"):
        capsules.Imported(capsule)
    assert taken.shape == (3, 4)


def test_the_consumer_waits_for_the_network(cuda: FakeCuda, device: Device) -> None:
    array = device.upload(CONTENT)
    assert cuda.device.holds(array.pointer, array.nbytes)
    seen: list[float] = []
    array.__dlpack__(stream=2)
    cuda.put(2, lambda: seen.append(float(view(cuda, array.pointer, (3, 4), array.dtype)[0, 1])))
    cuda.cudaStreamSynchronize(2)
    assert seen == [1.0]


def test_memory_that_others_saw_is_reused_only_after_all_streams(cuda: FakeCuda, device: Device) -> None:
    """A consumer may have let go of the array, but not yet be done with it on its own stream."""
    array = device.upload(np.full(10_000, 5.0, np.float32))
    consumer = Consumer(cuda, array)
    del array
    for value in range(3):
        device.upload(np.full(10_000, value, np.float32))
    device.synchronize()
    cuda.cudaStreamSynchronize(2)
    assert consumer.seen == [5.0]


class Consumer:
    """Takes an array through its interface, launches something on its own stream, and lets go."""

    def __init__(self, cuda: FakeCuda, array: DeviceArray) -> None:
        self.seen: list[float] = []
        interface = array.__cuda_array_interface__
        _, event = cuda.cudaEventCreateWithFlags(2)
        cuda.cudaEventRecord(event, interface["stream"])
        cuda.cudaStreamWaitEvent(2, event, 0)
        pointer = interface["data"][0]
        dtype = np.dtype(np.float32)
        cuda.put(2, lambda: self.seen.append(float(view(cuda, pointer, (10_000,), dtype)[0])))
