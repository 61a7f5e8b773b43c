"""Apps behind real servers on loopback, in this process and in ones of their own, and a browser of few words."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import io
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Any, NamedTuple
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server
from wsgiref.validate import validator

import uvicorn

from stillroom import AsyncStillroom, NoDispatch, Settings, Stillroom
from stillroom.web import HealthASGI, HealthWSGI
from stillroom.web.session_cookie import SessionCookie
from tests.support.crowd import PATIENT

WITHIN = 40.0  # seconds a test waits for anything before it fails, on a busy machine too
COOKIE = SessionCookie().name
# Commands for serving_process.
GUNICORN = ("gunicorn", "--bind", "fd://{fd}", "--log-level", "warning", "--no-control-socket")
UVICORN = ("uvicorn", "--fd", "{fd}", "--log-level", "warning", "--no-proxy-headers")


class Reply(NamedTuple):
    status: int
    headers: list[tuple[str, str]]
    body: bytes

    def all(self, name: str) -> list[str]:
        return [value for given, value in self.headers if given.lower() == name.lower()]

    def one(self, name: str) -> str | None:
        values = self.all(name)
        assert len(values) <= 1, values
        return values[0] if values else None

    @property
    def text(self) -> str:
        return self.body.decode()

    @property
    def token(self) -> str | None:
        """Return the session's cookie in the response: a token, '' if it is to be forgotten, None if nothing."""
        found = [line for line in self.all("set-cookie") if line.startswith(f"{COOKIE}=")]
        assert len(found) <= 1, found
        return found[0].partition("=")[2].partition(";")[0].strip('"') if found else None


class Browser:
    """A browser that sends requests to one server and keeps the session's cookie."""

    def __init__(self, port: int, token: str | None = None) -> None:
        self.port = port
        self.token = token

    def get(
        self,
        path: str,
        method: str = "GET",
        headers: Mapping[str, str] = {},
        body: bytes | None = None,
    ) -> Reply:
        cookie = {"Cookie": f"{COOKIE}={self.token}"} if self.token else {}
        reply = ask(self.port, path, method, {**cookie, **headers}, body)
        if reply.token is not None:
            self.token = reply.token or None
        return reply


def ask(
    port: int,
    path: str,
    method: str = "GET",
    headers: Mapping[str, str] = {},
    body: bytes | None = None,
) -> Reply:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WITHIN)
    try:
        connection.request(method, path, body=body, headers=dict(headers))
        got = connection.getresponse()
        return Reply(got.status, got.getheaders(), got.read())
    finally:
        connection.close()


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = False
    request_queue_size = 128


class _Quiet(WSGIRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass

    def get_stderr(self) -> Any:
        """Return a stream for a failing app's traceback, which does not belong on the terminal."""
        return io.StringIO()


@contextmanager
def serving_wsgi(app: Any) -> Iterator[int]:
    """Serve with a thread for each request; yield the port."""
    with make_server("127.0.0.1", 0, app, _Server, _Quiet) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join(WITHIN)


@contextmanager
def serving_asgi(make_app: Callable[[AsyncStillroom], Any], room: AsyncStillroom) -> Iterator[int]:
    """Serve with uvicorn in a thread; yield the port. The room is closed in its event loop."""
    listener = socket.create_server(("127.0.0.1", 0))
    # httptools, where it is installed, refuses header values that h11 hands to the app.
    quiet = partial(uvicorn.Config, log_config=None, access_log=False)
    config = quiet(make_app(room), http="h11", ws="none", proxy_headers=False)
    server = uvicorn.Server(config)

    async def serve() -> None:
        async with room:
            await server.serve(sockets=[listener])

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(WITHIN)
        listener.close()


def environment_of(settings: Settings) -> dict[str, str]:
    """Return the environment that gives a process of its own the same room and as much patience."""
    patience = {f"STILLROOM_{name.upper()}": str(value) for name, value in PATIENT.items()}
    return patience | {
        "REDIS_URL": settings.redis_url,
        "STILLROOM_NAMESPACE": settings.namespace,
        "STILLROOM_REQUEST_TIMEOUT": "60",
        "STILLROOM_SESSION_PEPPERS": settings.session_peppers[0].get_secret_value(),
    }


@contextmanager
def serving_health(face: str) -> Iterator[Callable[..., Callable[..., Reply]]]:
    """Yield a function that serves the health endpoints of a room with these settings, and returns a function that
    asks them.

    `inner`: the apps for WSGI and for ASGI that they stand in front of.
    """
    with contextlib.ExitStack() as stack:

        def serve(settings: Settings, inner: Any = (None, None)) -> Callable[..., Reply]:
            if face == "wsgi":
                room = stack.enter_context(Stillroom(settings, dispatch=NoDispatch()))
                app = validator(HealthWSGI(room, inner[0]))
                port = stack.enter_context(serving_wsgi(app))
            else:
                async_room = AsyncStillroom(settings, dispatch=NoDispatch())
                around = partial(HealthASGI, app=inner[1])
                port = stack.enter_context(serving_asgi(around, async_room))
            return partial(ask, port)

        yield serve


@contextmanager
def serving_process(
    command: Sequence[str], folder: Path, environment: Mapping[str, str]
) -> Iterator[int]:
    """Run a server's own command in a process group of its own; `{fd}` in it is the socket that it takes over.

    Gives the port. Nobody waits for it to be up: a connection waits in the socket's queue until it is.
    """
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        fd = listener.fileno()
        process = subprocess.Popen(
            [sys.executable, "-m", *(word.format(fd=fd) for word in command)],
            cwd=folder,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                **environment,
            },
            pass_fds=[fd],
            process_group=0,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        try:
            yield listener.getsockname()[1]
        finally:
            stop_group(process)


def stop_group(process: subprocess.Popen[bytes]) -> None:
    """Ask the whole group to end and kill the rest. Its output is shown if the test fails."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        said, _ = process.communicate(timeout=WITHIN)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
    print(said.decode())
