"""A primary, its replicas and three Sentinels, all real, and the accidents they are there for.

Everybody reaches a server by its public address, 127.0.0.2, which a test may cut off. Sentinels give this address
to clients too. A client that sits beside the server may be let through to 127.0.0.1: see `beside_the_servers`.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self
from unittest.mock import patch

import redis
from stillroom.embedded import HOST, START_WITHIN, EmbeddedServer, _binary_from_wheel, free_port
from stillroom.leash import Leashed, until
from stillroom.wire.names import NAMES, Names
from tests.support.certificates import Authority
from tests.support.proxy import Proxy

MASTER = "mymaster"
PUBLIC = "127.0.0.2"
AGREED_WITHIN_S = 60.0  # a busy machine elects slowly
DOWN_AFTER_MS = 1_000
QUORUM = 2
COPIED_AT_ONCE = {"repl-diskless-sync-delay": "0"}  # a primary waits 5 s for further replicas
# Sentinels make a replica of a primary that has come back when they have looked at it for long enough.
# (Were they to ping more often, all would give it up at the same moment, and none would be elected to act.)
HASTE = {"INFO-PERIOD": 500, "PUBLISH-PERIOD": 250}  # ms


class Sentinel(EmbeddedServer):
    """One Sentinel, whose file is kept when it is started again."""

    def __init__(self, binary: str | None, folder: Path, **given: Any) -> None:
        server = shutil.which(binary) if binary else str(_binary_from_wheel())
        wrapper = folder / "sentinel"
        if not wrapper.exists():
            wrapper.write_text(f'#!/bin/sh\nexec {server} "$@" --sentinel\n')
            wrapper.chmod(0o755)
        super().__init__(binary=str(wrapper), **given)

    def _wait_until_ready(self, server: Leashed, log_begin: int) -> None:
        """Wait without QUIT, which a Sentinel does not know."""

        def is_there() -> bool:
            with contextlib.suppress(redis.RedisError), redis.Redis(port=self._port) as client:
                return bool(client.ping())
            return server.exit_code is not None

        assert until(is_there, START_WITHIN), "the Sentinel did not start"
        if server.exit_code is not None:
            super()._wait_until_ready(server, log_begin)

    def _configuration(self) -> str:
        written = self._started_in() / "server.conf"
        if written.exists() and "sentinel" in written.read_text():
            return written.read_text()
        return super()._configuration()


class Sentinels:
    """Started with the `with` block. `servers[0]` is the primary when that begins.

    `proxied`: servers and clients meet through a proxy in front of each server, which `cut` closes. `options`: of
    the servers' files; `sentinel_options`: of the Sentinels'. `authority`: it signs for all of them,
    who meet by TLS.
    """

    def __init__(
        self,
        folder: Path,
        *,
        binary: str | None = None,
        replicas: int = 2,
        sentinels: int = 3,
        proxied: bool = False,
        down_after_ms: int = DOWN_AFTER_MS,
        options: Mapping[str, str] = {},
        sentinel_options: Mapping[str, str] = {},
        password: str | None = None,
        authority: Authority | None = None,
    ) -> None:
        self._stack = ExitStack()
        self._proxied = proxied
        self._down_after_ms = down_after_ms
        self._password = password
        self._authority = authority
        self._tls_ports: dict[EmbeddedServer, int] = {}
        login = {} if password is None else {"requirepass": password, "masterauth": password}
        more = {**COPIED_AT_ONCE, "repl-ping-replica-period": "1"}
        if proxied:  # in the file: a server that is started again announces the same address
            more["replica-announce-ip"] = PUBLIC
        self.servers = [
            self._met(EmbeddedServer, binary=binary, options={**more, **login, **options})
            for _ in range(1 + replicas)
        ]
        self.sentinels = [
            self._met(Sentinel, binary, folder, options=sentinel_options) for _ in range(sentinels)
        ]
        self._proxies: dict[EmbeddedServer, Proxy] = {}
        self._clients: dict[EmbeddedServer, Any] = {}

    def _met(self, kind: Any, *given: Any, options: Mapping[str, str], **more: Any) -> Any:
        """Yield a server or Sentinel, with a second port for those who meet it by TLS."""
        if self._authority is None:
            return kind(*given, options=options, **more)
        port, own = free_port(), self._authority.sign(f"server-{len(self._tls_ports)}", HOST)
        tls = {
            "tls-port": str(port),
            "tls-replication": "yes",
            "tls-cert-file": str(own.certificate),
            "tls-key-file": str(own.key),
            "tls-ca-cert-file": str(self._authority.certificate),
        }
        server = kind(*given, options={**options, **tls}, **more)
        self._tls_ports[server] = port
        return server

    def port(self, server: EmbeddedServer) -> int:
        """Return the port where the others and their clients meet it."""
        return self._tls_ports.get(server, server.port)

    # Addresses

    @property
    def url(self) -> str:
        """Return the URL for a room's settings."""
        return self.url_to(self.sentinels)

    def url_to(self, sentinels: Sequence[EmbeddedServer], database: int = 0) -> str:
        hosts = ",".join(f"{HOST}:{self.port(sentinel)}" for sentinel in sentinels)
        who = "" if self._password is None else f":{self._password}@"
        if self._authority is None:
            return f"redis+sentinel://{who}{hosts}/{MASTER}/{database}"
        client = self._authority.sign("client")  # they ask for one
        trusted = f"ssl_ca_certs={self._authority.certificate}"
        trusted += f"&ssl_certfile={client.certificate}&ssl_keyfile={client.key}"
        return f"rediss+sentinel://{who}{hosts}/{MASTER}/{database}?{trusted}"

    @property
    def host(self) -> str:
        return PUBLIC if self._proxied else HOST

    def client(self, server: EmbeddedServer) -> Any:
        """Return a plain client of one server or Sentinel, past all proxies."""
        if server not in self._clients:
            password = self._password if server in self.servers else None
            client = redis.Redis(
                port=server.port, protocol=2, password=password, socket_timeout=2.0
            )
            client.response_callbacks.clear()
            self._clients[server] = self._stack.enter_context(client)
        return self._clients[server]

    @property
    def primary(self) -> EmbeddedServer:
        """Return the server that most Sentinels name as primary."""
        return self._at(self._agreed_port())

    def replication(self, server: EmbeddedServer) -> dict[str, str]:
        """Return the reply to INFO replication."""
        text = self.client(server).execute_command("INFO", "replication").decode()
        return dict(line.split(":", 1) for line in text.splitlines() if ":" in line)

    # Accidents

    def promote_another(self) -> EmbeddedServer:
        """Wait until another server than the former primary is primary; return it."""
        before = self._before
        return self.await_primary(lambda server: server is not before)

    @contextmanager
    def accident(self, kind: str) -> Iterator[EmbeddedServer]:
        """Have the primary `killed`, `frozen` or `cut` off. Within the block another one takes over.

        Afterwards the old one is back, as a replica of the new one.
        """
        old = self._before = self.primary
        begin, end = {
            "killed": (old.kill, lambda: self._restart(old)),
            "frozen": (old.freeze, old.thaw),
            "cut": (lambda: self.cut(old), lambda: self.heal(old)),
        }[kind]
        begin()
        try:
            yield old
        finally:
            end()
        self.await_replicas()

    def cut(self, server: EmbeddedServer) -> None:
        """Have nobody reach it at its public address. Connections there are silent."""
        self._proxies[server].cut()

    def demote(self) -> None:
        """Order a failover by hand. A Sentinel refuses it while it has not heard from a replica."""
        asked = self.client(self.sentinels[0])
        self.await_that(
            "a failover is accepted",
            lambda: bool(asked.execute_command("SENTINEL", "FAILOVER", MASTER)),
        )

    def heal(self, server: EmbeddedServer) -> None:
        self._proxies[server].heal()

    def await_primary(self, good: Callable[[EmbeddedServer], bool]) -> EmbeddedServer:
        """Wait until most Sentinels name such a server, and it is in office."""
        found: list[EmbeddedServer] = []

        def holds() -> bool:
            port = self._named_port()
            if port is None or not good(server := self._at(port)):
                return False
            found[:] = [server]
            return self.replication(server)["role"] == "master"

        self.await_that("another primary is named", holds)
        return found[0]

    def await_replicas(self) -> None:
        """Wait until all others follow the primary, and the Sentinels know them."""
        others = len(self.servers) - 1
        self.await_that("the others follow", lambda: self._followers() == others)

    def await_copies(self) -> None:
        """Wait until all replicas have all that the primary has written, whoever is the primary by then."""
        self.await_that("the others have all", lambda: self._copied() == len(self.servers) - 1)

    def _copied(self) -> int:
        """Return how many replicas have all by now, or within a second."""
        with self.client(self.primary).pipeline(transaction=False) as batch:
            batch.execute_command("SET", "copied", "1", "PX", "1")
            batch.execute_command("WAIT", len(self.servers) - 1, 1_000)
            return int(batch.execute()[1])

    def await_that(self, what: str, holds: Callable[[], bool]) -> None:
        until = time.monotonic() + AGREED_WITHIN_S
        while True:
            with contextlib.suppress(redis.RedisError, OSError):
                if holds():
                    return
            assert time.monotonic() < until, f"the Sentinels did not come to this: {what}"
            time.sleep(0.02)

    # Inside

    def __enter__(self) -> Self:
        try:
            self._form()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _form(self) -> None:
        for server in self.servers:
            self._stack.enter_context(server)
            if self._proxied:
                proxy = Proxy(server.port, host=PUBLIC, own_port=server.port)
                self._proxies[server] = self._stack.enter_context(proxy)
        first, *others = self.servers
        self._before = first
        for server in others:
            self.client(server).execute_command("REPLICAOF", self.host, self.port(first))
        self.await_that("replicas follow", lambda: self._following(first) == len(others))
        for sentinel in self.sentinels:
            self._stack.enter_context(sentinel)
            self._brief(sentinel, first)
        self.await_that("the Sentinels know everybody", self._is_complete)

    def _brief(self, sentinel: Sentinel, primary: EmbeddedServer) -> None:
        ask = self.client(sentinel).execute_command
        ask("SENTINEL", "MONITOR", MASTER, self.host, self.port(primary), QUORUM)
        given = {
            "down-after-milliseconds": self._down_after_ms,
            "failover-timeout": 2_000,
            "parallel-syncs": 2,
        }
        if self._password is not None:
            given["auth-pass"] = self._password
        for name, value in given.items():
            ask("SENTINEL", "SET", MASTER, name, value)
        with contextlib.suppress(redis.ResponseError):  # Redis 6 has no such word
            for name, value in HASTE.items():
                ask("SENTINEL", "DEBUG", name, value)

    def _is_complete(self) -> bool:
        told = [self._about(sentinel) for sentinel in self.sentinels]
        wanted = len(self.servers) - 1, len(self.sentinels) - 1
        return all((int(t["num-slaves"]), int(t["num-other-sentinels"])) == wanted for t in told)

    def _about(self, sentinel: EmbeddedServer) -> dict[str, str]:
        told = self.client(sentinel).execute_command("SENTINEL", "MASTER", MASTER)
        texts = [part.decode() for part in told]
        return dict(zip(texts[::2], texts[1::2], strict=True))

    def _named_port(self) -> int | None:
        """Return the port that most Sentinels name."""
        ports: list[int] = []
        for sentinel in self.sentinels:
            with contextlib.suppress(redis.RedisError, OSError):
                ask = self.client(sentinel).execute_command
                ports.append(int(ask("SENTINEL", "GET-MASTER-ADDR-BY-NAME", MASTER)[1]))
        most = max(ports, key=ports.count, default=None)
        return most if most and ports.count(most) > len(self.sentinels) // 2 else None

    def _agreed_port(self) -> int:
        self.await_that("they agree", lambda: self._named_port() is not None)
        port = self._named_port()
        assert port is not None
        return port

    def _at(self, port: int) -> EmbeddedServer:
        return next(server for server in self.servers if self.port(server) == port)

    def _followers(self) -> int:
        return self._following(self._at(self._agreed_port()))

    def _following(self, primary: EmbeddedServer) -> int:
        told = self.replication(primary)
        return sum("state=online" in value for name, value in told.items() if name[:5] == "slave")

    def _restart(self, old: EmbeddedServer) -> None:
        """Restart it as a container that comes back, with its last file or none."""
        old.restart()
        with contextlib.suppress(redis.RedisError):
            self._clients.pop(old).close()
        self.client(old).execute_command("REPLICAOF", self.host, self.port(self.primary))


@contextmanager
def beside_the_servers() -> Iterator[None]:
    """Let this process reach the servers without their proxies, on their side of a partition."""
    real = Names.addresses

    def addresses(self: Names, host: str, deadline: float) -> tuple[str, ...]:
        return (HOST,) if host == PUBLIC else real(self, host, deadline)

    async def addresses_soon(self: Names, host: str, deadline: float) -> tuple[str, ...]:
        return addresses(NAMES, host, deadline)

    with (
        patch.object(Names, "addresses", addresses),
        patch.object(Names, "addresses_soon", addresses_soon),
    ):
        yield
