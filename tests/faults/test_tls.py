"""TLS with an authority of one's own works for both faces, orders and workers, and refuses what it must."""

from __future__ import annotations

import shutil
import socket
import ssl
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import redis
from stillroom import NoDispatch, RedisUnavailable, Settings, Stillroom
from stillroom.broker import reach
from stillroom.embedded import EmbeddedServer, EmbeddedServerError, free_port
from stillroom.wire import Server
from tests.support.celery_process import CeleryProcess, until
from tests.support.certificates import Authority
from tests.support.faces import FACES, open_room

NAME = "redis.test"
PATIENT = {"connect_timeout": 5, "command_timeout": 5, "call_timeout": 10}


class TlsServer(EmbeddedServer):
    """A server that also listens for TLS; with `asks` it wants a certificate of its clients."""

    def __init__(
        self, folder: Path, *addresses: str, asks: bool = False, says_its_use: bool = True
    ) -> None:
        self.authority = Authority(folder, says_its_use=says_its_use)
        self.own = self.authority.sign(NAME, *addresses)
        self.client = self.authority.sign("client")
        self.tls_port = free_port()
        options = {
            "tls-port": str(self.tls_port),
            "tls-cert-file": str(self.own.certificate),
            "tls-key-file": str(self.own.key),
            "tls-ca-cert-file": str(self.authority.certificate),
            "tls-auth-clients": "yes" if asks else "no",
        }
        super().__init__(binary="redis-server", options=options)

    def tls_url(self, authority: Authority | None = None, *, certified: bool = False) -> str:
        options = [] if authority is None else [f"ssl_ca_certs={authority.certificate}"]
        if certified:
            options += [f"ssl_certfile={self.client.certificate}", f"ssl_keyfile={self.client.key}"]
        return f"rediss://127.0.0.1:{self.tls_port}/0?{'&'.join(options)}"


@pytest.fixture(scope="module")
def make_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., TlsServer]]:
    """Return a function that starts servers for the module; skip where there is none with TLS."""
    if not Authority.is_possible() or shutil.which("redis-server") is None:
        pytest.skip("there is no openssl, or no redis-server with TLS")
    with ExitStack() as stack:

        def make(*addresses: str, **options: bool) -> TlsServer:
            server = TlsServer(tmp_path_factory.mktemp("tls"), *addresses, **options)
            try:
                return stack.enter_context(server)
            except EmbeddedServerError as error:
                pytest.skip(f"this redis-server has no TLS: {error}")

        yield make


@pytest.fixture(scope="module")
def server(make_server: Callable[..., TlsServer]) -> TlsServer:
    return make_server("127.0.0.1")


@pytest.fixture(params=FACES)
def face(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def opened(stack: ExitStack, face: str, url: str, **changes: Any) -> Any:
    settings = Settings(**{"redis_url": url, "session_peppers": "p" * 40} | PATIENT | changes)
    return stack.enter_context(open_room(face, settings, NoDispatch()))


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_a_full_server_is_not_taken_for_one_without_tls(
    server: TlsServer, stack: ExitStack, face: str
) -> None:
    """A server that has as many clients as it may cuts the handshake of TLS off, and the error says `closed`."""
    with redis.Redis.from_url(server.url) as admin:
        admin.ping()
        before = admin.config_get("maxclients")["maxclients"]
        admin.config_set("maxclients", len(admin.client_list()))
        try:
            room = opened(stack, face, server.tls_url(server.authority))
            with pytest.raises(RedisUnavailable, match=r"\(closed\)"):
                room.cache.invalidate("k")
        finally:
            admin.config_set("maxclients", before)


def test_a_room_speaks_tls_with_an_authority_of_ones_own(
    server: TlsServer, stack: ExitStack, face: str
) -> None:
    """A room over TLS with its own authority reads small and large values, sessions, and on idle connections."""
    room = opened(stack, face, server.tls_url(server.authority))
    room.connect()
    large = "x" * 500_000
    assert room.cache.set("large", large)
    assert room.cache.get("large") == large
    session = room.sessions.create("u1")
    assert room.sessions.get(session).user_id == "u1"
    assert room.cache.invalidate("large") == 1


def test_a_certificate_of_nobody_known_is_refused(
    server: TlsServer, stack: ExitStack, face: str, tmp_path: Path
) -> None:
    """A certificate of an unknown or another authority is refused at once with the missing option."""
    for authority in (None, Authority(tmp_path, "another")):
        room = opened(stack, face, server.tls_url(authority), connect_delay=60)
        with pytest.raises(RedisUnavailable, match=r"\(tls\).*REDIS_URL.*ssl_ca_certs"):
            room.connect()
        assert room.cache.set("k", 1) is False


@pytest.mark.skipif(sys.version_info < (3, 13), reason="Python before 3.13 trusts it")
def test_an_authority_that_a_newer_python_does_not_trust_is_told(
    make_server: Callable[..., TlsServer], stack: ExitStack, face: str
) -> None:
    """An authority whose certificate says no use of its key is refused, and the error says who wants that."""
    lax = make_server("127.0.0.1", says_its_use=False)
    room = opened(stack, face, lax.tls_url(lax.authority), connect_delay=60)
    with pytest.raises(
        RedisUnavailable, match=r"key usage extension, which Python 3\.13 and newer"
    ):
        room.connect()


def test_a_certificate_of_another_name_is_refused(
    make_server: Callable[..., TlsServer], stack: ExitStack, face: str
) -> None:
    """A certificate for redis.test is refused for a URL with 127.0.0.1."""
    elsewhere = make_server()
    room = opened(stack, face, elsewhere.tls_url(elsewhere.authority), connect_delay=60)
    with pytest.raises(RedisUnavailable, match=r"\(tls\).*127\.0\.0\.1|\(tls\).*certificate"):
        room.connect()


def test_connections_share_what_they_trust_until_its_file_is_replaced(
    server: TlsServer, stack: ExitStack, face: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One context of TLS, which takes 40 ms to make, serves all connections. Another file means another context."""
    make, made = ssl.create_default_context, []
    monkeypatch.setattr(ssl, "create_default_context", lambda: made.append(1) or make())
    trusted = Authority(tmp_path / "own", "trusted")
    right = server.authority.certificate.read_bytes()
    trusted.certificate.write_bytes(right)
    room = opened(stack, face, server.tls_url(trusted), breaker_failures=50)
    with redis.Redis.from_url(server.url) as admin:
        for _ in range(3):
            assert room.cache.set("k", 1)
            admin.client_kill_filter(_type="normal", skipme=True)
        assert len(made) == 1
        trusted.certificate.write_bytes(Authority(tmp_path, "another").certificate.read_bytes())
        assert room.cache.get("k") is None
        trusted.certificate.write_bytes(right)
        assert room.cache.get("k") == 1
        assert len(made) == 3


def test_the_nodes_of_a_cluster_share_what_they_trust(monkeypatch: pytest.MonkeyPatch) -> None:
    """An event loop that gets to know the nodes of a cluster makes one context of TLS for all of them."""
    make, made = ssl.create_default_context, []
    monkeypatch.setattr(ssl, "create_default_context", lambda: made.append(1) or make())
    urls = [f"rediss://10.0.0.{n}:6379?ssl_ciphers=HIGH" for n in range(3)]
    nodes = [Server(Settings(), url, "Redis", is_node=True) for url in urls]
    assert len(made) == 1 < len(nodes)


@pytest.mark.parametrize("option", ["ssl_ciphers=none", "ssl_ca_certs=/is/missing"])
def test_an_option_that_can_not_be_followed_is_said(
    server: TlsServer, stack: ExitStack, face: str, option: str
) -> None:
    """Ciphers that nobody knows, or a file that is missing, are a fault of TLS. Calls go on without Redis."""
    url = f"{server.tls_url()}{option}"
    room = opened(stack, face, url, connect_delay=60, connect_attempts=1)
    with pytest.raises(RedisUnavailable, match=r"\(tls\).*REDIS_URL.*ssl_ca_certs"):
        room.connect()
    assert room.cache.get_or_set("k", lambda: 2) == 2


def test_the_option_whose_file_can_not_be_used_is_named(
    server: TlsServer, stack: ExitStack, face: str, tmp_path: Path
) -> None:
    """The error names the option and what is wrong with its file, and no path. "PEM lib" alone tells nobody."""
    junk, key = tmp_path / "junk.pem", Authority(tmp_path, "another").sign("client").key
    junk.write_text("junk")
    certificate, trusted = server.client.certificate, server.tls_url(server.authority)
    for url, says in (
        (f"{server.tls_url()}ssl_ca_certs=/is/missing", "ssl_ca_certs can't be read: No such file"),
        (f"{server.tls_url()}ssl_ca_certs={junk}", "ssl_ca_certs holds no certificate"),
        (f"{trusted}&ssl_certfile={tmp_path}", "ssl_certfile can't be read: Is a directory"),
        (f"{trusted}&ssl_certfile={certificate}", "ssl_certfile and ssl_keyfile hold no"),
        (
            f"{trusted}&ssl_certfile={certificate}&ssl_keyfile={key}",
            "the key in ssl_keyfile is not",
        ),
    ):
        room = opened(stack, face, url, connect_delay=60, connect_attempts=1)
        with pytest.raises(RedisUnavailable, match=rf"\(tls\).*REDIS_URL \({says}") as caught:
            room.connect()
        assert str(tmp_path) not in str(caught.value)


def test_a_server_may_want_a_certificate_of_its_clients(
    make_server: Callable[..., TlsServer], stack: ExitStack, face: str
) -> None:
    """Where the server wants client certificates a room with one is let in and one without falls back."""
    asking = make_server("127.0.0.1", asks=True)
    room = opened(stack, face, asking.tls_url(asking.authority, certified=True))
    assert room.cache.set("k", 1)
    without = opened(stack, face, asking.tls_url(asking.authority))
    assert without.cache.get("k") is None
    assert without.cache.get_or_set("k", lambda: 2) == 2
    with pytest.raises(RedisUnavailable, match=r"REDIS_URL.*(ssl_certfile|CERTIFICATE_REQUIRED)"):
        without.cache.invalidate("k")


def test_a_certificate_that_the_server_refuses_is_told_in_words(
    make_server: Callable[..., TlsServer], stack: ExitStack, face: str, tmp_path: Path
) -> None:
    """A client's certificate of another authority is named by its option. What the server said may be lost."""
    asking = make_server("127.0.0.1", asks=True)
    own = Authority(tmp_path, "another").sign("client")
    url = f"{asking.tls_url(asking.authority)}&ssl_certfile={own.certificate}&ssl_keyfile={own.key}"
    room = opened(stack, face, url, connect_delay=60, connect_attempts=1)
    with pytest.raises(RedisUnavailable, match=r"does not know the authority|closed.*ssl_certfile"):
        room.connect()


def test_what_speaks_no_tls_is_told_as_that(stack: ExitStack, face: str) -> None:
    """The error does not send anybody to look for certificates where none are shown."""

    def answer() -> None:
        with listener.accept()[0] as other:
            other.recv(4096)
            other.sendall(b"-ERR Protocol error\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as threads:
        said = threads.submit(answer)
        url = f"rediss://127.0.0.1:{listener.getsockname()[1]}"
        room = opened(stack, face, url, connect_delay=60, connect_attempts=1)
        with pytest.raises(RedisUnavailable, match=r"tls.*what answers there speaks no TLS"):
            room.connect()
        said.result()


def test_orders_are_sent_by_the_options_of_the_url(
    make_server: Callable[..., TlsServer],
) -> None:
    """Whoever lets the name in a certificate be another one is taken at their word by the broker's client too."""
    elsewhere = make_server()
    url = f"{elsewhere.tls_url(elsewhere.authority)}&ssl_check_hostname=no&ssl_min_version=771"
    reach(Settings(redis_url=url))


def test_orders_and_workers_speak_tls(
    make_server: Callable[..., TlsServer], tmp_path: Path
) -> None:
    """A room orders work and a worker does it over TLS, each with a client's certificate."""
    asking = make_server("127.0.0.1", asks=True)
    url = asking.tls_url(asking.authority, certified=True)
    log, arguments = tmp_path / "worker.log", ("worker", "-l", "INFO", "-P", "threads")
    worker = CeleryProcess(log, {"REDIS_URL": url}, *arguments)
    try:
        worker.await_line("ready.", 60)
        settings = Settings(redis_url=url, **PATIENT)
        with Stillroom(settings) as room:
            room.dispatch.wake("stillroom.trim_marks")
            until(lambda: "stillroom.trim_marks" in worker.log, "the task", 30)
            until(lambda: "succeeded" in worker.log, "its end", 30)
        assert worker.terminate() == 0
    finally:
        worker.kill()
