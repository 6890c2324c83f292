"""What is handed from the engine's thread to the tasks that answer."""

from __future__ import annotations

import asyncio

from align.serve.mailbox import Inbox


def test_a_task_is_woken_once_for_all_letters():
    async def taken() -> list[list[int]]:
        inbox, found = Inbox[int](), list[list[int]]()

        async def reading() -> None:
            while sum(map(len, found)) < 6:
                found.append(await inbox.take())

        reader = asyncio.create_task(reading())
        for letters in ((0, 1, 2), (3,), (4, 5)):
            await asyncio.sleep(0)  # the reader waits
            for letter in letters:
                inbox.put(letter)
            await asyncio.sleep(0)
        await asyncio.wait_for(reader, 5)
        return found

    assert asyncio.run(taken()) == [[0, 1, 2], [3], [4, 5]]


def test_letters_outlive_a_task_that_was_cancelled():
    async def taken() -> list[int]:
        inbox = Inbox[int]()
        first = asyncio.create_task(inbox.take())
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.sleep(0)
        inbox.put(1)
        inbox.put(2)
        return await asyncio.wait_for(inbox.take(), 5)

    assert asyncio.run(taken()) == [1, 2]
