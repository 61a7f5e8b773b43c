"""redis-py's connections with one deadline for all addresses of a name.

redis-py tries one address after the other, and gives each the whole `socket_connect_timeout`: a name with five
addresses that do not answer takes five times as long as one. Here they share the time. Each gets its part of what
is left, so that one that drops our packets does not keep us from the next.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import time
from collections.abc import Mapping
from typing import Any

import redis.asyncio

import redis

LEAST_S = 0.001


class TcpConnection(redis.Connection):
    """Connects before `deadline`, which whoever makes it sets (time.monotonic())."""

    deadline = 0.0

    def _connect(self) -> Any:
        name, failure = self._host, OSError("the name has no address")
        found = socket.getaddrinfo(name, self.port, self.socket_type, socket.SOCK_STREAM)
        addresses = list(dict.fromkeys(str(address[0]) for *_, address in found))
        for number, address in enumerate(addresses):
            try:
                return self._connect_to(address, among=len(addresses) - number)
            except OSError as error:
                failure = error
            finally:
                self._host = name  # TLS checks the certificate for the name, not for the address
        raise failure

    def _connect_to(self, address: str, *, among: int) -> Any:
        self._host = address
        self.socket_connect_timeout = self.socket_timeout = self._left() / among
        sock = super()._connect()  # type: ignore[no-untyped-call]
        sock.settimeout(self._left())  # what TLS may still take
        return sock

    def _left(self) -> float:
        return _left(self.deadline)


class TlsConnection(redis.SSLConnection, TcpConnection):
    """The same under TLS."""


class AsyncTcpConnection(redis.asyncio.Connection):
    """The same for asyncio."""

    deadline = 0.0
    _address = ""

    async def _connect(self) -> None:
        failure = OSError("the name has no address")
        addresses = await _addresses(self.host, self.port)
        for number, address in enumerate(addresses):
            self._address = address
            self.socket_connect_timeout = _left(self.deadline) / (len(addresses) - number)
            try:
                await super()._connect()  # type: ignore[no-untyped-call]
                return
            except OSError as error:
                failure = error
        raise failure

    def _connection_arguments(self) -> Mapping[str, Any]:
        return {**super()._connection_arguments(), "host": self._address}


class AsyncTlsConnection(redis.asyncio.SSLConnection, AsyncTcpConnection):
    """The same under TLS, which checks the certificate for the name."""

    def _connection_arguments(self) -> Mapping[str, Any]:
        return {**super()._connection_arguments(), "server_hostname": self.host}


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return max(LEAST_S, left)


async def _addresses(host: str, port: int) -> list[str]:
    try:
        return [str(ipaddress.ip_address(host))]
    except ValueError:  # a name: its look-up takes a thread
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return list(dict.fromkeys(str(address[0]) for *_, address in found))


# redis-py's class, as its URL names it → ours, and ours for asyncio
DEADLINED = {redis.Connection: TcpConnection, redis.SSLConnection: TlsConnection}
ASYNC_DEADLINED = {
    redis.Connection: AsyncTcpConnection,
    redis.SSLConnection: AsyncTlsConnection,
    redis.UnixDomainSocketConnection: redis.asyncio.UnixDomainSocketConnection,
}
