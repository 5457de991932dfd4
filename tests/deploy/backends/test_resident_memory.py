"""How much memory a network keeps in RAM, its weights above all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from asag_deploy.backends import BACKENDS, open_network
from asag_deploy.backends.compiled_cache import CompiledCache
from asag_deploy.backends.resident_memory import MappedFile
from asag_deploy.bundle.bundle import Bundle
from support.bundle_edits import edit_graph
from support.tiny_bundle import make_bundle

WIDTH = 4096
WEIGHTS = WIDTH * WIDTH * 4
"""Bytes, 64 MiB."""
PROGRAM = """
import json, sys
from asag_deploy.backends import open_network
from asag_deploy.bundle.bundle import Bundle
from support.tiny_bundle import counts

def resident():
    lines = (line.split() for line in open("/proc/self/status"))
    return next(int(line[1]) * 1024 for line in lines if line[0] == "VmRSS:")

backend, light, heavy = sys.argv[1:]
assert counts(open_network(backend, Bundle.open(light), threads=1), 3) == [3, 0, 20, 17]
before = resident()
network = open_network(backend, Bundle.open(heavy), threads=1)
loaded = resident()
assert counts(network, 3) == [3, 0, 20, 17]
print(json.dumps([loaded - before, resident() - before]))
"""


@pytest.fixture(scope="module")
def light(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("light") / "bundle")


@pytest.fixture(scope="module")
def heavy(light: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny bundle with a large convolution in its first stage, which adds nothing to P5."""
    return edit_graph(light, "backbone", _add_a_convolution, tmp_path_factory.mktemp("heavy") / "bundle")


def _add_a_convolution(model: onnx.ModelProto) -> None:
    random = np.random.default_rng(0).standard_normal((WIDTH, WIDTH), dtype=np.float32)
    weights = {"wide": random[:, :3], "large": random, "nothing": np.zeros((3, WIDTH), dtype=np.float32)}
    for name, value in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(value[:, :, None, None], name))
    model.graph.initializer.append(numpy_helper.from_array(np.array([2, 3]), "behind"))
    for node in model.graph.node:
        if "p5" in node.output:
            node.output[:] = ["p5_alone"]
    steps = (
        ("Unsqueeze", "pixel", "behind", "corner"),
        ("Conv", "corner", "wide", "widened"),
        ("Conv", "widened", "large", "mixed"),
        ("Conv", "mixed", "nothing", "narrowed"),
        ("Add", "p5_alone", "narrowed", "p5"),
    )
    model.graph.node.extend(helper.make_node(kind, inputs, [made]) for kind, *inputs, made in steps)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["openvino", "openvino-bf16"])
def test_openvino_holds_the_weights_once(
    backend: str, heavy: Bundle, light: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it was loaded from is not in RAM, whether it was compiled just now or by an earlier start."""
    pytest.importorskip("openvino", reason="needs OpenVINO")
    problem = BACKENDS[backend].problem()
    if problem is not None:
        pytest.skip(str(problem))
    monkeypatch.setenv("ASAG_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))  # to the helpers of tests
    command = [sys.executable, "-W", "error", "-c", PROGRAM, backend, str(light.path), str(heavy.path)]
    for _ in ("compiled", "from the cache"):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        loaded, called = json.loads(done.stdout)
        assert max(loaded, called) < 1.5 * WEIGHTS, (loaded / WEIGHTS, called / WEIGHTS)


def test_a_loaded_network_keeps_no_memory_that_was_freed(light: Bundle) -> None:
    """Freed blocks that are too small to be mapped stay with the process while one behind them is in use."""
    open_network("onnxruntime", light, threads=1)
    blocks = [np.ones(100_000, dtype=np.uint8) for _ in range(1000)]
    in_use = blocks.pop()
    before = _in_ram("RssAnon")
    del blocks
    assert before - _in_ram("RssAnon") < 2e7
    open_network("onnxruntime", light, threads=1)
    assert before - _in_ram("RssAnon") > 5e7
    assert in_use.all()


def test_a_mapped_file_outlives_its_name(tmp_path: Path) -> None:
    cache = CompiledCache(tmp_path, "any")
    content = bytes(range(256)) * 1000
    cache.write("key", content)
    mapped = cache.map("key")
    assert mapped is not None
    next(tmp_path.iterdir()).unlink()
    mapped.leave_ram()
    assert mapped.content.tobytes() == content
    assert cache.map("key") is None


def test_a_mapped_file_leaves_ram(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(WEIGHTS))
    with path.open("rb") as stream:
        mapped = MappedFile(stream, WEIGHTS)
    before = _in_ram("RssFile")
    assert not mapped.content.any()
    assert _in_ram("RssFile") - before > 0.9 * WEIGHTS
    mapped.leave_ram()
    assert _in_ram("RssFile") - before < 0.1 * WEIGHTS


def _in_ram(field: str) -> int:
    """Return how many bytes of that kind are in RAM."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
