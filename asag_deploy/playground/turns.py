"""Whose turn it is at the detector, of all visitors.

Gradio has a queue of its own, which tells results over one stream for each page.  That stream is closed with
the last result, and a change that is made in that moment waits for ever: its result is told to nobody.  So
changes are plain requests here, each answered with its own result, and wait for one another in these turns.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from types import TracebackType
from typing import Self, TypeVar

_Result = TypeVar("_Result")


class Turns:
    """Turns at something that takes few at once; for the event loop of one server.

    As a context manager it waits in the end for what is still being done.
    """

    def __init__(self, *, at_once: int, waiting: int = 64, patience_seconds: float = 5) -> None:
        """Let so many in `at_once`, and so many more wait, in the order in which they come.

        patience_seconds: for `is_gone` to answer in.
        """
        self._free = asyncio.Semaphore(at_once)
        self._threads = ThreadPoolExecutor(at_once, thread_name_prefix="turn")  # asyncio's own may be fewer
        self._places = at_once + waiting
        self._present = 0
        self._patience = patience_seconds

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._threads.shutdown()

    async def take(
        self, work: Callable[[], _Result], is_gone: Callable[[], Awaitable[bool]]
    ) -> _Result | None:
        """Do `work` in a thread once it is its turn, and return its result.

        None, without doing it, if too many wait already, or if `is_gone` says, when its turn comes, that
        nobody waits for it any more; without an answer in time somebody is taken to.  Who is cancelled while
        waiting leaves the line; work that has begun is finished, and keeps its turn until then.  What `work`
        raises is raised.
        """
        if self._present >= self._places:
            return None
        with ExitStack() as held:
            self._present += 1
            held.callback(self._leave)
            await self._free.acquire()
            held.callback(self._free.release)
            if await self._answer(is_gone):
                return None
            within = contextvars.copy_context().run
            working = asyncio.get_running_loop().run_in_executor(self._threads, within, work)
            until_it_ends = held.pop_all()  # a thread works on when who waits for it is cancelled
            working.add_done_callback(lambda _: until_it_ends.close())
            return await asyncio.shield(working)

    def _leave(self) -> None:
        self._present -= 1

    async def _answer(self, is_gone: Callable[[], Awaitable[bool]]) -> bool:
        try:
            async with asyncio.timeout(self._patience):
                return await is_gone()
        except TimeoutError:
            return False
