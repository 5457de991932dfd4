"""How the server listens: one socket, one event loop, and an end that lets requests finish."""

from __future__ import annotations

import asyncio
import logging
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from asag_deploy.errors import ConfigError
from asag_deploy.extras import missing
from asag_deploy.interruption import current, held_back
from asag_deploy.serving.connections import BEYOND, connection_class
from asag_deploy.serving.limits import MOST_HEADER_BYTES, Limits

if TYPE_CHECKING:
    import uvicorn
    from uvicorn import Server as _Base

    from asag_deploy.serving.app import App
else:
    _Base = object

_log = logging.getLogger("asag_deploy.serving")
_BACKLOG = 128
"""Connections that wait to be accepted; as many are accepted at once, before the first is turned away."""
_LARGEST_PORT = 65535
_OTHER_FILES = BEYOND + _BACKLOG + 64
"""Open files beside the connections that are let in: the others, and what the server itself opens."""
_IDLE_SECONDS = 5
"""How long a connection stays open without a request."""


def bind(host: str, port: int) -> socket.socket:
    """Take `host` (a name or an IPv4 or IPv6 address) and `port` (0: any free one) for what is to be served.

    Clients are refused until `run` listens there, so that nobody waits while a bundle is loaded.

    Raises ConfigError if the address cannot be had.
    """
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host  # as in an address
    if not host:  # a variable that is not set; it would be every address that the machine has
        raise ConfigError("--host is empty; name the address to listen on (0.0.0.0 is all)")
    if not 0 <= port <= _LARGEST_PORT:
        raise ConfigError(f"--port is {port}; it must be from 0 to {_LARGEST_PORT}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with ExitStack() as unless_bound, _refused_as_config_error(host, port):
        listener = unless_bound.enter_context(socket.socket(family))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # soon after another server's end, too
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind((host, port))
        unless_bound.pop_all()
    return listener


def listen(listener: socket.socket) -> None:
    """Let clients connect to an address that `bind` has taken.

    Raises ConfigError if another program, which had taken it at the same time, listens there already.
    """
    with _refused_as_config_error(*listener.getsockname()[:2]):
        listener.listen(_BACKLOG)


@contextmanager
def _refused_as_config_error(host: str, port: int) -> Iterator[None]:
    try:
        yield
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"could not listen on {host}, port {port}: {reason}; name another --host or --port"
        ) from None


def allow_connections(limits: Limits) -> None:
    """Let this process have as many open files as its connections take.

    Raises ConfigError where the system allows fewer: the event loop would turn in circles once they are used.
    """
    wanted = limits.connections + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or wanted <= soft:
        return
    if hard != resource.RLIM_INFINITY and wanted > hard:
        most = hard - _OTHER_FILES
        fewer = f", or give --connections {most} at most" if most > 0 else ""
        raise ConfigError(
            f"{limits.connections} connections take {wanted} open files, and {hard} are allowed here: allow "
            f"more (`ulimit -n`){fewer}"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def address_of(listener: socket.socket) -> str:
    """Return the URL at which a socket that is bound is reached."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def make_server(
    app: App,
    limits: Limits,
    *,
    grace_seconds: int,
    drain_seconds: float = 0.0,
    ready: Callable[[], None] = lambda: None,
) -> uvicorn.Server:
    """Make a server that, told to stop, takes no more requests and gives those it has `grace_seconds` to end.

    Before that it goes on for `drain_seconds`, but says that it is not ready, so that nothing is sent to it
    any more; being told again cuts that short.  limits: of connections, and of the time to send a head and to
    read an answer; the application keeps the others.  ready: is called once it answers, and would end well.

    Raises ConfigError if uvicorn is missing, or for a time that makes no sense.
    """
    if grace_seconds < 1:
        raise ConfigError(f"--grace-seconds is {grace_seconds}; it must be at least 1")
    try:
        config = _configuration(app, limits, grace_seconds)
    except ImportError as error:
        raise ConfigError(missing(error, "asag-serve", purpose="serving")) from None
    server = _server_class(grace_seconds, drain_seconds, ready)(config)
    app.is_stopping_when(server.is_stopping)
    return server


def _configuration(app: App, limits: Limits, grace_seconds: int) -> uvicorn.Config:
    """Tell uvicorn how to serve; raises ImportError if it is missing."""
    import uvicorn

    return uvicorn.Config(
        app,
        http=connection_class(limits, app.turned_away),
        loop="asyncio",  # also where another is installed, which nothing here has been tried with
        ws="none",
        h11_max_incomplete_event_size=MOST_HEADER_BYTES,
        backlog=_BACKLOG,
        timeout_keep_alive=_IDLE_SECONDS,
        proxy_headers=False,
        log_level="error",  # warnings are of what clients do
        access_log=False,
        server_header=False,
        lifespan="on",
        timeout_graceful_shutdown=grace_seconds
        + 1,  # the server below is sooner, and says so in its own words
    )


def _server_class(grace_seconds: int, drain_seconds: float, ready: Callable[[], None]) -> type[_Server]:
    import uvicorn

    told = {"grace_seconds": grace_seconds, "drain_seconds": drain_seconds, "ready": staticmethod(ready)}
    return type("Server", (_Server, uvicorn.Server), told)


class _Server(_Base):
    """Ends in two steps: unready, then closed."""

    grace_seconds: int
    drain_seconds: float
    ready: Callable[[], None]
    _drained: float | None = None
    """When it closes, by `time.monotonic`; None if it has not been told to stop."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin, unless a signal came before uvicorn listened to them."""
        await super().startup(sockets=sockets)
        if current().signal is not None:
            self.should_exit = True
        elif self.started:
            self.ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Be told to stop."""
        if self._drained is None and self.drain_seconds > 0 and not self.should_exit:
            self._captured_signals.append(sig)
            self._drained = time.monotonic() + self.drain_seconds
        else:
            super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        """Close once it is time to."""
        if self._drained is not None and time.monotonic() >= self._drained:
            self.should_exit = True
        return await super().on_tick(counter)

    def is_stopping(self) -> bool:
        """Tell whether it has been told to stop."""
        return self.should_exit or self._drained is not None

    async def _wait_tasks_to_complete(self) -> None:
        """Let requests end; cut off those that take longer than they may, and say how many."""
        try:
            async with asyncio.timeout(self.grace_seconds):
                await super()._wait_tasks_to_complete()
        except TimeoutError:
            tasks = self.server_state.tasks
            if tasks:
                _log.warning(
                    "%s cut off: --grace-seconds (%d) had passed",
                    "1 request was" if len(tasks) == 1 else f"{len(tasks)} requests were",
                    self.grace_seconds,
                )
            # Uvicorn would say it again, of every answer that is not whole.
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
            for task in tasks:
                task.cancel()


def run(server: uvicorn.Server, listener: socket.socket) -> None:
    """Serve until SIGTERM, SIGHUP or Ctrl-C, which is raised as before when all is done.

    Raises ConfigError if somebody else listens there by now.
    """
    with listener, held_back(), _hangup_ends_well(server):
        listen(listener)
        server.run(sockets=[listener])


@contextmanager
def _hangup_ends_well(server: uvicorn.Server) -> Iterator[None]:
    """Let SIGHUP, which uvicorn knows nothing of, end the server as the others do, unless it is ignored."""
    number = signal.SIGHUP
    in_main_thread = threading.current_thread() is threading.main_thread()  # only that one has signals
    if not in_main_thread or signal.getsignal(number) == signal.SIG_IGN:
        yield
        return
    came: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        came.append(number)
        server.handle_exit(number, frame)

    before = signal.signal(number, receive)
    try:
        yield
    finally:
        signal.signal(number, before)
    if came:
        signal.raise_signal(number)
