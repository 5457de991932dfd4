"""The doctor's findings on machines of every kind."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from asag_deploy.backends import BACKENDS
from asag_deploy.detect import doctor
from asag_deploy.kernels import LIBRARY_VARIABLE
from support.simulated_gpu.fake_cuda import CudaError, FakeCuda
from support.simulated_gpu.fake_gpu import install_cuda
from support.simulated_gpu.fake_kernels import ReadyLibrary

NAMES = (
    *("onnxruntime", "onnxruntime-cuda", "onnxruntime-cuda-tf32", "openvino", "openvino-bf16"),
    *("tensorrt-rtx", "tensorrt"),
)


class FakeBackend:
    """A backend with a given answer to `available`."""

    def __init__(self, name: str, answer: str | Exception | None) -> None:
        self.name = name
        self._answer = answer

    def available(self) -> str | None:
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer


def reports_with(
    monkeypatch: pytest.MonkeyPatch, **answers: str | Exception | None
) -> dict[str, doctor.BackendReport]:
    fakes = {name.replace("_", "-"): FakeBackend(name, answer) for name, answer in answers.items()}
    monkeypatch.setattr("asag_deploy.backends.BACKENDS", fakes)
    return {report.name: report for report in doctor.diagnose()}


def test_every_backend_is_reported() -> None:
    reports = {report.name: report for report in doctor.diagnose()}
    assert set(reports) == {*NAMES, *BACKENDS}
    here = reports["onnxruntime"]
    assert here.available
    assert here.missing is None
    assert here.remedy is None
    assert here.library is not None
    assert here.library.startswith("onnxruntime")
    for name, report in reports.items():
        assert report.available == (report.missing is None), name


def test_what_is_missing_comes_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    report = reports_with(monkeypatch, openvino="OpenVINO is not installed")["openvino"]
    assert not report.available
    assert report.missing == "OpenVINO is not installed"
    assert report.remedy == "pip install openvino"
    text = doctor.describe([report], doctor.machine())
    assert "OpenVINO is not installed: pip install openvino" in text


def test_a_command_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    report = reports_with(monkeypatch, openvino="get it with `pip install openvino`")["openvino"]
    assert doctor.describe([report], doctor.machine()).count("pip install") == 1


def test_backends_this_version_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    reports = reports_with(monkeypatch, onnxruntime=None)
    assert reports["onnxruntime"].available
    for name in NAMES[1:]:
        assert not reports[name].available
        assert "not supported by this version" in str(reports[name].missing)
        assert reports[name].remedy is None


def test_a_backend_the_doctor_has_not_heard_of(monkeypatch: pytest.MonkeyPatch) -> None:
    reports = reports_with(monkeypatch, new_thing="no new thing here")
    assert reports["new-thing"].missing == "no new thing here"
    assert reports["new-thing"].remedy is None


def test_a_backend_that_fails_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    report = reports_with(monkeypatch, tensorrt=RuntimeError("driver\nmismatch"))["tensorrt"]
    assert not report.available
    assert report.missing == "it cannot be asked (driver)"
    assert report.remedy == "pip install tensorrt"


def test_libraries_that_cannot_even_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "asag_deploy.backends", None)
    reports = doctor.diagnose()
    assert {report.name for report in reports} == set(NAMES)
    assert all("cannot be imported" in str(report.missing) for report in reports)
    assert "pip install onnxruntime" in doctor.describe(reports, doctor.machine())


def test_table_has_a_line_for_each_backend() -> None:
    reports = doctor.diagnose()
    lines = doctor.describe(reports, doctor.machine()).splitlines()
    table = lines[lines.index("") + 1 :]
    assert [line.split()[0] for line in table] == ["backend", *(report.name for report in reports)]
    assert lines[1].startswith("CPU")
    assert lines[2].startswith("GPU")


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


class FakeDriver:
    """Stands for libcuda: how cuInit answers, and how many devices it counts."""

    def __init__(self, status: int, count: int) -> None:
        self._status, self._count = status, count

    def cuInit(self, _flags: int) -> int:
        return self._status

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = self._count
        return 0


def nvidia_smi(monkeypatch: pytest.MonkeyPatch, answer: str | Exception | None) -> None:
    """Let nvidia-smi print `answer`, fail with it, or (None) be absent."""

    def fake_run(*_args: object, **_options: object) -> subprocess.CompletedProcess[str]:
        if isinstance(answer, Exception):
            raise answer
        return subprocess.CompletedProcess([], 0, stdout=answer or "")

    monkeypatch.setattr("shutil.which", lambda _name: None if answer is None else "/usr/bin/nvidia-smi")
    monkeypatch.setattr("subprocess.run", fake_run)


def test_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(monkeypatch, "NVIDIA GeForce RTX 3090, 24576 MiB, 570.1\n")
    monkeypatch.setattr("ctypes.CDLL", lambda _name: FakeDriver(0, 1))
    found = doctor.machine()
    assert found.gpus == ("NVIDIA GeForce RTX 3090, 24576 MiB, driver 570.1",)
    assert found.gpu_problem is None
    assert "RTX 3090" in doctor.describe([], found)


@pytest.mark.parametrize(
    "answer",
    [
        None,
        subprocess.CalledProcessError(9, "nvidia-smi"),
        subprocess.TimeoutExpired("nvidia-smi", 1),
        OSError(),
    ],
)
def test_no_gpu_and_no_driver(monkeypatch: pytest.MonkeyPatch, answer: Exception | None) -> None:
    def absent(_name: str) -> None:
        raise OSError("cannot open shared object file")

    nvidia_smi(monkeypatch, answer)
    monkeypatch.setattr("ctypes.CDLL", absent)
    found = doctor.machine()
    assert found.gpus == ()
    assert found.gpu_problem is not None
    assert "no NVIDIA driver" in found.gpu_problem
    assert "GPU  no NVIDIA driver" in doctor.describe([], found)


@pytest.mark.parametrize(
    ("driver", "sentence"),
    [
        (FakeDriver(100, 0), "cuInit returned 100"),
        (FakeDriver(0, 0), "finds no GPU"),
        (FakeDriver(0, 2), "nvidia-smi does not list them"),
        (object(), "no NVIDIA driver"),
    ],
)
def test_driver_without_a_usable_gpu(monkeypatch: pytest.MonkeyPatch, driver: Any, sentence: str) -> None:
    nvidia_smi(monkeypatch, None)
    monkeypatch.setattr("ctypes.CDLL", lambda _name: driver)
    problem = doctor.machine().gpu_problem
    assert problem is not None
    assert sentence in problem


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
