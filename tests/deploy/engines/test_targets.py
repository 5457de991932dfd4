"""How GPUs are named."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from asag_deploy.engines.targets import check_supported, number, parse_target, targets, this_gpu
from asag_deploy.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "capability"),
    [("sm86", "sm86"), ("SM_89", "sm89"), (" 7.5 ", "sm75"), ("120", "sm120"), ("12.0", "sm120")],
)
def test_a_capability_can_be_written_in_several_ways(text: str, capability: str) -> None:
    assert parse_target(text) == capability


@pytest.mark.parametrize("text", ["", "ampere", "RTX 3090", "sm8", "sm1200", "8.6.1", "-86"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"unknown GPU '.*such as sm75, sm86, sm89, sm120.*compute_cap"):
        parse_target(text)


def test_one_target_for_each_or_one_for_all() -> None:
    asked = ("sm120", "sm75", "sm86", "sm86")
    assert [target.name for target in targets(asked, shared=False)] == ["sm75", "sm86", "sm120"]
    (shared,) = targets(asked, shared=True)
    assert shared.name == "sm75+sm86+sm120"
    assert shared.includes_turing
    assert not targets(("sm86",), shared=True)[0].includes_turing


def test_what_the_library_cannot_do_is_said() -> None:
    check_supported(("sm86",), ("sm75", "sm86"), "it")
    with pytest.raises(
        ConfigError, match=r"it cannot build for sm90 \(H100, H200\); it builds for sm75, sm86, sm120$"
    ):
        check_supported(("sm86", "sm90"), ("sm120", "sm75", "sm86"), "it")


def test_capabilities_are_ordered_as_numbers() -> None:
    assert sorted(("sm120", "sm75", "sm86"), key=number) == ["sm75", "sm86", "sm120"]


class _Driver:
    """A driver with one GPU, in which any one call can be made to fail."""

    def __init__(self, failing: str = "") -> None:
        self.failing = failing

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> int:
            if name == self.failing:
                return 100
            if name == "cuDeviceGetName":
                args[0].value = b"Some GPU"
            if name == "cuDeviceGetAttribute":
                args[0]._obj.value = {75: 12, 76: 0}[args[1]]
            return 0

        return call


def test_the_driver_is_asked_for_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: _Driver())
    gpu = this_gpu()
    assert gpu is not None
    assert (gpu.name, gpu.capability) == ("Some GPU", "sm120")


@pytest.mark.parametrize("failing", ["cuInit", "cuDeviceGet", "cuDeviceGetName", "cuDeviceGetAttribute"])
def test_a_driver_that_fails_has_no_gpu(monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: _Driver(failing))
    assert this_gpu() is None


def test_without_a_driver_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_library(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", no_library)
    assert this_gpu() is None
