"""The limits' two faces: `Limits` for threads, `AsyncLimits` for asyncio."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from stillroom.face import Service, awaiting, blocking
from stillroom.limits.body import LimitsBody
from stillroom.limits.identity import Clients, Headers
from stillroom.limits.limit import Limit
from stillroom.limits.request import Subject
from stillroom.limits.reservation import Reservation
from stillroom.misuse import explained, refuse_other
from stillroom.wire import to_its_end


class _Face(Service):
    """The part of both faces that needs neither Redis nor an event loop."""

    _body: LimitsBody

    def __init__(self, body: LimitsBody, driver: Any) -> None:
        super().__init__(body, driver)
        self._clients = Clients(body.settings)

    def client(self, peer: str | None, headers: Headers = ()) -> str:
        """Return the client of a request, as `check` takes it: an IPv4 address, an IPv6 network, or "unknown".

        `peer`: whom the connection is from, with or without a port. For a socket file it is None, "", or what a
        server writes instead ("localhost", "<local>", "unix", "0.0.0.0"). `headers`: (name, value) of the request,
        in their order, or a mapping of them; they are only believed from `trusted_proxies`. Never awaited. Raises
        InvalidArgument.
        """
        if type(peer) is not str and peer is not None:
            refuse_other(
                "peer", peer, str, "the text of an address; of a (host, port) give the host"
            )
        return self._clients.subject(peer, headers)


class Limits(_Face):
    """The limits for threads and greenlets: `room.limits`."""

    check = blocking(LimitsBody.check)
    peek = blocking(LimitsBody.peek)
    reserve = blocking(LimitsBody.reserve)
    wait = blocking(LimitsBody.wait)
    refund = blocking(LimitsBody.refund)
    settle = blocking(LimitsBody.settle)
    commit = blocking(LimitsBody.commit)
    reset = blocking(LimitsBody.reset)
    change = blocking(LimitsBody.change)
    restore = blocking(LimitsBody.restore)
    changes = blocking(LimitsBody.changes)
    names = blocking(LimitsBody.names)

    @explained
    @contextmanager
    def hold(
        self, subject: Subject, limits: Sequence[Limit], cost: int = 1, *, route: str = ""
    ) -> Iterator[Reservation]:
        """Hold a place for the length of a `with` (or `async with`) block, for `Limit(…, in_flight=True)`.

        The block gets a reservation, which is false if there is no place; the block runs all the same and has to
        look at it. At the end of the block the place is given back, even if it raises; what other limits have
        counted stays consumed. If the process dies, the place is free when the lease ends. Raises InvalidLimit.
        Redis away: this process has its share of the places; those taken in Redis are given back when it is back.
        """
        process = os.getpid()
        held = self._driver.run(self._body.hold(subject, limits, cost, route=route))
        try:
            yield held
        finally:
            if process == os.getpid():  # a child that was forked in the block leaves it, too
                self._driver.run(self._body.let_go(held))


class AsyncLimits(_Face):
    """The limits for asyncio: `room.limits`. The same names, awaited."""

    check = awaiting(LimitsBody.check)
    peek = awaiting(LimitsBody.peek)
    reserve = awaiting(LimitsBody.reserve)
    wait = awaiting(LimitsBody.wait)
    refund = awaiting(LimitsBody.refund)
    settle = awaiting(LimitsBody.settle)
    commit = awaiting(LimitsBody.commit)
    reset = awaiting(LimitsBody.reset)
    change = awaiting(LimitsBody.change)
    restore = awaiting(LimitsBody.restore)
    changes = awaiting(LimitsBody.changes)
    names = awaiting(LimitsBody.names)

    @explained
    @asynccontextmanager
    async def hold(
        self, subject: Subject, limits: Sequence[Limit], cost: int = 1, *, route: str = ""
    ) -> AsyncIterator[Reservation]:
        """Hold a place for the length of a `with` (or `async with`) block, for `Limit(…, in_flight=True)`.

        The block gets a reservation, which is false if there is no place; the block runs all the same and has to
        look at it. At the end of the block the place is given back, even if it raises; what other limits have
        counted stays consumed. If the process dies, the place is free when the lease ends. Raises InvalidLimit.
        Redis away: this process has its share of the places; those taken in Redis are given back when it is back.
        """
        process = os.getpid()
        held = await self._driver.run(self._body.hold(subject, limits, cost, route=route))
        try:
            yield held
        finally:
            if process == os.getpid():
                await to_its_end(self._driver.run(self._body.let_go(held)))
