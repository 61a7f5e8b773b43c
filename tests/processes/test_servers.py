"""The middleware works under common servers: forks before and after the room was used, and greenlets."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import wsproto
import wsproto.events as said

import redis
from stillroom import Settings
from stillroom.embedded import EmbeddedServer
from stillroom.leash import until
from tests.support.web import GUNICORN, WITHIN, Browser, ask, environment_of, serving_process

ROOT = Path(__file__).parent.parent.parent
WSGI = "tests.processes.served:application"
SERVERS = {
    "prefork": (*GUNICORN, "--workers", "2", WSGI),
    "preload": (*GUNICORN, "--workers", "2", "--preload", WSGI),
    "threads": (*GUNICORN, "--workers", "2", "--threads", "4", "--preload", WSGI),
    "gevent": (*GUNICORN, "--workers", "2", "--worker-class", "gevent", WSGI),
    "uvicorn": (
        *("uvicorn", "--fd", "{fd}", "--log-level", "warning", "--workers", "2"),
        *("--no-proxy-headers", "tests.processes.served:asgi"),
    ),
}


@pytest.fixture(params=SERVERS)
def port(request: pytest.FixtureRequest, stillroom_settings: Settings) -> Iterator[int]:
    """Serve the shop with two processes of a server, and return the port."""
    is_used = "1" if request.param in ("preload", "threads") else ""
    environment = environment_of(stillroom_settings) | {"USED_BEFORE_THE_FORK": is_used}
    with serving_process(SERVERS[request.param], ROOT, environment) as port:
        yield port


def pids_at_once(threads: ThreadPoolExecutor, port: int) -> set[str]:
    """Return the processes that answer when many ask at once; the kernel chooses which."""
    return set(threads.map(lambda _: ask(port, "/pid").text, range(40)))


@pytest.mark.long
def test_all_processes_share_sessions_and_limits(
    port: int, stillroom_server: EmbeddedServer
) -> None:
    """Forty requests at once in one session, each with a key of its own; sixty against a quota of fifty.

    Connections that are cut are made anew in every process, and nobody is answered with another's session.
    """
    browser = Browser(port)
    browser.get("/login?ann")
    token = browser.token
    with ThreadPoolExecutor(10) as threads:
        written = list(threads.map(lambda n: Browser(port, token).get(f"/set?k{n}={n}"), range(40)))
        assert [reply.status for reply in written] == [200] * 40
        allowed = list(threads.map(lambda _: ask(port, "/plain").status, range(60)))
        pids: set[str] = set()
        assert until(lambda: pids.update(pids_at_once(threads, port)) or len(pids) == 2, WITHIN)
    assert json.loads(browser.get("/keys").text) == {f"k{n}": str(n) for n in range(40)}
    assert (allowed.count(200), allowed.count(429)) == (50, 10)
    others = [Browser(port) for _ in range(4)]
    for n, other in enumerate(others):
        other.get(f"/login?user{n}")
    with redis.Redis.from_url(stillroom_server.url) as client:
        client.client_kill_filter(_type="normal", skipme=True)
    assert [other.get("/who").text for other in others * 3] == [f'"user{n}"' for n in range(4)] * 3
    browser.get("/logout")
    assert Browser(port, token).get("/who").text == "null"


@pytest.mark.long
def test_a_websocket_talks_through_the_middleware(stillroom_settings: Settings) -> None:
    """A websocket talks through the middleware, twenty words there and back, on the one path that is open."""
    command = ("uvicorn", "--fd", "{fd}", "--log-level", "warning", "--ws", "wsproto")
    app = "tests.processes.served:talking"
    with serving_process((*command, app), ROOT, environment_of(stillroom_settings)) as port:
        assert ask(port, "/").status == 429
        with socket.create_connection(("127.0.0.1", port), timeout=WITHIN) as connection:
            browser = wsproto.WSConnection(wsproto.ConnectionType.CLIENT)
            connection.sendall(browser.send(said.Request(host="shop", target="/other")))
            refused = next_event(connection, browser)
            assert isinstance(refused, said.RejectConnection)
            assert refused.status_code == 429
        with socket.create_connection(("127.0.0.1", port), timeout=WITHIN) as connection:
            browser = wsproto.WSConnection(wsproto.ConnectionType.CLIENT)
            connection.sendall(browser.send(said.Request(host="shop", target="/talk")))
            assert isinstance(next_event(connection, browser), said.AcceptConnection)
            for n in range(20):
                connection.sendall(browser.send(said.TextMessage(data=f"word {n}")))
                answer = next_event(connection, browser)
                assert isinstance(answer, said.TextMessage)
                assert answer.data == f"/talk word {n}"
            connection.sendall(browser.send(said.CloseConnection(code=1000)))
            assert isinstance(next_event(connection, browser), said.CloseConnection)


def next_event(connection: socket.socket, browser: wsproto.WSConnection) -> said.Event:
    while True:
        for event in browser.events():
            return event
        browser.receive_data(connection.recv(4_096) or None)
