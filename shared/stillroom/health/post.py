"""One HTTP request: JSON to an address, within a few seconds, and nowhere else than there."""

from __future__ import annotations

import base64
import contextlib
import http.client
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit

from stillroom.wire.names import NAMES

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
        with opener.open(request, timeout=WITHIN_S) as answer, contextlib.suppress(Exception):
            answer.read(ANSWER_LIMIT)  # the events are taken, whatever becomes of these bytes
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
    """Ends a request WITHIN_S after it began: the lookup of its name, TLS's handshake and the answer's last byte.

    The timeout of a socket begins again with each byte and each address, and a lookup has none.
    """

    def __init__(self) -> None:
        self.is_over = False
        self._until = time.monotonic() + WITHIN_S
        self._timers: list[threading.Timer] = []
        self._cuttable: list[socket.socket] = []

    def on(self, kind: Callable[..., Any]) -> Any:
        """Return a kind of connection that has this limit."""

        def made(*given: Any, **options: Any) -> Any:
            connection = kind(*given, **options)
            connection._create_connection = self._connect  # TLS and a proxy's tunnel come behind it
            return connection

        return made

    def end(self) -> None:
        for timer in self._timers:
            timer.cancel()
            timer.join()
        for sock in self._cuttable:
            sock.close()

    def _connect(self, to: tuple[str, int], *_: Any) -> socket.socket:
        """Do what socket.create_connection does, within the limit."""
        host, port = to
        addresses = NAMES.addresses(host, self._until)
        for behind, address in zip(reversed(range(len(addresses))), addresses, strict=True):
            try:
                sock = socket.create_connection((address, port), self._left / (behind + 1))
            except OSError:
                if not behind:
                    raise
            else:
                sock.settimeout(self._left)
                self._begin(sock)
                return sock
        raise OSError(f"the name {host} has no address")

    @property
    def _left(self) -> float:
        return max(0.001, self._until - time.monotonic())  # 0 would mean: do not wait at all

    def _begin(self, sock: socket.socket) -> None:
        same = sock.dup()  # TLS takes the first one away before its handshake
        self._cuttable.append(same)
        timer = threading.Timer(self._left, self._cut, [same])
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
