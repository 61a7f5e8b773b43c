"""The floor that everything is measured from: a raw round trip, by a plain socket and hiredis."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Literal, cast
from urllib.parse import urlsplit

import hiredis

import redis
from bench.harness import AsyncHit, Contestant, Hit

# hiredis types its argument as a tuple of one.
pack = cast("Callable[[tuple[str, ...]], bytes]", hiredis.pack_command)

READ_SIZE = 65536  # bytes
PLAIN, PLAIN_SIZE = "bench:plain", 250  # bytes


def floors(url: str) -> list[Contestant]:
    """Return the floors: one round trip that reads some bytes, blocking and in an event loop."""
    with redis.Redis.from_url(url) as client:
        client.set(PLAIN, "x" * PLAIN_SIZE)
    return [
        Contestant("raw round trip", "floor", partial(_floor, url), package="hiredis"),
        Contestant(
            "async raw round trip", "floor", partial(_async_floor, url), "async", package="hiredis"
        ),
    ]


@contextmanager
def _floor(url: str) -> Iterator[Hit]:
    command = pack(("GET", PLAIN))
    with connection(url) as exchange:
        yield lambda: exchange(command)


@asynccontextmanager
async def _async_floor(url: str) -> AsyncIterator[AsyncHit]:
    command = pack(("GET", PLAIN))
    async with async_connection(url) as exchange:
        yield lambda: exchange(command)


@contextmanager
def connection(url: str) -> Iterator[Callable[[bytes], bytes]]:
    """Yield a function that sends one packed command and returns its reply."""
    replies = hiredis.Reader()
    with socket.create_connection(_where(url)) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def exchange(command: bytes) -> bytes:
            sock.sendall(command)
            while True:
                replies.feed(sock.recv(READ_SIZE))
                reply: bytes | Literal[False] = replies.gets()
                if reply is not False:
                    return reply

        yield exchange


@asynccontextmanager
async def async_connection(url: str) -> AsyncIterator[Callable[[bytes], Awaitable[bytes]]]:
    """Yield the same on asyncio's streams.

    asyncio sets TCP_NODELAY itself, and forty bytes never fill its write buffer.
    """
    replies = hiredis.Reader()
    stream, writer = await asyncio.open_connection(*_where(url))

    async def exchange(command: bytes) -> bytes:
        writer.write(command)
        while True:
            replies.feed(await stream.read(READ_SIZE))
            reply: bytes | Literal[False] = replies.gets()
            if reply is not False:
                return reply

    yield exchange
    writer.close()
    await writer.wait_closed()


def _where(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    return parts.hostname or "127.0.0.1", parts.port or 6379
