"""Ray, as a run needs it: started here or joined, quiet, and the parts of a run on its actors."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event, Thread
from typing import Any

from asag_deploy.batch.index import Part
from asag_deploy.batch.worker import Plan, Report, Worker
from asag_deploy.command_line import NOTHING_DONE, only_own_messages
from asag_deploy.errors import BackendError, ConfigError, reason_of
from asag_deploy.plain_numbers import unsigned

PROGRAM = "asag-batch"
AUTO = "auto"
_SPARE_CPUS = 4
"""What Ray believes there to be beyond the actors' CPUs: what it does beside them needs some, or hangs."""
_OBJECT_STORE_BYTES = 200_000_000
"""Only words on parts go through it: a share of the memory, as Ray takes, would be wasted."""
_CONNECT_S = 4.0
_SPEAK_S = 15.0
"""Longer than a head takes that is busy."""
_ANSWER_S = 60.0
_MOST_BLOCKS = 10_000
_KNOCK_S = 3.0
_GONE_S = 20.0
_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
_PROBE_SETTINGS = {"RAY_NUM_REDIS_GET_RETRIES": "5"}
"""Of 20, a second apart: what is no cluster, or wants a token, stays so."""
_REMEDY = "check the address, and that the same Ray and Python run there (`ray status`)"
_NO_CLUSTER = "Could not find any running Ray instance"
_AUTH = "RAY_AUTH_MODE"
_PROBE = """
import json, logging, sys, ray
try:
    ray.init(address=sys.argv[1], log_to_driver=False, logging_level=logging.ERROR)
    said = {"cpus": int(ray.cluster_resources().get("CPU", 0))}
except Exception as error:
    while error.__cause__ is not None:
        error = error.__cause__
    said = {"error": f"{type(error).__name__}: {error}"}
print(json.dumps(said))
"""
_HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0" + b"\0\0\0\0"
"""What a client of HTTP/2 begins with, and settings of which none is set."""
_SETTINGS_FRAME = 4


@dataclass(frozen=True, kw_only=True)
class Crew:
    """How many processes detect, and what each takes."""

    actors: int
    threads: int
    gpus: float
    """GPUs of each."""


def cpus_here() -> int:
    """Return how many CPUs this process may use."""
    return len(os.sched_getaffinity(0))


def cpus_of(address: str) -> int:
    """Return how many CPUs a cluster has that is running, and have this process join it as it wants that.

    address: `host:port`, or `auto` for the one that this machine belongs to.  Raises BackendError where Ray
    cannot join it, minutes later at most.
    """
    _quieten()
    if _AUTH in os.environ:
        return _cpus(_ask(address), address)
    # A cluster wants a token if there was one where it was started, and Ray gives one only if it is told to.
    # Given to one that wants none it is no error, but actors die: so what the cluster wants is found out.
    for mode in ("disabled", "token"):
        said = _ask(address, mode)
        if not _wants_token(said):
            break
    cpus = _cpus(said, address)
    _join_with(mode)
    return cpus


def _ask(address: str, mode: str | None = None) -> dict[str, Any]:
    """Join a cluster in a process of its own; return its `cpus`, or the `error` in one line."""
    try:
        asked = subprocess.run(
            [sys.executable, "-c", _PROBE, address],
            capture_output=True,
            text=True,
            timeout=_ANSWER_S,
            stdin=subprocess.DEVNULL,
            env={**_PROBE_SETTINGS, **os.environ, **({} if mode is None else {_AUTH: mode})},
        )
    except subprocess.TimeoutExpired:
        if address == AUTO:
            raise BackendError(
                "the Ray cluster of this machine does not answer: end it (`ray stop`), and start it anew"
            ) from None
        raise BackendError(f"at '{address}' something answers, but no Ray cluster does: {_REMEDY}") from None
    try:
        said: dict[str, Any] = json.loads(asked.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        said = {"error": asked.stderr.strip() or "no answer"}
    if "error" in said:
        said["error"] = own_line(said["error"])
    return said


def own_line(message: str) -> str:
    """Return the first line of a message, or that of the exception if a traceback is in it."""
    head, traceback, rest = message.partition("Traceback (most recent call last):")
    lines = [line.strip() for line in rest.splitlines() if line[:1].strip()]
    if traceback and lines:
        return lines[0]
    return next(filter(None, map(str.strip, head.splitlines())), message.strip())


def _wants_token(said: dict[str, Any]) -> bool:
    return "AuthenticationError" in said.get("error", "")


def _cpus(said: dict[str, Any], address: str) -> int:
    """Return the CPUs of an answer.  Raises BackendError for any other."""
    if "cpus" in said:
        return int(said["cpus"])
    if _wants_token(said):
        raise BackendError(
            f"the Ray cluster at '{address}' takes nobody without its token: put what `ray get-auth-token` "
            "prints on its head into RAY_AUTH_TOKEN or ~/.ray/auth_token here"
        )
    if address == AUTO and _NO_CLUSTER in said["error"]:
        raise BackendError(
            "no Ray cluster runs on this machine: start one (`ray start --head`), give the address of "
            "another as --address host:port, or leave --address out"
        )
    reason = said["error"].partition(": ")[2] or said["error"]
    raise BackendError(f"the Ray cluster at '{address}' cannot be used ({reason}): {_REMEDY}")


def _join_with(mode: str) -> None:
    """Have Ray join with a token or without, also where it has been imported."""
    os.environ[_AUTH] = mode
    from ray import _raylet

    config: Any = vars(_raylet)["Config"]  # compiled, and not among what is declared
    config.initialize("")  # as Ray itself does after such a change: it has read the environment by now


def knock(address: str) -> None:
    """Raise BackendError where nobody takes a connection or speaks as Ray does, for which Ray waits minutes.

    Raises ConfigError for what is no address of a cluster.
    """
    if address == AUTO:
        return
    host, _, digits = address.rpartition(":")
    port = unsigned(digits)
    if "://" in address or not host or port is None or not 0 < port < 2**16:
        raise ConfigError(
            f"--address is '{address}'; it must be host:port of a cluster's head (6379 is the usual port), "
            f"or {AUTO} on one of its machines"
        )
    try:
        with socket.create_connection((_meant(host), port), timeout=_CONNECT_S) as head:
            answers = os.environ.get("RAY_USE_TLS", "0") != "0" or _speaks_http2(head)
    except OSError as error:
        raise BackendError(
            f"there is no Ray cluster at '{address}' ({reason_of(error)}): check the address, or leave "
            "--address out to use this machine"
        ) from None
    if not answers:
        raise BackendError(f"at '{address}' something answers, but no Ray cluster does: {_REMEDY}")


def _speaks_http2(head: socket.socket) -> bool:
    """Tell whether whoever answers begins as servers of gRPC do, which the head of a cluster is."""
    head.settimeout(_SPEAK_S)
    answer = b""
    try:
        head.sendall(_HTTP2)
        while len(answer) < 4 and (more := head.recv(64)):
            answer += more
    except OSError:  # silent, or gone
        return False
    return len(answer) >= 4 and answer[3] == _SETTINGS_FRAME


def _meant(host: str) -> str:
    """Return the host that Ray takes a name for: this machine's own address instead of 127.0.0.1."""
    if host not in ("localhost", "127.0.0.1", "::1"):
        return host.strip("[]")
    from ray.util import get_node_ip_address

    return str(get_node_ip_address())


@contextmanager
def ray_here(address: str | None, crew: Crew) -> Iterator[None]:
    """Start Ray on this machine, or join a cluster, and leave it in the end.

    What Ray prints meanwhile goes nowhere, and signals stay the program's.  Raises BackendError where
    it cannot be started.
    """
    _quieten()
    import ray

    wanted: dict[str, Any] = {"address": address}
    if address is None:
        wanted = {
            "address": "local",
            "num_cpus": crew.actors * crew.threads + _SPARE_CPUS,
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE_BYTES,
        }
        # Else Ray leaves one in the user's home, and takes whoever connects where there can be none.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    with only_own_messages(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray warns of its own settings
        with _own_signals():
            try:
                ray.init(**wanted, log_to_driver=False, logging_level=logging.ERROR)
            except (RuntimeError, OSError, ValueError, ray.exceptions.RayError) as error:
                where = "on this machine" if address is None else f"of the cluster at '{address}'"
                raise BackendError(f"Ray {where} cannot be used: {own_line(str(error))}") from None
        watch = _Watch(address or "this machine", str(ray.get_runtime_context().gcs_address))
        watch.start()
        try:
            yield
        finally:
            watch.stop()
            ray.shutdown()


class _Watch(Thread):
    """Ends the program in a sentence when the head of its cluster has gone.

    Ray would do so itself, a minute later, without a word and with the exit code of pictures that failed.
    What is done is whole, and Ray could not even be left any more: so nothing is tidied up.
    """

    def __init__(self, named: str, head: str) -> None:
        super().__init__(daemon=True)
        self._named = named
        self._head = head.rpartition(":")
        self._stopped = Event()

    def run(self) -> None:
        """Knock at the head every few seconds."""
        seen = time.monotonic()
        while not self._stopped.wait(_KNOCK_S):
            try:
                socket.create_connection((self._head[0].strip("[]"), int(self._head[2])), _KNOCK_S).close()
                seen = time.monotonic()
            except OSError:
                if time.monotonic() - seen > _GONE_S and not self._stopped.is_set():
                    print(
                        f"{PROGRAM}: error: the Ray cluster ('{self._named}') has gone: start it anew, and "
                        "give the same command again",
                        file=sys.stderr,
                    )
                    os._exit(NOTHING_DONE)

    def stop(self) -> None:
        """Watch no longer."""
        self._stopped.set()


def reports(plan: Plan, parts: Sequence[Part], crew: Crew) -> Iterator[Report]:
    """Have parts done by Ray Data's actors, and yield the report of each, in the order in which they end.

    An actor that dies is replaced, and does its part again.
    """
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    rows = [{"part": json.dumps(dataclasses.asdict(part))} for part in parts]
    done = ray.data.from_items(rows, override_num_blocks=min(len(rows), _MOST_BLOCKS)).map_batches(
        Worker,
        fn_constructor_kwargs={"plan": plan},
        batch_size=1,
        num_cpus=crew.threads,
        num_gpus=crew.gpus or None,
        compute=ray.data.ActorPoolStrategy(size=crew.actors),
    )
    try:
        for batch in done.iter_batches(batch_size=None, prefetch_batches=0):
            for text in batch["report"]:
                yield Report.from_json(str(text))
    except ray.exceptions.RayError as error:
        raise BackendError(f"Ray cannot go on: {own_line(str(error))}") from None


def _quieten() -> None:
    """Let Ray report to nobody, and not talk amid the program's words; what is set already stays."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)


@contextmanager
def _own_signals() -> Iterator[None]:
    """Set the program's handlers again, which Ray replaces by its own."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
