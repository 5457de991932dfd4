"""The kernels' steps under AddressSanitizer and UndefinedBehaviorSanitizer, on inputs good and wild.

A kernel that reads or writes beyond a tensor or its shared memory, overflows an index, or turns a number that
does not fit into an integer does so on the CPU as on the GPU; here that ends the program.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.plugin_builds import build_host_library, missing_compiler, run

ROOT = Path(__file__).parent.parent.parent

PROGRAM = """
import sys
import numpy as np
from support import naive_operators as naive
from asag_deploy import kernels
from asag_deploy.kernels.buffers import BFLOAT16, ScaledIntegers
from asag_deploy.kernels.cpu import CpuKernels

cpu = CpuKernels(sys.argv[1])
library = kernels.KernelLibrary(sys.argv[1], "host", threads=48, seed=5)


def call(operator, *arrays, **options):
    operator(library, *arrays, **options)


wild = np.array([np.nan, np.inf, -np.inf, 3e38, -3e38, 1e9, -1e9, 0.0, 1e-40], dtype=np.float32)
rng = np.random.default_rng(0)
for height, width in [(203, 317), (7, 5), (33, 500)]:
    for channels, dtype in [(5, np.float32), (8, np.float32), (3, np.float16), (16, np.float16)]:
        features = [f.astype(dtype) for f in naive.pyramid(0, height, width, channels=channels)]
        boxes = naive.roi_boxes(1, height, width)
        boxes[1, :9] = rng.choice(wild, (9, 4))
        out = np.empty((*boxes.shape[:2], 7, 7, channels), dtype)
        call(kernels.multiscale_roi_align, features, boxes, out, strides=naive.STRIDES)
        xy, weight = naive.sample_points(2, height, width, groups=1)
        xy[1, :9] = rng.choice(wild, xy[1, :9].shape)
        out = np.empty((*xy.shape[:4], channels), dtype)
        call(kernels.pyramid_sample, features, xy, weight, out, strides=naive.STRIDES)
        places, shares = naive.deformable_points(3, features, groups=1)
        places[1, 5:] = rng.choice(wild, places[1, 5:].shape)
        out = np.empty((*places.shape[:2], channels), dtype)
        call(kernels.deformable_sample, features, places, shares, out)
        bits = [feature.astype(np.float32).view(np.uint32) for feature in features]
        narrow = [(each >> 16).astype(np.uint16).view(BFLOAT16) for each in bits]
        for maps in (features, narrow):
            how = dict(strides=naive.STRIDES, out=maps[0].dtype, threads=3)
            cpu.multiscale_roi_align(maps, boxes, **how)
            cpu.pyramid_sample(maps, xy, weight, **how)
            cpu.deformable_sample(maps, places, shares, out=maps[0].dtype, threads=3)
            integers = ScaledIntegers(values=maps[1].view(np.int8)[..., :channels].copy(), scale=0.1)
            cpu.multiscale_roi_align([maps[0], integers, *maps[2:]], boxes, **how)
            cpu.pyramid_sample([maps[0], integers, *maps[2:]], xy, weight, **how)
            mixed = [maps[0], integers, *maps[2:]]
            cpu.deformable_sample(mixed, places, shares, out=maps[0].dtype, threads=3)

for sizes in [(2, 3, 2, 5, 6, 7), (1, 2, 4, 16, 32, 32), (1, 1, 3, 1, 50, 1)]:
    sampled, parameters, out_points = naive.mixing_inputs(0, *sizes)
    how = dict(out_points=out_points, threads=2, out=np.dtype(np.float32))
    for number, activation in enumerate(("gelu", "relu")):
        found = cpu.adaptive_mixing(sampled, parameters, activation=number, **how)
        expected = naive.adaptive_mixing(sampled, parameters, out_points, activation)
        np.testing.assert_allclose(found, expected, rtol=0, atol=5e-5)
    sampled[:, 0, 0] = rng.choice(wild, sampled[:, 0, 0].shape)
    parameters[:, -1, :9] = rng.choice(wild, parameters[:, -1, :9].shape)
    given = [(sampled, parameters)]
    given += [tuple((x.view(np.uint32) >> 16).astype(np.uint16).view(BFLOAT16) for x in given[0])]
    for arrays in given:
        for activation in (0, 1):
            how = dict(out_points=out_points, activation=activation, threads=3, out=arrays[0].dtype)
            cpu.adaptive_mixing(*arrays, **how)

for count, k in [(1, 1), (9, 9), (500, 7)]:
    cpu.top_k(rng.choice(wild, (3, count)), k)

for settings in (naive.NmsSettings(), naive.NmsSettings(stride=8, capacity=3, max_candidates=10)):
    options = settings._asdict()
    capacity = options.pop("capacity")
    for _, anchors, selected, image_size in naive.nms_inputs(settings):
        outputs = np.empty((len(anchors), capacity, 2), np.int64), np.empty((len(anchors), 4), np.int64)
        call(kernels.patch_nms, anchors, selected, image_size, *outputs, **options)
        cpu.patch_nms(anchors, selected, image_size, capacity=capacity, **options)
        anchors[:, ::3] = rng.choice(wild, anchors[:, ::3].shape)
        call(kernels.patch_nms, anchors, selected, image_size, *outputs, **options)
        cpu.patch_nms(anchors, selected, image_size, capacity=capacity, **options)

for settings in (naive.PadSettings(), naive.PadSettings(10, 9, 4), naive.PadSettings(900, 300, 2000)):
    for _, anchors, keep, image_size, slots in naive.pad_inputs(settings._replace(first_level=20)):
        outputs = np.empty((len(anchors), slots, 4), np.float32), np.empty(len(anchors), np.int64)
        call(kernels.pad_anchors, anchors, keep, image_size, *outputs, **settings._asdict())
        cpu.pad_anchors(anchors, keep, image_size, slots, **settings._asdict())
        anchors[:, ::3] = rng.choice(wild, anchors[:, ::3].shape)
        call(kernels.pad_anchors, anchors, keep, image_size, *outputs, **settings._asdict())
        cpu.pad_anchors(anchors, keep, image_size, slots, **settings._asdict())

sides = [((9, 7), (90, 64)), ((9, 7), (4, 3)), ((8, 6), (4, 3)), ((1, 50), (1, 9)), ((1, 1), (5, 5))]
for shape, new_shape in sides:
    image = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
    for slot in (new_shape, (96, 64), (97, 65)):
        call(kernels.preprocess, image, np.empty((*slot, 3), np.uint8), new_shape=new_shape)
        call(kernels.preprocess, image, np.empty((3, *slot), np.float16), new_shape=new_shape)

scores, boxes = np.ones((2, 70), np.float32), rng.choice(wild, (2, 70, 4))
labels, sizes = np.zeros((2, 70), np.int64), np.full((2, 2), 500)
outputs = (np.empty((2, 70, 4), np.float32), np.empty((2, 70), np.float32), np.empty((2, 70), np.int64))
call(kernels.postprocess, scores, labels, boxes, sizes, *outputs, np.empty(2, np.int64), nms_iou=0.5)
print("done")
"""


@pytest.mark.slow
def test_kernels_under_sanitizers(build_dir: Path) -> None:
    missing = missing_compiler()
    if missing is not None:
        pytest.skip(missing)
    sanitizers = [run(["g++", f"-print-file-name=lib{name}.so"]).strip() for name in ("asan", "ubsan")]
    if not all(Path(sanitizer).is_absolute() for sanitizer in sanitizers):
        pytest.skip("needs g++'s sanitizers (libasan and libubsan), which are not installed")
    library = build_host_library(build_dir, sanitized=True)
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(sanitizers),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONMALLOC": "malloc",  # Python's own pools would hide what lies beyond an array
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, str(library)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr[-4000:]
