"""Receiving from ZMQ without a future a message: nothing is missed, nobody else is kept waiting."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import zmq

from voltana.hwreplay.messages.inbox import MAX_BURST, Inbox


@contextmanager
def pipe(tmp_path: Path) -> Iterator[tuple[zmq.Socket[bytes], Inbox]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    push, pull = context.socket(zmq.PUSH), context.socket(zmq.PULL)
    for socket in (push, pull):
        socket.set_hwm(0)
    pull.bind(f"ipc://{tmp_path}/pipe")
    push.connect(f"ipc://{tmp_path}/pipe")
    inbox = Inbox(pull)
    try:
        yield push, inbox
    finally:
        inbox.close()
        for socket in (push, pull):
            socket.close(linger=0)
        context.term()


def test_messages_come_in_order_however_they_are_bunched(tmp_path: Path) -> None:
    """ZMQ tells of a bunch once: one larger than a turn takes has to be gone on with unasked."""
    bunches = [1, MAX_BURST, 1, 3 * MAX_BURST + 5, 2]

    async def play() -> None:
        with pipe(tmp_path) as (push, inbox):
            count = 0
            for size in bunches:
                first = asyncio.create_task(inbox.receive())
                await asyncio.sleep(0.02)  # it waits
                for number in range(count, count + size):
                    push.send_multipart((b"topic", str(number).encode()))
                async with asyncio.timeout(10):
                    found = [await first] + [await inbox.receive() for _ in range(size - 1)]
                assert found == [str(n).encode() for n in range(count, count + size)]
                count += size

    asyncio.run(play())


def test_a_flood_leaves_others_their_turn(tmp_path: Path) -> None:
    size = 40 * MAX_BURST

    async def play() -> None:
        with pipe(tmp_path) as (push, inbox):
            for _ in range(size):
                push.send(b"x")
            turns = 0

            async def count_turns() -> None:
                nonlocal turns
                while True:
                    turns += 1
                    await asyncio.sleep(0)

            other = asyncio.create_task(count_turns())
            async with asyncio.timeout(30):
                for _ in range(size):
                    await inbox.receive()
            other.cancel()
            assert turns >= size // MAX_BURST

    asyncio.run(play())
