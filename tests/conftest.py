"""What every test gets: fixed seeds, one thread per worker, the reference data, and skips that say why."""

from __future__ import annotations

import fcntl
import gc
import importlib.util
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from asag_deploy.bundle.bundle import Bundle
from asag_deploy.bundle.manifest import Preprocessing
from support.plugin_builds import BUILD_VARIABLE, build_host_library, missing_compiler, missing_gpu

if TYPE_CHECKING:
    from support.simulated_gpu.fake_cuda import FakeCuda
    from support.simulated_gpu.fake_kernels import FakeKernels

SMALL_IMAGES = Preprocessing(shorter_side=160, longer_side=320)
REFERENCE = Path(__file__).parent / "reference"

NEED_PYTORCH = (
    *("benchmarks", "export", "gpu", "training"),
    *("plugins/test_host_kernels.py", "plugins/test_cpu_kernels.py", "deploy/backends/test_pieces.py"),
    "deploy/backends/test_operators_package.py",
)
HAS_PYTORCH = importlib.util.find_spec("torch") is not None
collect_ignore = [] if HAS_PYTORCH else list(NEED_PYTORCH)

# Parallel workers that each start a thread per core slow each other down, up to tenfold.  torch reads this
# when it is imported, which the conftests of the folders below do as soon as they are loaded, hence at once.
IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if IS_WORKER:
    os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS") or "1"


def pytest_configure() -> None:
    """Signals reach tests and what they start, even under `nohup` or in the background of a shell."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def pytest_report_header() -> str | None:
    """Say what is left out where PyTorch is not installed."""
    return None if HAS_PYTORCH else f"no PyTorch: left out are {', '.join(NEED_PYTORCH)}"


SHARED_EXPORTS = ("small_bundle", "half_bundle", "demo_run")
"""Fixtures that take most of a minute, and that all workers share."""
_LARGE_GRAPH = 32 * 2**20
"""Bytes of a compiled graph that small networks do not come near."""
LONGEST = ("test_forward_of_bundles", "test_a_notebook_runs_and_becomes_a_page")
"""Tests of up to a minute and more, which no worker is to begin when the others have come to the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU or PyTorch where there is none; the longest come first, then a shared export's.

    Each worker begins with a part of the list: so one makes these exports while others do what needs none,
    instead of waiting for it.
    """

    def group(item: pytest.Item) -> int:
        names = getattr(item, "fixturenames", ())
        return next((i for i, name in enumerate(SHARED_EXPORTS) if name in names), len(SHARED_EXPORTS))

    items.sort(key=lambda item: (getattr(item, "originalname", "") not in LONGEST, group(item)))
    if not HAS_PYTORCH:
        for item in items:
            if group(item) < len(SHARED_EXPORTS):
                item.add_marker(pytest.mark.skip(reason="its bundle is exported with PyTorch"))
    reason = missing_gpu()
    if reason is not None:
        for item in items:
            if item.get_closest_marker("gpu") is not None:  # `keywords` has the names of folders too
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def reference_dir() -> Path:
    """Outputs of the public implementation: `layout_*.json` and `cases/*.npz`."""
    return REFERENCE


@pytest.fixture(scope="session")
def build_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Outside the source tree, and common to all workers of a session.

    Where `plugins/` has been compiled already, such as on a machine that is there for its GPU, that folder.
    """
    if BUILD_VARIABLE in os.environ:
        return Path(os.environ[BUILD_VARIABLE])
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if IS_WORKER else base) / "kernels"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def host_library_path(build_dir: Path) -> Path:
    missing = missing_compiler()
    if missing is not None:
        pytest.skip(missing)
    return build_host_library(build_dir)


@pytest.fixture
def package_of_operators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an installed package, still empty, that backends look for the compiled operators in."""
    folder = tmp_path / "site" / "asag_cpu_kernels_of_a_test"
    folder.mkdir(parents=True)
    monkeypatch.setattr("asag_deploy.kernels.cpu.PACKAGE", folder.name)
    monkeypatch.delenv("ASAG_CPU_KERNELS_LIBRARY")
    monkeypatch.syspath_prepend(str(folder.parent))
    return folder


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """An imaginary GPU, with TensorRT and TensorRT-RTX on it."""
    from support.simulated_gpu.fake_gpu import install_gpu  # with ONNX, which most tests do without

    return install_gpu(monkeypatch)


@pytest.fixture
def kernels(cuda: FakeCuda, host_library_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeKernels:
    """The kernels of `plugins/` on the imaginary GPU, computed by the host."""
    from support.simulated_gpu.fake_kernels import install_kernels

    return install_kernels(monkeypatch, cuda, host_library_path)


@pytest.fixture(scope="session")
def shared_folder(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str, Callable[[Path], object]], Path]:
    """A function that gives the folder of that name, which the first to ask makes with the given function.

    So it is made once per run of the suite, by whichever worker is first.
    """
    base = tmp_path_factory.getbasetemp()
    if IS_WORKER:
        base = base.parent

    def get(name: str, make: Callable[[Path], object]) -> Path:
        path, unfinished = base / name, base / f"{name}-unfinished"
        with (base / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                shutil.rmtree(unfinished, ignore_errors=True)
                make(unfinished)
                unfinished.rename(path)
        return path

    return get


@pytest.fixture(scope="session")
def shared_bundle(shared_folder: Callable[..., Path]) -> Callable[..., Bundle]:
    """A function that gives the bundle of that name, exported with the given function by the first to ask."""
    return lambda name, export: Bundle.open(shared_folder(name, export))


@pytest.fixture(scope="session")
def small_bundle(shared_bundle: Callable[..., Bundle]) -> Bundle:
    """The small network, every level, exact, float32; it resizes images to 160 pixels."""
    from support.small_network import export_small  # with PyTorch, which most tests do without

    return shared_bundle("small", lambda path: export_small(path, preprocessing=SMALL_IMAGES))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("cache")
    os.environ["ASAG_CACHE_DIR"] = str(cache)
    os.environ["ASAG_CPU_KERNELS_LIBRARY"] = (
        ""  # graphs run whole, but where a test has compiled the operators
    )
    return cache


@pytest.fixture(scope="module", autouse=True)
def _small_cache(_own_cache: Path) -> Iterator[None]:
    """Forget compiled graphs of full size, which no other module has: together they take gigabytes."""
    yield
    for compiled in _own_cache.rglob("*.blob"):
        if compiled.stat().st_size > _LARGE_GRAPH:
            compiled.unlink()


@pytest.fixture(scope="module", autouse=True)
def _small_heap() -> Iterator[None]:
    """Spare the garbage collector what earlier modules left for good, such as caches of PyTorch's exporter.

    Else it looks through a million objects again and again, which takes a tenth of an export.
    """
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _fresh_start() -> None:
    """Fix the seeds, and take back the threads that a benchmark among the tests before gave to PyTorch."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (for libraries that still draw from it)
    torch = sys.modules.get("torch")  # not imported for tests that do without it
    if torch is not None:
        torch.manual_seed(0)
        if IS_WORKER:
            torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
