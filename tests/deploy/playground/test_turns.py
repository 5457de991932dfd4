"""Whose turn it is at the detector."""

from __future__ import annotations

import asyncio
import threading

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
