"""Engines that may be loaded, and those that may not."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from asag_deploy.bundle.bundle import Bundle
from asag_deploy.engines.sidecar import (
    Format,
    check,
    is_current,
    read_sidecar,
)
from asag_deploy.errors import EngineError, EngineMissingError, EngineStaleError, EngineUnfitError
from support.engine_files import CONTENT, VERSION, put, recipe


def checked(bundle: Bundle, capability: str = "sm86", version: str = VERSION, **options: Any) -> Path:
    engine_format: Format = options.pop("engine_format", "tensorrt-rtx")
    found = check(
        bundle, "decoder", engine_format=engine_format, sdk_version=version, capability=capability, **options
    )
    assert found.content == CONTENT
    return found.path


def test_a_fit_engine_is_given_with_its_content(bundle: Bundle) -> None:
    path = put(bundle, recipe(bundle))
    assert checked(bundle) == path


def test_what_is_written_is_read(bundle: Bundle) -> None:
    made = recipe(bundle, optimization_level=3, plugins=("AsagPatchNMS",), device="a GPU")
    path = put(bundle, made)
    assert read_sidecar(path.with_suffix(".json"), "").recipe == made


def test_an_engine_of_its_own_is_preferred_to_a_shared_one(bundle: Bundle) -> None:
    shared = put(bundle, recipe(bundle, capabilities=("sm86", "sm89")))
    assert checked(bundle) == shared
    assert checked(bundle, "sm89") == shared
    own = put(bundle, recipe(bundle))
    assert checked(bundle) == own


def test_there_is_none(bundle: Bundle) -> None:
    again = r"asag-build '.*bundle' --format tensorrt-rtx --gpu sm86`"
    with pytest.raises(EngineMissingError, match=rf"'decoder' for sm86 \(there are: none\); .*{again}"):
        checked(bundle)
    put(bundle, recipe(bundle, capabilities=("sm120",)))
    with pytest.raises(EngineMissingError, match=r"there are: sm120"):
        checked(bundle)


def test_a_sidecar_is_missing(bundle: Bundle) -> None:
    put(bundle, recipe(bundle)).with_suffix(".json").unlink()
    with pytest.raises(EngineMissingError, match=r"there is no '.*decoder.json'; build it with"):
        checked(bundle)


def edit_json(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(path.with_suffix(".json").read_text())
    edit(data)
    path.with_suffix(".json").write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda data: data["recipe"].pop("tf32"), r"in '.*json', `recipe.tf32` is missing; build"),
        (lambda data: data["recipe"].update(tf32=1), r"`recipe.tf32` is 1, expected true or false"),
        (lambda data: data.update(later=1), r"`later` is not a known field"),
        (lambda data: data["recipe"]["inputs"][0].update(least=[1, "x"]), r"`recipe.inputs\[0\].least\[1\]`"),
    ],
)
def test_a_malformed_sidecar_names_the_field(
    bundle: Bundle, edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    edit_json(put(bundle, recipe(bundle)), edit)
    with pytest.raises(EngineStaleError, match=message):
        checked(bundle)


@pytest.mark.parametrize("version", [2, 4])
def test_engines_of_other_releases(bundle: Bundle, version: int) -> None:
    """Said first: their other fields may be missing, or new."""

    def edit(data: dict[str, Any]) -> None:
        data["recipe"]["sidecar_version"] = version
        del data["capturable"]
        data["later"] = 1

    edit_json(put(bundle, recipe(bundle)), edit)
    message = rf"written by another release of asag-deploy \(its version is {version}, .* 3\); build it with"
    with pytest.raises(EngineStaleError, match=message):
        checked(bundle)


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_a_sidecar_that_is_none(bundle: Bundle, text: str) -> None:
    put(bundle, recipe(bundle)).with_suffix(".json").write_text(text)
    with pytest.raises(EngineStaleError, match=r"decoder.json'"):
        checked(bundle)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"graph_sha256": "0" * 64}, "was built from another graph than the bundle's 'decoder'"),
        ({"stage": "backbone"}, "is an engine of the stage 'backbone', not 'decoder'"),
        ({"sdk_version": "1.6.0.1"}, r"was built with tensorrt-rtx 1.6.0.1, but 1.7.1.116 is installed"),
        ({"sdk_version": "1.7.1.115"}, r"1.7.1.115, but 1.7.1.116"),
    ],
)
def test_stale_engines(bundle: Bundle, changes: dict[str, Any], message: str) -> None:
    put(bundle, recipe(bundle, **changes))
    with pytest.raises(EngineStaleError, match=message + ".*; build it with `asag-build"):
        checked(bundle)


def test_damaged_engines(bundle: Bundle) -> None:
    path = put(bundle, recipe(bundle))
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(EngineStaleError, match="is truncated or was altered"):
        checked(bundle)
    path.unlink()
    with pytest.raises(EngineMissingError, match="there are: sm86"):
        checked(bundle)


def test_an_engine_of_another_library_in_the_wrong_folder(bundle: Bundle) -> None:
    path = put(bundle, recipe(bundle, format="tensorrt"))
    path.parent.parent.rename(bundle.path / "engines" / "tensorrt-rtx")
    with pytest.raises(EngineStaleError, match="is an engine of tensorrt, not of tensorrt-rtx"):
        checked(bundle)


def test_engines_for_another_gpu(bundle: Bundle) -> None:
    put(bundle, recipe(bundle, capabilities=("sm120",)), folder="sm86")
    with pytest.raises(EngineUnfitError, match="was built for sm120, but the GPU here is sm86"):
        checked(bundle)


def test_engines_tied_to_a_model_of_gpu(bundle: Bundle) -> None:
    put(bundle, recipe(bundle, format="tensorrt", device="RTX 3090"))
    options: dict[str, Any] = {"engine_format": "tensorrt"}
    checked(bundle, device="RTX 3090", **options)
    checked(bundle, device=None, **options)
    with pytest.raises(EngineUnfitError, match=r"GPU 'RTX 3090', but this one is 'RTX A6000'"):
        checked(bundle, device="RTX A6000", **options)


def test_engines_for_ampere_and_later(bundle: Bundle) -> None:
    put(bundle, recipe(bundle, format="tensorrt", compatibility="ampere_plus"))
    for capability in ("sm86", "sm80", "sm120"):
        checked(bundle, capability, engine_format="tensorrt")
    with pytest.raises(EngineUnfitError, match="the GPU here is sm75"):
        checked(bundle, "sm75", engine_format="tensorrt")


def test_engines_that_later_releases_load(bundle: Bundle) -> None:
    put(bundle, recipe(bundle, format="tensorrt", version_compatible=True, sdk_version="10.9.0.34"))
    for version in ("10.9.0.34", "10.16.1.11"):
        checked(bundle, version=version, engine_format="tensorrt")
    for version in ("10.2.0", "11.0.0.114"):
        with pytest.raises(EngineStaleError, match=r"was built with tensorrt 10.9.0.34"):
            checked(bundle, version=version, engine_format="tensorrt")


def test_shapes_that_an_engine_takes(bundle: Bundle) -> None:
    path = put(bundle, recipe(bundle))
    sidecar = read_sidecar(path.with_suffix(".json"), "")
    sidecar.check_shapes({"p5": (2, 1, 4, 3), "query_slots": (7,), "of no interest": (9,)})
    with pytest.raises(
        EngineUnfitError, match=r"'decoder' takes 'p5' of shapes 1x1x1x3 to 2x4x4x3, got 3x1x4x3"
    ):
        sidecar.check_shapes({"p5": (3, 1, 4, 3)})


def test_current_is_whole_and_by_the_same_recipe(bundle: Bundle) -> None:
    made = recipe(bundle)
    path = put(bundle, made)
    assert is_current(path, made)
    assert not is_current(path, dataclasses.replace(made, producer="asag-deploy 9"))
    assert not is_current(path, dataclasses.replace(made, tf32=True))
    path.write_bytes(b"")
    assert not is_current(path, made)


def test_every_error_is_an_engine_error() -> None:
    assert all(issubclass(e, EngineError) for e in (EngineMissingError, EngineStaleError, EngineUnfitError))
