"""Backends: the libraries that run a bundle's graphs, by name.

A backend turns a bundle into a `Network`, the stages that the probing loop runs.  To add one, write it in a
file of its own and list it in `BACKENDS`.
"""

from __future__ import annotations

from asag_deploy.backends.forking import kept_in_forks
from asag_deploy.backends.network import Backend, Network
from asag_deploy.backends.onnxruntime import OnnxRuntime
from asag_deploy.backends.openvino.backend import OpenVino
from asag_deploy.backends.resident_memory import return_freed_memory
from asag_deploy.backends.tensorrt.backend import TensorRt
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.errors import BackendError, ConfigError

__all__ = ["BACKENDS", "DEFAULT_BACKEND", "Backend", "Network", "open_network"]

DEFAULT_BACKEND = "onnxruntime"


BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        OnnxRuntime(name="onnxruntime", device="cpu"),
        OnnxRuntime(name="onnxruntime-cuda", device="cuda"),
        OnnxRuntime(name="onnxruntime-cuda-tf32", device="cuda", tf32=True),
        OpenVino(name="openvino", precision="f32"),
        OpenVino(name="openvino-bf16", precision="bf16"),
        TensorRt(name="tensorrt-rtx"),
        TensorRt(name="tensorrt"),
    )
}


def check_backend(name: str) -> None:
    """Raise ConfigError for a name that is not in `BACKENDS`."""
    if name not in BACKENDS:
        raise ConfigError(f"unknown backend '{name}'; the backends are {', '.join(BACKENDS)}")


def check_runs_here(backend: str | None) -> None:
    """Raise, before a bundle is opened, ConfigError for an unknown backend, BackendError for one that lacks
    something on this machine; None is the default one."""
    name = DEFAULT_BACKEND if backend is None else backend
    check_backend(name)
    problem = BACKENDS[name].problem()
    if problem is not None:
        raise BackendError(f"the backend '{name}' cannot run on this machine: {problem}")


def open_network(
    backend: str | None, bundle: Bundle, threads: int | None = None, requests: int = 1
) -> Network:
    """Load a bundle with the backend of that name (None: onnxruntime, which every installation has).

    Raises ConfigError for a name that is not in `BACKENDS`, BackendError if this machine cannot run it.
    """
    check_runs_here(backend)
    if threads is not None and threads < 1:
        raise ConfigError(f"threads is {threads}; expected at least 1, or None for the backend's choice")
    if requests < 1:
        raise ConfigError(f"requests is {requests}; expected at least 1 call at a time")
    network = BACKENDS[backend or DEFAULT_BACKEND].open(bundle, threads=threads, requests=requests)
    return_freed_memory()
    return kept_in_forks(network)
