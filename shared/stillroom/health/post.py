"""One HTTP request: JSON to an address, within a few seconds, and nowhere else than there."""

from __future__ import annotations

import base64
import contextlib
import http.client
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit

WITHIN_S = 5.0
ANSWER_LIMIT = 1_024  # bytes that are read of the answer, and thrown away


class Refused(Exception):
    """The address did not take it; the message says why, and never has the address: that may be a secret."""


def post(url: str, body: bytes, headers: Mapping[str, str] = {}) -> None:
    """Post JSON. Raises Refused for anything but 2xx, a redirect too: whoever sends it on is not who was named."""
    address, login = _login_of(url)
    about = {"Content-Type": "application/json", "User-Agent": "stillroom"}
    request = urllib.request.Request(address, body, {**about, **login, **headers})
    limit = _Limit()
    try:
        opener = urllib.request.build_opener(_Still, _Http(limit), _Https(limit))
        with opener.open(request, timeout=WITHIN_S) as answer:
            answer.read(ANSWER_LIMIT)
    except urllib.error.HTTPError as error:
        error.close()
        raise Refused(f"HTTP {error.code}") from None
    except Exception as error:  # a name that is unknown, a certificate, a protocol: all of them
        raise Refused("TimeoutError" if limit.is_over else _named(error)) from None
    finally:
        limit.end()


def _login_of(url: str) -> tuple[str, Mapping[str, str]]:
    """Return the address without its login, `https://user:password@host/…`, and the header that has the login."""
    parts = urlsplit(url)
    login, at, host = parts.netloc.rpartition("@")
    if not at:
        return url, {}
    plain = unquote_to_bytes(login if ":" in login else f"{login}:")
    encoded = base64.b64encode(plain).decode()
    return parts._replace(netloc=host).geturl(), {"Authorization": f"Basic {encoded}"}


class _Limit:
    """Cuts connections WITHIN_S after they were made: the timeout of a socket begins again with each byte."""

    def __init__(self) -> None:
        self.is_over = False
        self._timers: list[threading.Timer] = []

    def on(self, kind: Callable[..., Any]) -> Any:
        """Return a kind of connection that has this limit."""

        def made(*given: Any, **options: Any) -> Any:
            connection = kind(*given, **options)
            connect = connection.connect

            def connect_and_begin() -> None:
                connect()
                self._begin(connection.sock)

            connection.connect = connect_and_begin
            return connection

        return made

    def end(self) -> None:
        for timer in self._timers:
            timer.cancel()

    def _begin(self, sock: socket.socket) -> None:
        timer = threading.Timer(WITHIN_S, self._cut, [sock])
        timer.daemon = True
        timer.start()
        self._timers.append(timer)

    def _cut(self, sock: socket.socket) -> None:
        self.is_over = True
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)


class _Still(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


class _Http(urllib.request.HTTPHandler):
    def __init__(self, limit: _Limit) -> None:
        super().__init__()
        self._limit = limit

    def http_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(self._limit.on(http.client.HTTPConnection), request)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, limit: _Limit) -> None:
        super().__init__()
        self._limit = limit

    def https_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(self._limit.on(http.client.HTTPSConnection), request)


def _named(error: Exception) -> str:
    reason = getattr(error, "reason", None)
    return type(reason if isinstance(reason, Exception) else error).__name__
