"""Whose turn it is at the detector, of all visitors.

Gradio has a queue of its own, which tells results over one stream for each page.  That stream is closed with
the last result, and a change that is made in that moment waits for ever: its result is told to nobody.  So
changes are plain requests here, each answered with its own result, and wait for one another in these turns.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

_Result = TypeVar("_Result")


class Turns:
    """Turns at something that takes few at once; for the event loop of one server."""

    def __init__(self, *, at_once: int, waiting: int) -> None:
        """Let so many in `at_once`, and so many more wait, in the order in which they come."""
        self._free = asyncio.Semaphore(at_once)
        self._places = at_once + waiting
        self._present = 0

    async def take(
        self, work: Callable[[], _Result], is_gone: Callable[[], Awaitable[bool]]
    ) -> _Result | None:
        """Do `work` in a thread once it is its turn, and return its result.

        None, without doing it, if too many wait already, or if `is_gone` says, when its turn comes, that
        nobody waits for it any more.  What `work` raises is raised.
        """
        if self._present >= self._places:
            return None
        self._present += 1
        try:
            async with self._free:
                return None if await is_gone() else await asyncio.to_thread(work)
        finally:
            self._present -= 1
