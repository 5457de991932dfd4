"""What travels to other processes: detectors, bundles, results and errors."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import multiprocessing
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from http import HTTPStatus
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from asag_deploy import Bundle, Detections, Detector, errors
from asag_deploy.backends import open_network
from asag_deploy.errors import AsagError, BundleCorruptError, ConfigError, Problem
from asag_deploy.loop.stopping import stop_rule
from asag_deploy.serving.limits import RefusedError
from support.tiny_bundle import make_bundle, picture

IMAGE = picture(4, 2)
SECONDS = 60.0


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("travel") / "bundle")


@pytest.fixture(scope="module")
def detector(bundle: Bundle) -> Iterator[Detector]:
    with Detector.load(bundle.path, max_level="P4", threads=1) as made:
        yield made


def same(found: Detections, expected: Detections) -> bool:
    return {**found.to_json(), "times_ms": 0} == {**expected.to_json(), "times_ms": 0}


def detect(detector: Detector, image: NDArray[np.uint8]) -> Detections:
    return detector(image, channel_order="rgb")


@pytest.mark.parametrize(
    "travel",
    [
        copy.copy,
        copy.deepcopy,
        *(lambda d, p=p: pickle.loads(pickle.dumps(d, p)) for p in range(pickle.HIGHEST_PROTOCOL + 1)),
    ],
)
def test_a_copy_detects_the_same(detector: Detector, travel: Callable[[Detector], Detector]) -> None:
    """With the options it was loaded with, and it stays when the other is closed."""
    with travel(detector) as other:
        pass
    with travel(detector) as other:
        assert other is not detector
        assert detect(other, IMAGE).trace.exit_level == "P4"
        assert same(detect(other, IMAGE), detect(detector, IMAGE))


def test_another_process_detects_the_same(detector: Detector) -> None:
    """It starts with nothing of this one, and sends the detections back."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(detector, IMAGE, channel_order="rgb").result(SECONDS)
    assert same(found, detect(detector, IMAGE))


def test_a_relative_path_is_found_from_elsewhere(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bundle.path.parent)
    opened = Bundle.open("bundle")
    with Detector.load("bundle") as one:
        monkeypatch.chdir(tmp_path)
        with copy.deepcopy(one) as other:
            assert same(detect(other, IMAGE), detect(one, IMAGE))
    moved = pickle.loads(pickle.dumps(opened))
    assert moved == opened
    assert moved.graph_path("decoder").exists()


def test_a_process_that_was_forked(detector: Detector) -> None:
    """As data loaders of PyTorch do; with the threads of this one gone, it goes on with its own."""
    code = (
        "import os, sys, numpy as np; from asag_deploy import Detector\n"
        "image = np.full((640, 640, 3), 4, np.uint8)\n"
        "detector = Detector.load(sys.argv[1], threads=2); before = len(detector(image))\n"
        "child = os.fork()\n"
        "if child == 0: os._exit(0 if [len(detector(image)) for _ in range(3)] == [before] * 3 else 1)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    )
    origin = detector._origin
    assert origin is not None
    run = subprocess.run([sys.executable, "-c", code, str(origin.path)], timeout=SECONDS, check=False)
    assert run.returncode == 0


@pytest.mark.parametrize("end", ["pass", "detector.close()", "del detector"])
def test_a_process_that_was_forked_ends_as_it_means_to(detector: Detector, end: str) -> None:
    """Servers fork their workers, and each of these ends Python and gives back what it has."""
    code = (
        "import os, sys, numpy as np; from asag_deploy import Detector\n"
        "image = np.full((640, 640, 3), 4, np.uint8)\n"
        "detector = Detector.load(sys.argv[1], threads=4); detector(image)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        f"    detector(image); {end}; sys.exit(7)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    )
    origin = detector._origin
    assert origin is not None
    run = subprocess.run([sys.executable, "-c", code, str(origin.path)], timeout=SECONDS, check=False)
    assert run.returncode == 7


def test_detectors_that_cannot_travel(bundle: Bundle) -> None:
    closed = Detector.load(bundle)
    closed.close()
    with pytest.raises(ConfigError, match="that is closed cannot be pickled or copied; load it again"):
        pickle.dumps(closed)
    network = open_network(None, bundle)
    with pytest.raises(ConfigError, match=r"made in memory cannot be pickled or copied; .*asag-export"):
        copy.deepcopy(Detector(bundle.manifest, network, stop_rule(bundle.manifest, None, None)))


@pytest.mark.parametrize("where", ["on the disk", "in memory"])
def test_a_bundle_that_has_changed_meanwhile(bundle: Bundle, where: str, tmp_path: Path) -> None:
    """The other process would detect something else without a word."""
    path = Path(shutil.copytree(bundle.path, tmp_path / "bundle"))
    opened = Bundle.open(path)
    if where == "in memory":
        opened = dataclasses.replace(opened, manifest=dataclasses.replace(opened.manifest, trained=True))
    with Detector.load(opened) as one:
        content = pickle.dumps(one)
        if where == "on the disk":
            shutil.rmtree(path)
            make_bundle(path, nms_iou=0.5)
        with pytest.raises(BundleCorruptError, match="is another than the detector was loaded from"):
            pickle.loads(content)
        shutil.rmtree(path)
        with pytest.raises(errors.BundleNotFoundError, match="there is no bundle"):
            pickle.loads(content)


def test_results_travel(detector: Detector, bundle: Bundle) -> None:
    found = detect(detector, IMAGE)
    raw = detector.forward(np.zeros((1, 3, 64, 64), np.float32), np.array([[64, 64]]))
    assert same(pickle.loads(pickle.dumps(found)), found)
    assert pickle.loads(pickle.dumps(found.trace)).to_dict() == found.trace.to_dict()
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(raw)).logits, raw.logits)
    assert pickle.loads(pickle.dumps(bundle.manifest)) == bundle.manifest


EXCEPTIONS = [kind for kind in vars(errors).values() if inspect.isclass(kind) and issubclass(kind, AsagError)]


@pytest.mark.parametrize("kind", EXCEPTIONS)
def test_errors_travel(kind: type[AsagError]) -> None:
    """From a worker of a pool to whoever waits for it; one that cannot be read there breaks the pool."""
    error = kind("what is wrong; what to do")
    error.add_note("in a worker")
    for again in (pickle.loads(pickle.dumps(error)), copy.deepcopy(error)):
        assert type(again) is kind
        assert str(again) == str(error)
        assert again.args == error.args
        assert vars(again) == vars(error)


def test_problems_and_refusals_travel() -> None:
    problem = Problem("it is missing", "install it")
    assert pickle.loads(pickle.dumps(problem)) == problem
    refused = RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, "no", {"Retry-After": "1"})
    again = pickle.loads(pickle.dumps(refused))
    assert (again.status, str(again), again.headers) == (refused.status, "no", {"Retry-After": "1"})


def test_a_detector_in_many_threads_while_it_is_copied(detector: Detector) -> None:
    results: list[bool] = []
    expected = detect(detector, IMAGE)

    def work() -> None:
        with copy.copy(detector) as other:
            results.append(same(detect(other, IMAGE), expected))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert results == [True] * 4
