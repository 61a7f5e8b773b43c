"""The limits' two faces: `Limits` for threads, `AsyncLimits` for asyncio."""

from __future__ import annotations

from collections.abc import Iterable

from stillroom.face import Face, awaiting, blocking
from stillroom.limits.body import LimitsBody
from stillroom.limits.identity import Clients, Header
from stillroom.operation import AsyncDriver, Driver


class _Face(Face):
    """What needs neither Redis nor an event loop."""

    def __init__(self, body: LimitsBody) -> None:
        self._body = body
        self._clients = Clients(body.settings)

    def client(self, peer: str | None, headers: Iterable[Header] = ()) -> str:
        """Who sends this request, as `check` takes it: an IPv4 address, an IPv6 network, or "unknown".

        `peer`: whom the connection is from, with or without a port; None or "" for a socket file. `headers`: (name,
        value) of the request, in their order; they are only believed from `trusted_proxies`. Never awaited.
        """
        return self._clients.subject(peer, headers)


class Limits(_Face):
    """The limits for threads and greenlets: `room.limits`."""

    def __init__(self, body: LimitsBody, driver: Driver) -> None:
        super().__init__(body)
        self._driver = driver

    check = blocking(LimitsBody.check)
    peek = blocking(LimitsBody.peek)
    reserve = blocking(LimitsBody.reserve)
    refund = blocking(LimitsBody.refund)
    commit = blocking(LimitsBody.commit)
    reset = blocking(LimitsBody.reset)


class AsyncLimits(_Face):
    """The limits for asyncio: `room.limits`. The same names, awaited."""

    def __init__(self, body: LimitsBody, driver: AsyncDriver) -> None:
        super().__init__(body)
        self._driver = driver

    check = awaiting(LimitsBody.check)
    peek = awaiting(LimitsBody.peek)
    reserve = awaiting(LimitsBody.reserve)
    refund = awaiting(LimitsBody.refund)
    commit = awaiting(LimitsBody.commit)
    reset = awaiting(LimitsBody.reset)
