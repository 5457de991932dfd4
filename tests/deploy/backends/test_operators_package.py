"""An installed package of compiled operators that cannot be used stops nothing; one that is named does."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from asag_deploy import Detections, Detector
from asag_deploy.backends import open_network
from asag_deploy.backends.pieces import StageInPieces
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.errors import BackendError
from asag_deploy.kernels.cpu import CPU_LIBRARY_VARIABLE, LIBRARY_NAME
from asag_deploy.loop.patch_nms import patch_nms
from support.plugin_builds import missing_compiler

OPENVINO = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="needs OpenVINO")
CPU_BACKENDS = ["onnxruntime", pytest.param("openvino", marks=OPENVINO)]
COMPILER = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))


def library_of_another_interface(path: Path) -> None:
    """Compile what the library of an earlier release is to those that ask for its interface."""
    text = (
        'extern "C" { const char* asag_message(int) { return ""; } '
        "int asag_interface_version() { return 7; } }"
    )
    command = ["g++", "-shared", "-fPIC", "-x", "c++", "-o", str(path), "-"]
    subprocess.run(command, input=text, text=True, check=True)


def detect(backend: str, bundle: Bundle) -> Detections:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    with Detector.load(bundle, backend=backend, threads=1) as detector:
        return detector(pixels.repeat(32, axis=0).repeat(32, axis=1))


@COMPILER
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_of_another_release(
    package_of_operators: Path, small_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    """Graphs run whole, find what they find, and it is said once in a process."""
    expected = detect(backend, small_bundle)  # of a package without a library
    library = package_of_operators / LIBRARY_NAME
    library_of_another_interface(library)
    with pytest.warns(RuntimeWarning) as caught:
        found, again = (detect(backend, small_bundle) for _ in range(2))
    (told,) = [str(each.message) for each in caught]
    assert re.fullmatch(
        r"graphs run whole, which is slower: the kernels in .* have interface 7, expected \d+; install the "
        r"operators again with `pip install \./plugins` from the sources of this release, or set "
        r"ASAG_CPU_KERNELS_LIBRARY= \(to nothing\) to run without",
        told,
    )
    network = open_network(backend, small_bundle, threads=1)
    assert not isinstance(network.stage("decoder"), StageInPieces)
    assert network.patch_finder() is patch_nms
    assert len(found) > 5
    for name in ("xyxy", "confidence", "class_id"):
        for each in (found, again):
            assert np.array_equal(getattr(each, name), getattr(expected, name)), name
    monkeypatch.setenv(CPU_LIBRARY_VARIABLE, str(library))  # somebody wants this very one
    with pytest.raises(BackendError, match="have interface 7, expected") as refused:
        open_network(backend, small_bundle, threads=1)
    assert f"unset {CPU_LIBRARY_VARIABLE} and install" in str(refused.value)


def test_that_is_damaged(package_of_operators: Path, small_bundle: Bundle) -> None:
    expected = detect("onnxruntime", small_bundle)
    (package_of_operators / LIBRARY_NAME).write_bytes(b"no library")
    with pytest.warns(
        RuntimeWarning, match=r"graphs run whole, .* cannot be loaded .*; install the operators"
    ):
        found = detect("onnxruntime", small_bundle)
    assert np.array_equal(found.xyxy, expected.xyxy)
