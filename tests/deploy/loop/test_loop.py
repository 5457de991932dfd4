"""Which loop a network opens, and how `auto` falls back to the host's."""

from __future__ import annotations

import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from asag_deploy.backends.network import Network
from asag_deploy.errors import CaptureError, ConfigError
from asag_deploy.loop.loop import Begun, HostLoop, Loop
from asag_deploy.loop.probing import Probed

FOUND = Probed(outputs={}, levels=[], probed=np.zeros((1, 2), np.bool_), stop=[])


class UnfitLoop(Loop):
    """Cannot be captured; several threads find that out together."""

    def __init__(self, threads: int = 1) -> None:
        self.together = threading.Barrier(threads)
        self.tried = 0

    def begin(self, *_: Any) -> Begun:
        self.tried += 1
        self.together.wait(5)
        raise CaptureError("the loop could not be captured in a graph")


class PlainNetwork(Network):
    """A network without stages, whose device loop is the one given."""

    def __init__(self, device_loop: Loop | None = None) -> None:
        self.device_loop = device_loop

    def stage(self, name: str) -> Any:
        raise KeyError(name)

    def upload(self, array: NDArray[Any]) -> Any:
        return array

    def download(self, array: Any) -> NDArray[Any]:
        return np.asarray(array)

    def why_no_device_loop(self) -> str | None:
        return super().why_no_device_loop() if self.device_loop is None else None

    def open_device_loop(self) -> Loop:
        return super().open_device_loop() if self.device_loop is None else self.device_loop


@pytest.fixture(autouse=True)
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's loop finds `FOUND`."""
    monkeypatch.setattr("asag_deploy.loop.loop.detect", lambda *_: FOUND)


def run(loop: Loop) -> Probed:
    arguments: Any = (None, None, None, None, None)
    return loop(*arguments)


def test_the_host_is_the_default() -> None:
    network = PlainNetwork()
    assert type(network.loop()) is type(network.loop("host")) is HostLoop
    assert run(network.loop()) is FOUND


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "loop 'device' needs a backend that runs on a GPU with TensorRT"),
        ({"deadline_ms": 5.0}, "loop 'device' cannot keep a deadline"),
        ({"choice": "gpu"}, "unknown loop 'gpu'; expected 'auto', 'host' or 'device'"),
    ],
)
def test_choices_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PlainNetwork().loop(**{"choice": "device", **options})


def test_the_device_is_chosen_where_it_can_be_and_no_deadline_is_set() -> None:
    unfit = UnfitLoop()
    network = PlainNetwork(unfit)
    assert network.loop("device") is unfit
    assert type(network.loop("auto", deadline_ms=5)) is HostLoop
    with pytest.raises(CaptureError):
        run(network.loop("device"))
    assert unfit.tried == 1


def test_auto_goes_on_with_the_host_and_says_why_once() -> None:
    unfit = UnfitLoop()
    loop = PlainNetwork(unfit).loop("auto")
    with pytest.warns(RuntimeWarning, match="runs on the host from now on: .*captured") as warned:
        assert run(loop) is FOUND
    assert len(warned) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(loop) is FOUND
    assert unfit.tried == 1


def test_auto_says_it_once_though_several_threads_find_out() -> None:
    loop = PlainNetwork(UnfitLoop(2)).loop("auto")
    with ThreadPoolExecutor(2) as pool, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert list(pool.map(lambda _: run(loop), range(2))) == [FOUND, FOUND]
        assert [str(one.message)[:22] for one in warned] == ["the probing loop runs "]
