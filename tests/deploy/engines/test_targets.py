"""How GPUs are named."""

from __future__ import annotations

import pytest

from asag_deploy.cuda.driver import Gpu
from asag_deploy.engines.targets import check_supported, number, parse_target, targets, this_gpu
from asag_deploy.errors import BackendError, ConfigError


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


def test_this_gpu_is_the_drivers_first(monkeypatch: pytest.MonkeyPatch) -> None:
    found = tuple(Gpu(name=name, capability="sm86") for name in ("one", "other"))
    monkeypatch.setattr("asag_deploy.engines.targets.find_gpus", lambda: found)
    assert this_gpu() == found[0]


def test_without_a_driver_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> None:
        raise BackendError("no driver")

    monkeypatch.setattr("asag_deploy.engines.targets.find_gpus", none)
    assert this_gpu() is None
