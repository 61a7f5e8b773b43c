"""A visitor of a site on this machine: keeps its connection and its cookies, sends forms, follows no redirect."""

from __future__ import annotations

import http.client
import select
from collections.abc import Mapping
from http.cookies import SimpleCookie
from typing import NamedTuple, Self
from urllib.parse import urlencode

HOST = "127.0.0.1"


class Reply(NamedTuple):
    status: int
    headers: Mapping[str, str]  # names in small letters
    text: str


class Browser:
    """For one thread."""

    def __init__(self, port: int, *, within: float = 30.0, headers: Mapping[str, str] = {}) -> None:
        self.cookies: dict[str, str] = {}
        self._headers = headers
        self._connection = http.client.HTTPConnection(HOST, port, timeout=within)

    def get(self, path: str, **headers: str) -> Reply:
        return self.ask("GET", path, headers)

    def post(self, path: str, **form: str) -> Reply:
        kind = {"Content-Type": "application/x-www-form-urlencoded"}
        return self.ask("POST", path, kind, urlencode(form))

    def ask(
        self, method: str, path: str, headers: Mapping[str, str] = {}, body: str | None = None
    ) -> Reply:
        """Send any request, once. Raises ConnectionError if nobody answers in time."""
        self._leave_what_was_closed()
        sent = {**self._headers, **self._cookie_header(), **headers}
        try:
            self._connection.request(method, path, body, sent)
            response = self._connection.getresponse()
            text = response.read().decode()
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            raise ConnectionError(f"{method} {path}: {error!r}") from error
        for line in response.headers.get_all("Set-Cookie", []):
            self._keep(line)
        said = {name.lower(): value for name, value in response.getheaders()}
        return Reply(response.status, said, text)

    def finds(self, path: str) -> bool:
        """Return whether the page is there: False also while no server listens."""
        try:
            return self.get(path).status == 200
        except ConnectionError:
            return False

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _leave_what_was_closed(self) -> None:
        """Leave an idle connection that the server has closed, before a request is sent on it."""
        if self._connection.sock and select.select([self._connection.sock], [], [], 0)[0]:
            self._connection.close()

    def _cookie_header(self) -> dict[str, str]:
        pairs = [f"{name}={value}" for name, value in self.cookies.items()]
        return {"Cookie": "; ".join(pairs)} if pairs else {}

    def _keep(self, line: str) -> None:
        for name, cookie in SimpleCookie(line).items():
            self.cookies[name] = cookie.value
            if cookie["max-age"] == "0":
                del self.cookies[name]
