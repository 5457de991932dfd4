"""Canvases: which there are, which a picture goes on, and engines of exactly these shapes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from asag_deploy.bundle.bundle import Bundle
from asag_deploy.bundle.manifest import Preprocessing, ProbeLevel
from asag_deploy.engines import BuildOptions, build_engines, canvas_engines, check
from asag_deploy.engines.cli import main
from asag_deploy.engines.shapes import Batches, fixed_slots
from asag_deploy.engines.sidecar import built_canvases
from asag_deploy.errors import ConfigError, EngineMissingError, EngineStaleError
from asag_deploy.processing.canvases import (
    Canvas,
    check_canvas,
    default_canvases,
    in_order,
    parse_canvas,
    smallest_holding,
)
from asag_deploy.processing.preprocess import padded_shape, resized_shape
from support.recorded_tensorrt import RTX, RecordedModule

USUAL = Preprocessing()
SMALL = Preprocessing(shorter_side=64, longer_side=128)  # that of the bundle
Install = Callable[[str], RecordedModule]


@pytest.fixture
def rtx(install: Install, no_gpu: None) -> RecordedModule:
    return install(RTX)


def names(canvases: tuple[Canvas, ...]) -> str:
    return " ".join(map(str, canvases))


def test_canvases_follow_from_the_sizes_of_pictures() -> None:
    expected = "800x800 800x1088 1088x800 800x1216 1216x800 800x1344 1344x800"
    assert names(default_canvases(USUAL)) == expected
    assert names(default_canvases(Preprocessing(shorter_side=320, longer_side=320))) == "320x320"
    expected = "160x160 160x224 224x160 160x256 256x160 160x320 320x160"
    assert names(default_canvases(Preprocessing(shorter_side=160, longer_side=320))) == expected
    expected = "480x480 480x640 640x480 480x720 720x480 480x800 800x480"
    odd = Preprocessing(shorter_side=480, longer_side=800, size_divisor=16)
    assert names(default_canvases(odd)) == expected


@pytest.mark.parametrize(
    "spec", [USUAL, SMALL, Preprocessing(shorter_side=333, longer_side=500), Preprocessing(longer_side=800)]
)
def test_every_picture_fits_on_a_default_canvas(spec: Preprocessing) -> None:
    canvases = default_canvases(spec)
    for canvas in canvases:
        check_canvas(canvas, spec)
    for width in range(1, 4000, 37):
        size = resized_shape(480, width, spec)
        if max(size) > spec.longer_side:
            continue  # of very narrow ones, rounding the shorter side makes the longer one too long
        held_by = smallest_holding(canvases, *size)
        assert held_by is not None
        assert held_by.holds(*size)


def test_the_smallest_canvas_that_holds_a_batch() -> None:
    canvases = default_canvases(USUAL)
    cases: dict[tuple[tuple[int, int], ...], tuple[int, int]] = {
        ((800, 1066),): (800, 1088),
        ((1066, 800),): (1088, 800),
        ((800, 1089),): (800, 1216),
        ((749, 1333),): (800, 1344),
        ((800, 800), (790, 900)): (800, 1088),
        ((800, 1066), (1066, 800)): (1088, 1088),  # no canvas holds both
    }
    for sizes, expected in cases.items():
        assert padded_shape(np.array(sizes), USUAL, canvases) == expected
        # In whatever order they were given.
        assert padded_shape(np.array(sizes), USUAL, canvases[::-1]) == expected
    assert padded_shape(np.array([(749, 1333)]), USUAL) == (768, 1344)
    assert smallest_holding((), 1, 1) is None


@pytest.mark.parametrize(
    "text", ["", "800", "800x", "800*1088", "0x32", "-32x32", "8.5x32", "800x1088x3", "ax"]
)
def test_what_is_no_canvas(text: str) -> None:
    with pytest.raises(ConfigError, match=r"unknown canvas '.*'; give height and width .* such as 800x1088"):
        parse_canvas(text)


def test_a_canvas_is_read_as_it_is_written() -> None:
    assert parse_canvas(" 800X1088 ") == Canvas(800, 1088)
    assert str(Canvas(800, 1088)) == "800x1088"
    assert in_order([Canvas(2, 1), Canvas(1, 1), Canvas(1, 2), Canvas(2, 1)]) == (
        Canvas(1, 1),
        Canvas(1, 2),
        Canvas(2, 1),
    )


@pytest.mark.parametrize(
    ("canvas", "message"),
    [
        ("800x1080", "the canvas 800x1080 is no multiple of 32 pixels; use 800x1088"),
        ("800x1376", "the canvas 800x1376 is larger than any picture, .* 1333 pixels at most; .* up to 1344"),
        ("768x1088", "no picture fits on the canvas 768x1088, .* to 800 pixels unless .* such as 800x800, "),
    ],
)
def test_canvases_of_no_use(canvas: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_canvas(parse_canvas(canvas), USUAL)


def test_a_narrow_canvas_holds_the_longest_pictures() -> None:
    check_canvas(Canvas(224, 1344), USUAL)


def test_an_engine_of_one_shape_has_the_room_that_the_loop_asks_for() -> None:
    """Whatever the stop rule allows: a level that is to be probed less has slots to spare."""
    slots = [
        fixed_slots(ProbeLevel(level="P4", stride=16, capacity=capacity, anchors_per_patch=4))
        for capacity in (5, 16, 20, 31, 300)
    ]
    assert slots == [5, 16, 20, 31, 32]


def shapes_set(rtx: RecordedModule) -> list[tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    calls = rtx.called("IOptimizationProfile.set_shape")
    return [(call["input"], call["min"], call["opt"], call["max"]) for call in calls]


def test_engines_of_exactly_these_shapes(bundle: Bundle, rtx: RecordedModule) -> None:
    options = BuildOptions(gpus=("sm86",), canvases=(Canvas(64, 96),), batches=Batches(most=8))
    report = build_engines(bundle, options)
    built = [str(path.relative_to(bundle.path / "engines/tensorrt-rtx/sm86")) for path in report.built]
    dynamic = ["normalize.engine", "backbone.engine", "decoder.engine"]
    assert built == [*dynamic, "64x96/backbone.engine", "64x96/decoder.engine"]
    fixed = shapes_set(rtx)[-4:]
    assert [name for name, *_ in fixed] == ["image", "image_size", "p5", "query_slots"]
    assert all(least == usual == most for _, least, usual, most in fixed)
    cap = bundle.manifest.probing.anchor_cap
    assert [most for *_, most in fixed] == [(1, 3, 64, 96), (1, 2), (1, 2, 3, 3), (cap,)]
    recipe = json.loads(report.built[-1].with_suffix(".json").read_text())["recipe"]
    assert recipe["canvas"] == {"height": 64, "width": 96}
    again = build_engines(bundle, dataclasses.replace(options, batches=Batches()))
    assert len(again.built) == 3  # those that take every shape: one of one image does not depend on batches
    assert len(again.current) == 2


def found(bundle: Bundle, rtx: RecordedModule, capability: str = "sm86") -> dict[str, list[str]]:
    engines = canvas_engines(
        bundle, engine_format="tensorrt-rtx", sdk_version=rtx.__version__, capability=capability
    )
    return {str(c): [engine.sidecar.recipe.stage for engine in of] for c, of in engines.items()}


def test_they_are_found_the_smallest_first(bundle: Bundle, rtx: RecordedModule) -> None:
    assert found(bundle, rtx) == {}
    build_engines(bundle, BuildOptions(gpus=("sm86", "sm89"), canvases=(Canvas(96, 64),)))
    build_engines(bundle, BuildOptions(gpus=("sm86",), canvases=(Canvas(64, 64),)))
    assert found(bundle, rtx) == {"64x64": ["backbone", "decoder"], "96x64": ["backbone", "decoder"]}
    assert found(bundle, rtx, "sm89") == {"96x64": ["backbone", "decoder"]}
    plain = check(
        bundle, "backbone", engine_format="tensorrt-rtx", sdk_version=rtx.__version__, capability="sm86"
    )
    assert plain.sidecar.recipe.canvas is None


def test_those_of_another_gpu_are_of_no_use(bundle: Bundle, rtx: RecordedModule) -> None:
    build_engines(bundle, BuildOptions(gpus=("sm86",)))
    build_engines(bundle, BuildOptions(gpus=("sm86", "sm89"), shared=True, canvases=(Canvas(64, 64),)))
    assert built_canvases(bundle, "tensorrt-rtx", "sm86") == ()
    assert built_canvases(bundle, "tensorrt-rtx", "sm89") == (Canvas(64, 64),)
    assert built_canvases(bundle, "tensorrt-rtx", "sm75") == ()


def test_what_is_wrong_with_one_is_said_with_its_canvas(bundle: Bundle, rtx: RecordedModule) -> None:
    build_engines(bundle, BuildOptions(gpus=("sm86",), canvases=(Canvas(64, 96), Canvas(96, 64))))
    folder = bundle.path / "engines" / "tensorrt-rtx" / "sm86"
    (folder / "96x64" / "decoder.engine").unlink()
    again = r"build it with `asag-build .* --gpu sm86 --canvas 96x64`, or delete the folder '96x64'"
    with pytest.raises(EngineMissingError, match=rf"'decoder' for sm86 on the canvas 96x64 .*; {again}"):
        found(bundle, rtx)
    for suffix in ("engine", "json"):
        content = (folder / "64x96" / f"decoder.{suffix}").read_bytes()
        (folder / "96x64" / f"decoder.{suffix}").write_bytes(content)
    with pytest.raises(EngineStaleError, match=r"is an engine for 64x96, not for 96x64; build it"):
        found(bundle, rtx)


def run(bundle: Bundle, *options: str) -> int:
    return main([str(bundle.path), "--gpu", "sm86", *options])


def test_from_the_command_line(
    bundle: Bundle, rtx: RecordedModule, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(bundle, "--canvas", "128x128", "--canvas", "64x64", "--canvases", "default") == 0
    assert [str(canvas) for canvas in built_canvases(bundle, "tensorrt-rtx", "sm86")] == [
        *("64x64", "64x96", "96x64", "64x128", "128x64", "128x128"),
    ]
    out = capsys.readouterr().out
    assert out.startswith("built 15 engines")
    assert str(bundle.path / "engines" / "tensorrt-rtx" / "sm86" / "64x96") in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--canvas", "64"), "unknown canvas '64'; give height and width in pixels"),
        (("--canvas", "64x90"), "the canvas 64x90 is no multiple of 32 pixels; use 64x96"),
        (("--canvas", "32x96"), "no picture fits on the canvas 32x96"),
        (("--canvas", "64x160"), "is larger than any picture"),
        (("--canvases", "many"), "argument --canvases: invalid choice: 'many'"),
    ],
)
def test_one_sentence(
    bundle: Bundle,
    rtx: RecordedModule,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    message: str,
) -> None:
    assert run(bundle, *options) == 2
    err: Any = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not (bundle.path / "engines").exists()
