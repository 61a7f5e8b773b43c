"""Middleware for WSGI apps (PEP 3333): `app = StillroomMiddleware(app, Stillroom())`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, TypeAlias

from stillroom.errors import SessionStoreUnavailable
from stillroom.limits import Route
from stillroom.room import Stillroom
from stillroom.web.ending import Header, ending, lacking, report_loss
from stillroom.web.gate import Asked, Middleware
from stillroom.web.problem import Answer, denied, failed, foreign
from stillroom.web.request_session import WebSession

log = logging.getLogger("stillroom.web")

KEY = "stillroom.session"
ALONG = "stillroom.along"  # the session that is read with the limits, for a framework's own to take over
LIMITED = "stillroom.limited"  # its limits have been checked, further out

Environ: TypeAlias = dict[str, Any]
StartResponse: TypeAlias = Callable[..., Callable[[bytes], object]]
App: TypeAlias = Callable[[Environ, StartResponse], Iterable[bytes]]


class StillroomMiddleware(Middleware[App, Stillroom]):
    """Keeps the limits of a route table, and gives each request its session.

    `routes`: those a request may not exceed; it is answered with 429, or 503, before the app is called, and each
    response says how its client stands. None: no limits. `subject` says what is counted besides the address.

    `environ["stillroom.session"]` is the session: see WebSession. It is written when the app hands over its body,
    or the first piece of it. A response of 5xx writes nothing. Redis away while it is read or written: 503 with
    Retry-After, also in place of the app's own 500, and the cookie is left as it is. `sessions=False`: there is
    none. `same_origin=True` refuses what another site's page sends (403): unsafe methods by Sec-Fetch-Site and
    Origin; a list names the origins that may.

    Around an app that is mounted in another one: what the outer one has done is not done again. All Redis calls of
    a request, up to its response, share `request_timeout`.
    """

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], _path(environ)
        if self._origin and self._origin.refuses(method, *_fetched(environ)):
            return _answered(foreign(method), start_response)
        route = None if LIMITED in environ else self._gate.route(method, path)
        gives_session = self._has_sessions and KEY not in environ
        if route is None and not gives_session:
            return self.app(environ, start_response)
        cookie = self._cookie if gives_session else self._gate.cookie_of(route)
        token = cookie.read(environ.get("HTTP_COOKIE", "")) if cookie else None
        session = WebSession(
            self._room._sessions_body, self._room.state, self._cookie, token, environ
        )
        environ[KEY if gives_session else ALONG] = session
        with self._room.request():
            return self._respond(route, session, environ, start_response)

    def _respond(
        self,
        route: Route | None,
        session: WebSession,
        environ: Environ,
        start_response: StartResponse,
    ) -> Iterable[bytes]:
        method = environ["REQUEST_METHOD"]
        headers = _headers(environ) if self._gate.reads_headers else []
        asked = Asked(method, _path(environ), environ.get("REMOTE_ADDR"), headers)
        said: list[Header] = []
        if route is not None:
            environ[LIMITED] = True
            decision = self._room.state.run(self._gate.asking(route, asked, session))
            if not decision:
                return _answered(denied(decision, method), start_response)
            said = list(decision.headers().items())
        tell = partial(self._gate.tell, route, asked, session)
        response = _Response(session, self._room, method, said, tell, start_response)
        body = response.of(self.app, environ)
        self._gate.learn(route, session)
        return body


class _Response:
    """A response that is held back until the app has handed over its body: so long the session may change."""

    def __init__(
        self,
        session: WebSession,
        room: Stillroom,
        method: str,
        said: list[Header],
        tell: Callable[[int], None],
        start_response: StartResponse,
    ) -> None:
        self._session = session
        self._room = room
        self._method = method
        self._said = said  # of the limits
        self._tell = tell  # the status
        self._start_response = start_response
        self._held: tuple[Any, ...] | None = None  # status, headers, exc_info
        self._write: Callable[[bytes], object] | None = None  # set when the response has begun
        self._instead: Answer | None = None

    def of(self, app: App, environ: Environ) -> Iterable[bytes]:
        """The body to send. It is the app's own object where it can be, so that a file stays a file."""
        try:
            body = app(environ, self._start)
        except SessionStoreUnavailable as error:
            return [self._explain(error)]
        if self._held is None:  # a generator: it says its headers when it is asked for a piece
            return _Stream(self, body)
        try:
            self._begin()
        except BaseException:
            _close(body)
            raise
        if self._instead is not None:
            _close(body)
            return [self._instead.body]
        is_whole = isinstance(body, list | tuple) or not self._session.is_looked_at
        return body if is_whole else _Stream(self, body)

    def pieces(self, body: Iterable[bytes]) -> Iterator[bytes]:
        """Begin the response when its first piece is there."""
        try:
            for piece in body:
                self._begin()
                if self._instead is not None:
                    break
                yield piece
            self._begin()
        except SessionStoreUnavailable as error:
            yield self._explain(error)
        if self._instead is not None:
            yield self._instead.body

    def over(self) -> None:
        report_loss(self._session)

    def _start(
        self, status: str, headers: list[tuple[str, str]], exc_info: Any = None
    ) -> Callable[[bytes], object]:
        """What the app calls for start_response."""
        given = (status, headers) if exc_info is None else (status, headers, exc_info)
        if self._write is not None:  # the server raises what is in exc_info: it is too late
            return self._start_response(*given)
        self._held = given
        return self._write_at_once

    def _write_at_once(self, piece: bytes) -> object:
        self._begin()
        return None if self._instead or not self._write else self._write(piece)

    def _begin(self) -> None:
        """Write the session and start the response, or another one in its place; once."""
        if self._write is not None or self._held is None:
            return
        status, headers, *exc_info = self._held
        code = int(status[:3])
        self._tell(code)
        end = self._room.state.run(ending(self._session, code, headers, self._method))
        if end.instead is None:
            if end.without:
                headers = [header for header in headers if header[0].lower() not in end.without]
            more = [*end.headers, *lacking(headers, self._said)]
            self._write = self._start_response(status, [*headers, *more], *exc_info)
        else:
            self._answer(end.instead)

    def _explain(self, error: SessionStoreUnavailable) -> bytes:
        """The body of a 503, for an app that did not say anything to this. Raises where it was not the session."""
        if self._write is not None or error is not self._session.failure:
            raise error
        log.warning("a request was not answered for want of its session: %s", error)
        answer = failed(error, self._method)
        self._answer(answer)
        self._instead = None
        return answer.body

    def _answer(self, answer: Answer) -> None:
        self._instead = answer
        headers = [*answer.headers, *lacking(answer.headers, self._said)]
        self._write = self._start_response(answer.line, headers)


class _Stream:
    """A body that begins its response by its first piece, and says so when something was lost on the way."""

    def __init__(self, response: _Response, body: Iterable[bytes]) -> None:
        self._response = response
        self._body = body

    def __iter__(self) -> Iterator[bytes]:
        return self._response.pieces(self._body)

    def close(self) -> None:
        _close(self._body)
        self._response.over()


def _answered(answer: Answer, start_response: StartResponse) -> list[bytes]:
    start_response(answer.line, answer.headers)
    return [answer.body]


def _fetched(environ: Environ) -> list[str]:
    """Sec-Fetch-Site, Origin, Host."""
    return [str(environ.get(f"HTTP_{name}", "")) for name in ("SEC_FETCH_SITE", "ORIGIN", "HOST")]


def _path(environ: Environ) -> str:
    """PEP 3333 decodes paths as Latin-1, whatever they are written in."""
    raw = environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "")
    return str(raw.encode("latin-1", "replace").decode(errors="replace"))


def _headers(environ: Environ) -> list[Header]:
    return [
        (name.removeprefix("HTTP_").replace("_", "-"), value)
        for name, value in environ.items()
        if name.startswith("HTTP_")
    ]


def _close(body: Iterable[bytes]) -> None:
    if hasattr(body, "close"):
        body.close()
