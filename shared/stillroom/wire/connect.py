"""redis-py's connections with one deadline for all addresses of a name.

redis-py tries one address after the other, and gives each the whole `socket_connect_timeout`: a name with five
addresses that do not answer takes five times as long as one. Here they share the time. Each gets its part of what
is left, so that one that drops our packets does not keep us from the next.
"""

from __future__ import annotations

import socket
import time
from typing import Any

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
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return max(LEAST_S, left)


class TlsConnection(redis.SSLConnection, TcpConnection):
    """The same under TLS."""


# redis-py's class, as its URL names it → ours
DEADLINED = {redis.Connection: TcpConnection, redis.SSLConnection: TlsConnection}
