"""redis-py's connections with one deadline for the name and all of its addresses.

redis-py tries one address after the other, and gives each the whole `socket_connect_timeout`: a name with five
addresses that do not answer takes five times as long as one. Here they share the time. Each gets its part of what
is left, so that one that drops our packets does not keep us from the next.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections.abc import Callable
from typing import Any

import redis.asyncio

import redis
from stillroom.wire.idle import IdleTimeout, Lateness
from stillroom.wire.names import NAMES
from stillroom.wire.trust import Trust

LEAST_S = 0.001


def time_for(deadline: float, among: int = 1) -> float:
    """Return each one's part of the seconds that are left. Raises TimeoutError if there are none."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return max(LEAST_S, left / among)


class TcpConnection(redis.Connection):
    """Connects before `deadline`, which whoever makes it sets (time.monotonic())."""

    deadline = 0.0

    def _connect(self) -> Any:
        name, failure = self._host, OSError("the name has no address")
        addresses = NAMES.addresses(name, self.deadline)
        for number, address in enumerate(addresses):
            try:
                sock = self._connect_to(address, among=len(addresses) - number)
                NAMES.worked(name, address, addresses)
                return sock
            except OSError as error:
                failure = error
            finally:
                self._host = name  # TLS checks the certificate for the name, not for the address
        raise failure

    def _connect_to(self, address: str, *, among: int) -> Any:
        self._host = address
        self.socket_connect_timeout = self.socket_timeout = time_for(self.deadline, among)
        sock = super()._connect()  # type: ignore[no-untyped-call]
        try:
            sock.settimeout(time_for(self.deadline))  # the time that TLS may still take
        except TimeoutError:
            sock.close()
            raise
        return sock


class TlsConnection(redis.SSLConnection, TcpConnection):
    """Connect under TLS, with a context that whoever makes it sets. See TcpConnection."""

    ssl_context: Trust

    def _wrap_socket_with_ssl(self, sock: socket.socket) -> ssl.SSLSocket:
        return self.ssl_context.get().wrap_socket(sock, server_hostname=self._host)


class AsyncTcpConnection(redis.asyncio.Connection):
    """Connect for asyncio, before a deadline that moves by as much as the loop is late. See TcpConnection.

    `until` returns the deadline. Whoever makes the connection sets it.
    """

    until: Callable[[], float] = staticmethod(time.monotonic)

    async def _connect(self) -> None:
        name, failure = self.host, OSError("the name has no address")
        addresses = await NAMES.addresses_soon(name, self.until())
        for number, address in enumerate(addresses):
            try:
                part = time_for(self.until(), len(addresses) - number)
                async with IdleTimeout(Lateness(), time.monotonic() + part):
                    streams = await asyncio.open_connection(**self._arguments(address))
            except OSError as error:
                failure = error
                continue
            self._reader, self._writer = streams
            NAMES.worked(name, address, addresses)
            return self._set_options(self._writer.get_extra_info("socket"))
        raise failure

    def _arguments(self, address: str) -> dict[str, Any]:
        given = dict(self._connection_arguments()) | {"host": address}
        return given | ({"server_hostname": self.host} if "ssl" in given else {})

    def _set_options(self, sock: Any) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.socket_keepalive:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            options: Any = self.socket_keepalive_options
            for option, value in options.items():
                sock.setsockopt(socket.IPPROTO_TCP, option, value)


class AsyncTlsConnection(redis.asyncio.SSLConnection, AsyncTcpConnection):
    """Connect under TLS, for asyncio. See AsyncTcpConnection."""


# redis-py's class, as its URL names it → ours
DEADLINED: dict[type, type] = {
    redis.Connection: TcpConnection,
    redis.SSLConnection: TlsConnection,
}
FOR_ASYNCIO: dict[type, type] = {
    redis.Connection: AsyncTcpConnection,
    redis.SSLConnection: AsyncTlsConnection,
    redis.UnixDomainSocketConnection: redis.asyncio.UnixDomainSocketConnection,
}
