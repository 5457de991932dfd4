"""How the page is served: to those that the address is for, and without a word to anybody else."""

from __future__ import annotations

import importlib.util
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asag_deploy.errors import ConfigError
from asag_deploy.extras import missing
from asag_deploy.interruption import current
from asag_deploy.playground.page import look_of_the_page

if TYPE_CHECKING:
    import uvicorn

MOST_UPLOADED = "50mb"
_GRACE_SECONDS = 2
"""For detections to end in; open pages would keep their connections for ever."""


def check_gradio() -> None:
    """Raise ConfigError, before a bundle is loaded, if Gradio is not installed.

    It is looked for and not imported, since it reads its settings from the environment when it is.
    """
    if importlib.util.find_spec("gradio") is None:
        error = ModuleNotFoundError("no module named gradio", name="gradio")
        raise ConfigError(missing(error, "asag-playground", purpose="the playground"))


@contextmanager
def silent_gradio(folder: Path) -> Iterator[None]:
    """Let Gradio report nothing, and keep what it is given in `folder`, as long as the block runs.

    Raises ConfigError if it is not installed.
    """
    told = {
        "GRADIO_ANALYTICS_ENABLED": "False",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "GRADIO_TEMP_DIR": str(folder),
        "GRADIO_MCP_SERVER": "False",
        "GRADIO_SHARE": "False",
    }
    before = {name: os.environ.get(name) for name in told}
    os.environ.update(told)
    try:
        try:
            import gradio as gr
        except ImportError as error:
            raise ConfigError(missing(error, "asag-playground", purpose="the playground")) from None
        del gr
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def make_server(page: Any, *, allowed: Path, ready: Callable[[], None]) -> uvicorn.Server:
    """Make a server of a page.

    allowed: the folder of the examples.  ready: is called once the page can be opened.
    """
    import gradio as gr
    import uvicorn
    from fastapi import FastAPI

    class PageServer(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets=sockets)
            if current().signal is not None:  # it came before uvicorn listened to signals
                self.should_exit = True
            elif self.started:
                ready()

    app = gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        page,
        path="/",
        allowed_paths=[str(allowed)],
        show_error=False,
        max_file_size=MOST_UPLOADED,
        run_history=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        **look_of_the_page(),
    )
    return PageServer(
        uvicorn.Config(
            app,
            log_level="critical",  # less is of visitors who leave
            access_log=False,
            server_header=False,
            lifespan="on",
            timeout_graceful_shutdown=_GRACE_SECONDS,
        )
    )
