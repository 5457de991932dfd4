"""The doctor's findings on machines of every kind."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from asag_deploy.backends import BACKENDS
from asag_deploy.cuda.driver import Gpu
from asag_deploy.detect import doctor
from asag_deploy.errors import BackendError, Problem
from asag_deploy.kernels import LIBRARY_VARIABLE, cpu, structures
from asag_deploy.kernels.cpu import CPU_LIBRARY_VARIABLE, LIBRARY_NAME
from asag_deploy.processing.canvases import Canvas
from support.simulated_gpu.fake_cuda import CudaError, FakeCuda
from support.simulated_gpu.fake_gpu import install_cuda, write_engines
from support.simulated_gpu.fake_kernels import ReadyLibrary
from support.tiny_bundle import make_bundle


class FakeBackend:
    """A backend with a given answer to `problem`."""

    name = "fake"
    distributions = ("numpy-gpu", "numpy")
    cuts_graphs = False

    def __init__(self, answer: Problem | Exception | None) -> None:
        self._answer = answer

    def problem(self) -> Problem | None:
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer


def report_on(monkeypatch: pytest.MonkeyPatch, answer: Problem | Exception | None) -> doctor.BackendReport:
    monkeypatch.setattr(doctor, "BACKENDS", {"fake": FakeBackend(answer)})
    (report,) = doctor.diagnose()
    return report


def test_every_backend_is_reported() -> None:
    reports = {report.name: report for report in doctor.diagnose()}
    assert list(reports) == list(BACKENDS)
    here = reports["onnxruntime"]
    assert here.problem is None
    assert here.library is not None
    assert here.library.startswith("onnxruntime")
    for name, report in reports.items():
        assert report.problem == BACKENDS[name].problem(), name


def test_compiled_operators(host_library_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CPU_LIBRARY_VARIABLE, str(host_library_path))
    assert doctor.machine().operators == (
        "used by onnxruntime, openvino and openvino-bf16, but for bundles in float16, from "
        f"{host_library_path}"
    )
    monkeypatch.setenv(CPU_LIBRARY_VARIABLE, "")
    told = doctor.machine().operators
    assert told.startswith("not used, graphs run whole: ASAG_CPU_KERNELS_LIBRARY is empty")


def test_a_library_that_is_named_and_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose backends do not start, as the table says too; those on a GPU lack what they lack anyway."""
    others = {report.name: report.problem for report in doctor.diagnose()}
    monkeypatch.setenv(CPU_LIBRARY_VARIABLE, "/no/such.so")
    sentence = "ASAG_CPU_KERNELS_LIBRARY is /no/such.so, which is no file; set it to libasag_kernels_host.so"
    told = doctor.machine().operators
    assert told.startswith(f"no, and the backends that would use them do not start: {sentence}")
    text = doctor.describe(doctor.diagnose(), doctor.machine())
    assert re.search(rf"\nonnxruntime +no +onnxruntime \S+ +{sentence}", text)
    for report in doctor.diagnose():
        if report.name in ("onnxruntime", "openvino", "openvino-bf16") and others[report.name] is None:
            assert str(report.problem).startswith(sentence), report.name
        else:
            assert report.problem == others[report.name]


def test_a_package_of_another_release(
    host_library_path: Path, package_of_operators: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Backends start without it, and the doctor says the reason; it warns of nothing besides."""
    (package_of_operators / LIBRARY_NAME).symlink_to(host_library_path)
    assert doctor.machine().operators.endswith(f", from {package_of_operators / LIBRARY_NAME}")
    monkeypatch.setattr(structures, "INTERFACE_VERSION", 11)
    cpu._opened.cache_clear()
    with warnings.catch_warnings(action="error"):
        told = doctor.machine().operators
        text = doctor.describe(doctor.diagnose(), doctor.machine())
    assert re.fullmatch(
        r"not used, graphs run whole: the kernels in .* have interface 10, expected 11; install .* with "
        r"`pip install \./plugins` from the sources of this release, or set ASAG_CPU_KERNELS_LIBRARY= .*",
        told,
    )
    assert re.search(r"\nonnxruntime +ready ", text)


def test_what_is_missing_comes_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    report = report_on(monkeypatch, Problem("it is not installed", "install it"))
    text = doctor.describe([report], doctor.machine())
    assert re.search(r"\nfake +no +numpy \S+ +it is not installed; install it$", text)


def test_what_nothing_helps_against(monkeypatch: pytest.MonkeyPatch) -> None:
    report = report_on(monkeypatch, Problem("this processor is too old"))
    assert doctor.describe([report], doctor.machine()).endswith("this processor is too old")


def test_a_backend_that_fails_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    report = report_on(monkeypatch, RuntimeError("driver\nmismatch"))
    assert report.problem == Problem("it cannot be asked (driver)")


def test_table_has_a_line_for_each_backend() -> None:
    reports = doctor.diagnose()
    lines = doctor.describe(reports, doctor.machine()).splitlines()
    table = lines[lines.index("") + 1 :]
    assert [line.split()[0] for line in table] == ["backend", *(report.name for report in reports)]
    assert lines[1].startswith("CPU")
    assert lines[2].startswith("compiled operators on the CPU  not used")
    assert lines[3].startswith("GPU")


@pytest.mark.parametrize(
    ("text", "features"),
    [
        ("processor : 0\nflags\t\t: fpu avx2 avx512f amx_tile avx512_vnni\nflags : avx2\n",
         ("avx2", "avx512f", "avx512_vnni", "amx_tile")),
        ("Features\t: fp asimd i8mm\n", ("asimd", "i8mm")),
        ("nothing of interest", ()),
        (None, ()),
    ],
)  # fmt: skip
def test_cpu_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, features: tuple[str, ...]
) -> None:
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(doctor, "_CPU_INFO", tmp_path / "cpuinfo")
    assert doctor.machine().cpu_features == features


def test_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(name="RTX 3090", capability="sm86", memory_bytes=24 * 2**30, cuda_version="13.1")
    monkeypatch.setattr(doctor, "find_gpus", lambda: (gpu, gpu))
    each = "RTX 3090, 24576 MiB, driver for CUDA 13.1"
    assert f"GPU  {each}; {each}\n" in doctor.describe([], doctor.machine())


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> None:
        raise BackendError("no NVIDIA driver: libcuda.so.1 is not there")

    monkeypatch.setattr(doctor, "find_gpus", none)
    assert "GPU  no NVIDIA driver: libcuda.so.1 is not there\n" in doctor.describe([], doctor.machine())


def test_a_bundle_and_its_engines(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    sound = f"bundle '{bundle.path}' is sound: tiny (fp32, untrained weights, 3 classes), written by tests"
    assert doctor.describe_bundle(bundle, bundle.path) == sound
    write_engines(bundle, canvases=(Canvas(64, 96), Canvas(64, 64)))
    lines = doctor.describe_bundle(bundle, bundle.path).splitlines()
    assert lines[0] == sound
    shapes = "every shape, the canvas 64x64, the canvas 64x96"
    assert f"engines of tensorrt-rtx for sm86: {shapes}" in lines


def test_doctor_does_not_import_torch() -> None:
    program = (
        "import sys; from asag_deploy.detect.doctor import *; "
        "describe(diagnose(), machine()); sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_no_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(LIBRARY_VARIABLE, raising=False)
    text = doctor.describe([], doctor.machine())
    assert "GPU pre- and post-processing  not used, OpenCV and NumPy do it; build the kernels as" in text
    monkeypatch.setenv(LIBRARY_VARIABLE, str(tmp_path / "none.so"))
    assert "no: ASAG_KERNELS_LIBRARY is" in doctor.machine().kernels
    (tmp_path / "none.so").write_bytes(b"no library")
    assert "none.so cannot be loaded" in doctor.machine().kernels


@pytest.mark.parametrize(
    ("status", "devices", "finding"),
    [
        (0, (CudaError.cudaSuccess, 1), r"used by tensorrt-rtx and tensorrt, from .*libasag_kernels\.so"),
        (209, (CudaError.cudaSuccess, 1), r"no: .* were not compiled for this GPU, sm86; build them again"),
        (
            0,
            (CudaError.cudaErrorNoDevice, None),
            r"not used, although .* is there: the NVIDIA driver finds no",
        ),
    ],
)
def test_kernels(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    status: int,
    devices: tuple[CudaError, int | None],
    finding: str,
) -> None:
    cuda = FakeCuda()
    cuda.devices = devices
    install_cuda(monkeypatch, cuda)
    path = tmp_path / "libasag_kernels.so"
    path.touch()
    monkeypatch.setenv(LIBRARY_VARIABLE, str(path))
    monkeypatch.setattr("asag_deploy.kernels.library.ctypes.CDLL", lambda *_, **__: ReadyLibrary(status))
    assert re.fullmatch(f"{finding}.*", doctor._kernels())


@pytest.mark.parametrize(
    ("status", "versions", "finding"),
    [
        (0, (13010, 13010), "used by tensorrt-rtx and tensorrt"),
        (0, (12080, 12080), "not used: conditional nodes of CUDA graphs take cuda-bindings 13, .*"),
        (209, (13010, 13010), "not used: .* were not compiled for this GPU, sm86; .*"),
        (None, (13010, 13010), "not used: it takes the compiled kernels; .* set ASAG_KERNELS_LIBRARY"),
    ],
)
def test_the_loop_on_the_gpu(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    status: int | None,
    versions: tuple[int, int],
    finding: str,
) -> None:
    cuda = FakeCuda()
    cuda.driver_version, cuda.runtime_version = versions
    install_cuda(monkeypatch, cuda)
    monkeypatch.delenv(LIBRARY_VARIABLE, raising=False)
    if status is not None:
        path = tmp_path / "libasag_kernels.so"
        path.touch()
        monkeypatch.setenv(LIBRARY_VARIABLE, str(path))
        ready = ReadyLibrary(status)
        monkeypatch.setattr("asag_deploy.kernels.library.ctypes.CDLL", lambda *_, **__: ready)
    found = doctor.machine()
    assert re.fullmatch(finding, found.device_loop)
    assert f"probing loop on the GPU  {found.device_loop}\n" in doctor.describe([], found)
