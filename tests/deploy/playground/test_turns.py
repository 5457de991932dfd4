"""Whose turn it is at the detector."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from asag_deploy.playground.turns import Turns


async def stays() -> bool:
    return False


async def leaves() -> bool:
    return True


def test_they_come_in_order_and_no_more_than_so_many_wait() -> None:
    done: list[int] = []
    gate = threading.Event()

    def work(number: int) -> int:
        gate.wait()
        done.append(number)
        return number

    async def come() -> list[int | None]:
        turns = Turns(at_once=1, waiting=3)
        tasks = [asyncio.create_task(turns.take(lambda n=number: work(n), stays)) for number in range(6)]  # type: ignore[misc]
        await asyncio.sleep(0)
        gate.set()
        results = await asyncio.gather(*tasks)
        return [*results, await turns.take(lambda: work(9), stays)]

    assert asyncio.run(come()) == [0, 1, 2, 3, None, None, 9]  # there is room again
    assert done == [0, 1, 2, 3, 9]


def test_nothing_is_done_for_who_has_gone() -> None:
    done: list[int] = []

    async def come() -> object:
        return await Turns(at_once=1, waiting=1).take(lambda: done.append(1), leaves)

    assert asyncio.run(come()) is None
    assert done == []


def test_what_fails_leaves_the_turn_to_the_next() -> None:
    async def come() -> int | None:
        turns = Turns(at_once=1, waiting=0)
        with pytest.raises(ZeroDivisionError):
            await turns.take(lambda: 1 // 0, stays)
        return await turns.take(lambda: 7, stays)

    assert asyncio.run(come()) == 7


def test_a_turn_lasts_as_long_as_its_thread() -> None:
    """Who waits for it may be cancelled; a thread may not."""
    at_work: list[int] = []
    most: list[int] = []
    gate = threading.Event()

    def work() -> None:
        at_work.append(1)
        most.append(len(at_work))
        gate.wait()
        at_work.pop()

    async def come() -> None:
        turns = Turns(at_once=1, waiting=1)
        for _ in range(4):
            task = asyncio.create_task(turns.take(work, stays))
            while not most:
                await asyncio.sleep(0)
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        gate.set()
        await turns.take(work, stays)

    asyncio.run(come())
    assert most == [1, 1]  # the first, and the last: those between left while they waited


def test_as_many_work_at_once_as_it_says() -> None:
    """Asyncio's own threads are 32 and fewer."""
    together = threading.Barrier(40, timeout=20)

    async def come() -> list[int | None]:
        turns = Turns(at_once=40, waiting=0)
        return await asyncio.gather(*(turns.take(together.wait, stays) for _ in range(40)))

    assert len(set(asyncio.run(come()))) == 40


def test_a_line_that_does_not_answer_holds_nobody_up() -> None:
    async def never() -> bool:
        await asyncio.Event().wait()
        return True

    async def come() -> tuple[int | None, int | None]:
        turns = Turns(at_once=1, waiting=1, patience_seconds=0.01)
        return await asyncio.gather(turns.take(lambda: 1, never), turns.take(lambda: 2, stays))

    assert list(asyncio.run(asyncio.wait_for(come(), 10))) == [1, 2]


def test_the_end_waits_for_what_is_still_done() -> None:
    """What it works with goes right after."""
    done: list[int] = []
    begun = threading.Event()

    def work() -> None:
        begun.set()
        time.sleep(0.2)
        done.append(1)

    async def come(turns: Turns) -> None:
        task = asyncio.create_task(turns.take(work, stays))
        while not begun.is_set():
            await asyncio.sleep(0)
        task.cancel()

    with Turns(at_once=1) as turns:
        asyncio.run(come(turns))
    assert done == [1]
