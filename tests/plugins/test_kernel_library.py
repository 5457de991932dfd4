"""What the kernels and their wrapper say of arguments that make no sense, and of libraries that are none."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from asag_deploy import kernels
from asag_deploy.errors import BackendError, ConfigError
from asag_deploy.kernels import Buffer, KernelLibrary, buffer_of, structures
from asag_deploy.kernels.cpu import CPU_LIBRARY_VARIABLE, cpu_kernels, cpu_library_path
from asag_deploy.kernels.library import LIBRARY_VARIABLE, cuda_library_path
from asag_deploy.kernels.limits import LARGEST_PATCH, MOST_ANCHORS, MOST_DETECTIONS, MOST_FIRST_ANCHORS
from support.plugin_builds import PLUGINS


@pytest.fixture
def library(host_library_path: Path) -> KernelLibrary:
    return KernelLibrary(host_library_path, "host")


def pyramid(**changes: Any) -> structures.Pyramid:
    sides = (ctypes.c_int32 * 4)(8, 4, 2, 1)
    strides = (ctypes.c_int32 * 4)(4, 8, 16, 32)
    made = structures.Pyramid((ctypes.c_void_p * 4)(), sides, sides, strides, 4, 1, 8, structures.FLOAT32)
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def roi(queries: int = 1, **changes: Any) -> structures.MultiscaleRoIAlign:
    return structures.MultiscaleRoIAlign(pyramid(**changes), None, None, queries)


def sample(queries: int = 1, groups: int = 2, points: int = 3) -> structures.PyramidSample:
    return structures.PyramidSample(pyramid(), None, None, None, queries, groups, points)


def deformable(
    queries: int = 1, groups: int = 2, points: int = 3, **changes: Any
) -> structures.DeformableSample:
    return structures.DeformableSample(pyramid(**changes), None, None, None, queries, groups, points)


def image(**changes: Any) -> structures.Preprocess:
    made = structures.Preprocess(None, None, 80, 60, 40, 30, 64, 32, structures.FLOAT32)
    made.deviation[:] = (1, 1, 1)
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def nms(**changes: Any) -> structures.PatchNMS:
    made = structures.PatchNMS(None, None, None, None, None, 0, 1, 100, 16, 15, 8, 50, 0.25)
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def pad(**changes: Any) -> structures.PadAnchors:
    made = structures.PadAnchors(None, None, None, None, None, 0, 1, 100, 16, 50, 5, 20)
    for name, value in changes.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize(
    ("operator", "arguments", "message"),
    [
        ("multiscale_roi_align", roi(), "maps[0] is a null pointer; pass the address of the tensor"),
        ("multiscale_roi_align", roi(queries=-1), "queries is -1, expected 0 to 16777216"),
        ("multiscale_roi_align", roi(type=7), "type is 7, expected 0 (float32) or 1 (float16)"),
        ("multiscale_roi_align", roi(levels=5), "levels is 5, expected 1 to 4"),
        ("multiscale_roi_align", roi(channels=0), "channels is 0, expected 1 to 65536"),
        ("multiscale_roi_align", roi(batch=-2), "batch is -2, expected 0 to 65535"),
        (
            "multiscale_roi_align",
            roi(strides=(ctypes.c_int32 * 4)(4, 8, 12, 32)),
            "strides[2] is 12, expected 16: each level has twice the stride of the one before",
        ),
        (
            "multiscale_roi_align",
            roi(widths=(ctypes.c_int32 * 4)(4, 8, 12, 40000)),
            "widths[3] is 40000, expected 1 to 32768",
        ),
        ("multiscale_roi_align", roi(queries=16000000, batch=60000), "batch x queries is 960000000000"),
        ("pyramid_sample", sample(groups=3), "groups is 3, expected a divisor of the 8 channels"),
        ("pyramid_sample", sample(groups=0), "groups is 0, expected 1 to 8"),
        ("pyramid_sample", sample(points=-1), "points is -1, expected 0 to 65536"),
        ("pyramid_sample", sample(), "maps[0] is a null pointer"),
        ("deformable_sample", deformable(groups=3), "groups is 3, expected a divisor of the 8 channels"),
        ("deformable_sample", deformable(groups=0), "groups is 0, expected 1 to 8"),
        ("deformable_sample", deformable(points=65), "points is 65, expected 0 to 64"),
        ("deformable_sample", deformable(levels=5), "levels is 5, expected 1 to 4"),
        (
            "deformable_sample",
            deformable(queries=16000000, batch=60000),
            "batch x queries x channels / 128 is 60000000000, expected 0 to 2147483647",
        ),
        ("deformable_sample", deformable(), "maps[0] is a null pointer"),
        ("patch_nms", nms(), "image_size is a null pointer"),
        ("patch_nms", nms(iou_threshold=1.5), "iou_threshold is 1.5, expected 0 to 1"),
        ("patch_nms", nms(iou_threshold=float("nan")), "iou_threshold is nan, expected 0 to 1"),
        ("patch_nms", nms(capacity=-1), "capacity is -1"),
        ("patch_nms", nms(patch_size=0), "patch_size is 0, expected 1 to 1024"),
        (
            "patch_nms",
            nms(anchor_count=9999, max_candidates=5000),
            "max_candidates is 5000 with 9999 anchors",
        ),
        ("pad_anchors", pad(), "image_size is a null pointer"),
        ("pad_anchors", pad(cap=4000), "cap is 4000, expected 0 to 2048"),
        ("pad_anchors", pad(slots=-1), "slots is -1"),
        (
            "postprocess",
            structures.Postprocess(None, None, None, None, None, None, None, None, 0, 1, 10, 0.7),
            "original_shape is a null pointer",
        ),
        (
            "postprocess",
            structures.Postprocess(None, None, None, None, None, None, None, None, 0, 1, 10, 1.7),
            "nms_iou is 1.7, expected 0 to 1, or a negative number for none",
        ),
        ("preprocess", image(), "image is a null pointer"),
        ("preprocess", image(type=3), "type is 3, expected 0 (float32) or 1 (float16)"),
        ("preprocess", image(new_width=33), "new_width is 33, expected 1 to 32"),
        (
            "preprocess",
            image(height=20),
            "an image of 20 x 60 to become 40 x 30 would grow one way and shrink",
        ),
        (
            "preprocess",
            image(deviation=(ctypes.c_float * 3)(1, 0, 1)),
            "deviation[1] is 0, expected a positive",
        ),
        ("pad_anchors", pad(first_level=-1), "first_level is -1, expected 0 to 16384"),
    ],
)
def test_a_kernel_refuses(
    library: KernelLibrary, operator: str, arguments: ctypes.Structure, message: str
) -> None:
    with pytest.raises(BackendError) as refusal:
        library.run(operator, arguments)
    assert message in str(refusal.value)
    assert str(refusal.value).startswith(f"the kernel {operator} failed: ")


def postprocess(detections: int) -> structures.Postprocess:
    return structures.Postprocess(None, None, None, None, None, None, None, None, 0, 1, detections, 0.7)


@pytest.mark.parametrize(
    ("operator", "arguments", "most", "name"),
    [
        ("pad_anchors", lambda most: pad(cap=most), MOST_ANCHORS, "cap"),
        ("pad_anchors", lambda most: pad(floor=most), MOST_ANCHORS, "floor"),
        ("pad_anchors", lambda most: pad(first_level=most), MOST_FIRST_ANCHORS, "first_level"),
        ("postprocess", postprocess, MOST_DETECTIONS, "detections"),
        ("patch_nms", lambda most: nms(patch_size=most), LARGEST_PATCH, "patch_size"),
        ("deformable_sample", lambda most: deformable(points=most), structures.MOST_POINTS, "points"),
    ],
)
def test_the_limits_of_settings_are_those_of_the_kernels(
    library: KernelLibrary,
    operator: str,
    arguments: Callable[[int], ctypes.Structure],
    most: int,
    name: str,
) -> None:
    with pytest.raises(BackendError, match=f"{name} is {most + 1}, expected [01] to {most}$"):
        library.run(operator, arguments(most + 1))
    with pytest.raises(BackendError, match="is a null pointer"):  # which is looked for last
        library.run(operator, arguments(most))


def test_nothing_to_do_needs_no_memory(library: KernelLibrary) -> None:
    for operator, arguments in {
        "multiscale_roi_align": roi(queries=0),
        "pyramid_sample": sample(points=0),
        "deformable_sample": deformable(queries=0),
        "patch_nms": nms(batch=0),
        "pad_anchors": pad(batch=0),
    }.items():
        library.run(operator, arguments)


def test_numbers_that_the_library_has_no_room_for(host_library_path: Path) -> None:
    """They are refused as they are, not without their upper bits."""
    with pytest.raises(BackendError, match=f"the kernels were given threads {2**40}; expected -2147483648"):
        KernelLibrary(host_library_path, "host", threads=2**40)
    with pytest.raises(BackendError, match=f"the kernels were given queries {2**32 + 1}; expected"):
        structures.MultiscaleRoIAlign(queries=2**32 + 1)
    with pytest.raises(BackendError, match=f"the kernels were given strides {2**32 + 4}; expected"):
        structures.per_level("strides", (2**32 + 4, 8))
    assert structures.MultiscaleRoIAlign(queries=2**31 - 1).queries == 2**31 - 1


def test_block_of_no_threads(host_library_path: Path) -> None:
    with pytest.raises(BackendError, match="threads is 0, expected 1 to 512"):
        KernelLibrary(host_library_path, "host", threads=0).run("patch_nms", nms(batch=0))


def test_libraries_that_are_none(host_library_path: Path, tmp_path: Path) -> None:
    (tmp_path / "text.so").write_text("no library")
    for named in (tmp_path / "text.so", "libasag_kernels_of_nobody.so"):
        with pytest.raises(BackendError, match=r"cannot be loaded .*; build them as plugins/README.md says"):
            KernelLibrary(named, "host")
    for missing in (tmp_path / "none.so", tmp_path):
        with pytest.raises(BackendError, match=rf"library {missing} is no file; give its path, or build"):
            KernelLibrary(missing, "cuda")
    with pytest.raises(BackendError, match="is not the cuda library of the kernels: it has no asag_cuda_"):
        KernelLibrary(host_library_path, "cuda")


@pytest.mark.parametrize("kept", [40, 100, 60_000])
def test_a_library_that_is_not_whole(host_library_path: Path, tmp_path: Path, kept: int) -> None:
    """The system's loader would end the process by SIGBUS where it maps what is not there."""
    short = tmp_path / "short.so"
    short.write_bytes(host_library_path.read_bytes()[:kept])
    with pytest.raises(BackendError, match=r"short\.so cannot be loaded \(.*(not whole|too short)\); build"):
        KernelLibrary(short, "host")


def test_library_named_by_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ASAG_KERNELS_LIBRARY", raising=False)
    assert cuda_library_path() is None
    monkeypatch.setenv("ASAG_KERNELS_LIBRARY", str(tmp_path / "none.so"))
    with pytest.raises(BackendError, match=r"which is no file; set it to libasag_kernels\.so"):
        cuda_library_path()
    (tmp_path / "none.so").touch()
    assert cuda_library_path() == tmp_path / "none.so"


def refused(call: Callable[[], None], message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        call()
    assert message in str(refusal.value)


def test_arrays_that_do_not_fit(library: KernelLibrary) -> None:
    maps = [np.zeros((1, side, side, 8), np.float32) for side in (8, 4)]
    boxes = np.zeros((1, 3, 4), np.float32)
    out = np.zeros((1, 3, 7, 7, 8), np.float32)

    def align(maps: list[Any] = maps, boxes: Any = boxes, out: Any = out, strides: Any = (4, 8)) -> None:
        kernels.multiscale_roi_align(library, maps, boxes, out, strides=strides)

    align()
    refused(lambda: align(strides=(4,)), "expected 1 to 4 feature maps with a stride each, got 2 maps and 1")
    refused(lambda: align(boxes=boxes[..., :3].copy()), "expected boxes of shape (1, any, 4), got (1, 3, 3)")
    refused(lambda: align(boxes=boxes.astype(np.float64)), "expected boxes of type float32, got float64")
    refused(
        lambda: align(out=out[:, :2].copy()), "expected out of shape (1, 3, 7, 7, 8), got (1, 2, 7, 7, 8)"
    )
    refused(lambda: align(out=out.astype(np.float16)), "expected out of type float32, got float16")
    refused(lambda: align(boxes=np.asfortranarray(boxes)), "is not contiguous; pass a contiguous copy")
    refused(
        lambda: align(boxes=[1, 2]), "expected a NumPy array or one with __cuda_array_interface__, got list"
    )
    refused(lambda: align([maps[0], maps[1].astype(np.float16)]), "expected features[1] of type float32")
    refused(lambda: align(boxes=DeviceArray((1, 3, 4))), "expected boxes in the memory of the host")

    xy, weight = np.zeros((1, 2, 3, 4, 2), np.float32), np.zeros((1, 2, 3, 4, 2), np.float32)
    points_out: NDArray[Any] = np.zeros((1, 2, 3, 4, 2), np.float32)
    refused(
        lambda: kernels.pyramid_sample(library, maps, xy, weight, points_out, strides=(4, 8)),
        "expected a number of groups that divides 8 channels, got 3",
    )
    places, shares = np.zeros((1, 3, 2, 2, 4, 2), np.float32), np.zeros((1, 3, 2, 2, 4), np.float32)
    summed = np.zeros((1, 3, 8), np.float32)

    def deform(maps: list[Any] = maps, xy: Any = places, weight: Any = shares, out: Any = summed) -> None:
        kernels.deformable_sample(library, maps, xy, weight, out)

    deform()
    refused(lambda: deform(maps[:1]), "expected xy of shape (1, any, any, 1, any, 2), got (1, 3, 2, 2, 4, 2)")
    refused(lambda: deform([]), "expected 1 to 4 feature maps, got 0")
    refused(lambda: deform(weight=weight), "expected weight of shape (1, 3, 2, 2, 4), got (1, 2, 3, 4, 2)")
    refused(lambda: deform(out=out), "expected out of shape (1, 3, 8), got (1, 3, 7, 7, 8)")
    three = [np.repeat(each, 2, axis=2)[:, :, :3].copy() for each in (places, shares)]
    refused(lambda: deform(maps, *three), "expected a number of groups that divides 8 channels, got 3")


def test_patch_nms_writes_into_the_counts_of_a_stage(library: KernelLibrary) -> None:
    given = (np.zeros((2, 3, 5), np.float32), np.zeros((2, 3), np.bool_), np.zeros((2, 2), np.int64))

    def select(counts: Any) -> None:
        origins = np.zeros((2, 8, 2), np.int64)
        settings = {"stride": 16, "patch_size": 15, "max_candidates": 2048}
        kernels.patch_nms(library, *given, origins, counts, iou_threshold=0.25, **settings)

    select(np.zeros((2, 4), np.int64))
    refused(lambda: select(np.zeros(2, np.int64)), "expected counts of shape (2, 4), got (2,)")
    refused(lambda: select(np.zeros((2, 4), np.int32)), "expected counts of type int64, got int32")


class DeviceArray:
    """What a GPU library's array says about itself."""

    def __init__(self, shape: tuple[int, ...], strides: tuple[int, ...] | None = None) -> None:
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": "<f4",
            "data": (4096, False),
            "strides": strides,
            "version": 3,
        }


def test_arrays_of_a_gpu_library() -> None:
    buffer = buffer_of(DeviceArray((2, 3)))
    assert (buffer.pointer, buffer.shape, buffer.on_device) == (4096, (2, 3), True)
    assert buffer.dtype == np.float32
    assert buffer_of(buffer) is buffer
    assert buffer_of(DeviceArray((2, 3), (12, 4))).shape == (2, 3)
    assert buffer_of(DeviceArray((1, 3), (99, 4))).shape == (1, 3)
    refused(
        lambda: check(buffer_of(DeviceArray((2, 3), (24, 4)))), "the GPU array of shape (2, 3) is not contig"
    )


def check(buffer: Buffer) -> None:
    assert buffer.shape


def test_structures_are_those_of_the_header() -> None:
    header = (PLUGINS / "include" / "asag" / "asag_kernels.h").read_text(encoding="utf-8")
    names = {
        "AsagPyramid": structures.Pyramid,
        "AsagMultiscaleRoIAlign": structures.MultiscaleRoIAlign,
        "AsagPyramidSample": structures.PyramidSample,
        "AsagDeformableSample": structures.DeformableSample,
        "AsagPatchNMS": structures.PatchNMS,
        "AsagPadAnchors": structures.PadAnchors,
        "AsagPreprocess": structures.Preprocess,
        "AsagPostprocess": structures.Postprocess,
        "AsagDecide": structures.Decide,
        "AsagHostBlock": structures.HostBlock,
        "AsagAdaptiveMixing": structures.AdaptiveMixing,
    }
    for name, structure in names.items():
        body = header.partition(f"typedef struct {name} {{")[2].partition("}")[0]
        statements = [line.partition("/*")[0].strip() for line in body.splitlines()]
        declared = [line.rstrip(";").split("[")[0].split()[-1].lstrip("*") for line in statements if line]
        assert declared == [field[0] for field in structure._fields_], name
    assert f"#define ASAG_INTERFACE_VERSION {structures.INTERFACE_VERSION}\n" in header
    assert f"#define ASAG_MAX_LEVELS {structures.MAX_LEVELS}\n" in header


def test_a_library_of_an_earlier_release_is_called_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lacks what came later, but that is not what is wrong with it."""
    earlier = SimpleNamespace(asag_message=lambda status: b"", asag_interface_version=lambda: 3)
    monkeypatch.setattr(ctypes, "CDLL", lambda path: earlier)
    with pytest.raises(BackendError, match=r"have interface 3, expected \d+; build them again from the"):
        KernelLibrary(tmp_path / "libasag_kernels.so", "cuda")


@pytest.mark.parametrize("given", ["./kernels.so", "here/kernels.so"])
def test_relative_paths_are_paths(
    given: str, host_library_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / given
    file.parent.mkdir(exist_ok=True)
    with pytest.raises(BackendError, match=r"kernels\.so is no file"):
        KernelLibrary(given, "host")
    shutil.copy(host_library_path, file)
    assert KernelLibrary(given, "host").path == file


def test_variables_name_relative_paths(
    host_library_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(host_library_path, "mine.so")
    monkeypatch.setenv(CPU_LIBRARY_VARIABLE, "mine.so")
    monkeypatch.setenv(LIBRARY_VARIABLE, "mine.so")
    assert cpu_library_path() == cuda_library_path() == tmp_path / "mine.so"
    assert cpu_kernels() is not None
