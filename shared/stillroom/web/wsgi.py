"""Middleware for WSGI apps (PEP 3333): `app = StillroomMiddleware(app, Stillroom())`."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from io import BytesIO
from typing import Any, TypeAlias

from stillroom.limits import Route
from stillroom.misuse import explained
from stillroom.room import Stillroom
from stillroom.shown import repr_of, shown
from stillroom.web.cors import asking_for, kept, with_exposed
from stillroom.web.ending import answer_to, report_loss
from stillroom.web.explain import ExplainWSGI
from stillroom.web.fetched import is_meant_in_environ
from stillroom.web.gate import PREFLIGHT, Asked, Middleware
from stillroom.web.headers import Header, length_of
from stillroom.web.problem import Answer, foreign
from stillroom.web.request_session import WebSession
from stillroom.web.session_cookie import SessionCookie
from stillroom.web.visit import KEY, LIMITED, VISIT, Visit

log = logging.getLogger("stillroom.web")

ALONG = "stillroom.along"  # the session that is read with the limits, for a framework's own to take over
NOT_IN_A_PREFLIGHT = ("HTTP_COOKIE", "HTTP_AUTHORIZATION", "CONTENT_TYPE", "HTTP_TRANSFER_ENCODING")

Environ: TypeAlias = dict[str, Any]
StartResponse: TypeAlias = Callable[..., Callable[[bytes], object]]
# What it returns is iterable. Types of Django do not say so of its handler.
App: TypeAlias = Callable[[Environ, StartResponse], Any]


@explained
class StillroomMiddleware(Middleware[App, Stillroom]):
    """Keeps limits, of a route table and of endpoints, and gives each request its session.

    `routes`: a table of limits by path. A request over one of them is answered with 429, or 503, before the app is
    called, and each response says how its client stands. None: only limits of endpoints (see stillroom.web.flask
    and stillroom.web.django.limits). `subject` says what is counted besides the address and the session's user;
    `exempt_when` which requests the table passes over; `render` answers a refusal in the app's own words (see
    stillroom.web.Refusal).

    `environ["stillroom.session"]` is the session: see WebSession. It is written when the app hands over its body,
    or the first piece of it. A response of 5xx writes nothing. Redis away while it is read or written: 503 with
    Retry-After, also in place of the app's own 500, and the cookie is left as it is. `sessions=False`: there is
    none. `same_origin=True` refuses what another site's page sends (403): unsafe methods by Sec-Fetch-Site and
    Origin; a list names the origins that may.

    An app that is mounted in another one may have a middleware of its own: the session is the outer one's, both
    tables are looked at, and a limit that both name counts once. All Redis calls of a request, up to its response,
    share `request_timeout`. Raises SettingsError for an AsyncStillroom, and InvalidLimit for a table that makes no
    sense.
    """

    _kind = Stillroom

    def _prepare(self) -> None:
        if self._room.settings.explain_header:
            self.app = ExplainWSGI(self.app, self._room)

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        if self._misfits:
            misfits, self._misfits = self._misfits, None
            misfits.tell(self.app, environ.get("SCRIPT_NAME", ""))
        method = environ["REQUEST_METHOD"]
        if self._origin and self._origin.refuses(method, *_fetched(environ)):
            return _answered(foreign(method), start_response)
        route = None if LIMITED in environ else self._route(environ)
        gives_session = self._has_sessions and KEY not in environ
        cookie = self._cookie if gives_session else self._gate.cookie_of(route)
        session = self._session(environ, cookie)
        environ[KEY if gives_session else ALONG] = session
        visit, is_inner = self._enter(environ, session)
        with self._room.request():
            if route is not None and (answer := self._refused(route, visit, environ)):
                return _answered(answer, start_response)
            response = _Response(self, route, session, visit, environ, start_response, is_inner)
            try:
                body = response.of(self.app, environ)
            except BaseException:
                response.let_go()
                raise
            self._gate.learn(visit)
            return body

    def _route(self, environ: Environ) -> Route | None:
        if self._gate.routes is None:
            return None
        path = path_text(environ.get("PATH_INFO", ""))
        method, header = environ["REQUEST_METHOD"], partial(_header, environ)
        return self._gate.route(method, path, _path(environ), header, self._client, environ)

    def _client(self, environ: Environ) -> str:
        known: Visit | None = environ.get(VISIT)
        return known.client if known else self._gate.client_of(self._asked(environ))

    def _session(self, environ: Environ, cookie: SessionCookie | None) -> WebSession:
        """Return the session of the token in this cookie, or an anonymous one without."""
        token = cookie.read(environ.get("HTTP_COOKIE", "")) if cookie else None
        body, driver = self._room.operations.sessions, self._room.state
        return WebSession(body, driver, self._cookie, token, environ)

    def _enter(self, environ: Environ, session: WebSession) -> tuple[Visit, bool]:
        """Return the visit of this request, and whether an outer middleware began it."""
        known = self._gate.own(environ.get(VISIT))
        if known is not None:
            return known, True
        asked = self._asked(environ)
        visit = self._gate.visit(asked, session, partial(is_meant_in_environ, environ))
        environ[VISIT] = visit
        return visit, False

    def _asked(self, environ: Environ) -> Asked:
        headers = _headers(environ) if self._gate.reads_headers else []
        peer = environ.get("REMOTE_ADDR")
        return Asked(environ["REQUEST_METHOD"], _path(environ), peer, headers)

    def _refused(self, route: Route, visit: Visit, environ: Environ) -> Answer | None:
        """Return the answer to a request that may not go on, or None if it may."""
        self._room.state.run(self._gate.asking(route, visit))
        if visit.refused is None:
            return None
        answer = self._gate.refusal(visit, _headers(environ))
        return answer._replace(headers=[*answer.headers, *self.cors_of(environ)])

    def cors_of(self, environ: Environ) -> list[Header]:
        """Return the headers of the app's CORS layer, further in, for the page that sent this request.

        The layer is asked as a browser asks: by a preflight, which does nothing.
        """
        origin, method = environ.get("HTTP_ORIGIN"), environ["REQUEST_METHOD"]
        if origin is None or method == "OPTIONS":
            return []
        now, key = time.monotonic(), (origin, method, _path(environ))
        client = environ[VISIT].client
        known = self._learned.get(key, client, now)
        if known is None:
            said = kept(self._preflight(environ, method, origin))
            known = self._learned.add(key, client, now, said)
        return with_exposed(known)

    def _preflight(self, environ: Environ, method: str, origin: str) -> list[Header]:
        """Return the headers of the app's answer to a preflight that the client did not send and does
        not pay for.
        """
        found: list[Header] = []

        def keep(_: str, headers: list[Header], *__: Any) -> Callable[[bytes], object]:
            found[:] = headers
            return len

        nobody = self._session(environ, None)
        asking = {name: value for name, value in environ.items() if name not in NOT_IN_A_PREFLIGHT}
        for name, value in asking_for(method, origin):
            asking[f"HTTP_{name.upper().replace('-', '_')}"] = value
        asking |= {"REQUEST_METHOD": "OPTIONS", "CONTENT_LENGTH": "0", "wsgi.input": BytesIO()}
        asking["QUERY_STRING"] = ""  # no CORS layer reads it, and an app's own code might
        asking |= {KEY: nobody, ALONG: nobody, LIMITED: True}
        asking[VISIT] = environ[VISIT].preflight()
        try:
            body = self.app(asking, keep)
            if not found:  # a generator says its headers when it is asked for a piece
                next(iter(body), b"")
            _close(body)
        except Exception as error:  # the client is refused anyway
            why = shown(repr_of(error), 300)
            log.warning("a preflight of %.200r was not answered: %s", _path(environ), why)
        return found


class _Response:
    """A response that is held back until the app hands over its body; until then the session may change."""

    def __init__(
        self,
        middleware: StillroomMiddleware,
        route: Route | None,
        session: WebSession,
        visit: Visit,
        environ: Environ,
        start_response: StartResponse,
        is_inner: bool,
    ) -> None:
        self._middleware = middleware
        self._gate = middleware._gate
        self._run = middleware._room.state.run
        self._route = route
        self._session = session
        self._visit = visit
        self._environ = environ
        self._method = environ["REQUEST_METHOD"]
        self._start_response = start_response
        self._is_inner = is_inner  # then the outer one says how the client stands
        self._held: tuple[Any, ...] | None = None  # status, headers, exc_info
        self._has_begun = False
        self._write: Callable[[bytes], object] | None = None  # the server's; asgiref's has none
        self._instead: Answer | None = None

    def of(self, app: App, environ: Environ) -> Iterable[bytes]:
        """Return the body to send. It is the app's own object where it can be, so that a file stays a file."""
        try:
            body = app(environ, self._start)
        except Exception as error:
            self.let_go()
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
            self.let_go()
            return [self._instead.body]
        is_whole = isinstance(body, list | tuple) or not self._session.is_looked_at
        return body if is_whole and not self._visit.is_holding else _Stream(self, body)

    def pieces(self, body: Iterable[bytes]) -> Iterator[bytes]:
        """Begin the response when its first piece is there.

        A client may send its next request when it has the last one, so what was in flight is given back before.
        """
        left = math.inf
        try:
            for piece in body:
                self._begin()
                if self._instead is not None:
                    break
                if self._visit.is_holding:
                    left = (length_of(self._said()) if left == math.inf else left) - len(piece)
                    if left <= 0:
                        self.let_go()
                yield piece
            self._begin()
        except Exception as error:
            yield self._explain(error)
        finally:  # also where the server closes nothing, as asgiref's does
            self.let_go()
        if self._instead is not None:
            yield self._instead.body

    def _said(self) -> list[Header]:
        """Return the headers as the app said them."""
        headers: list[Header] = self._held[1] if self._held else []
        return headers

    def over(self) -> None:
        report_loss(self._session)
        self.let_go()

    def let_go(self) -> None:
        """Give back what was in flight: it is over."""
        if self._visit.is_holding and not self._is_inner:
            self._run(self._visit.over(self._gate.body))

    def _start(
        self, status: str, headers: list[tuple[str, str]], exc_info: Any = None
    ) -> Callable[[bytes], object]:
        """Take the app's call of start_response."""
        given = (status, headers) if exc_info is None else (status, headers, exc_info)
        if self._has_begun:  # the server raises what is in exc_info: it is too late
            return self._start_response(*given)
        self._held = given
        return self._write_at_once

    def _write_at_once(self, piece: bytes) -> object:
        self._begin()
        if self._instead is not None:
            return None
        if self._write is None:
            raise TypeError("this server's start_response returns no write(): return the body")
        return self._write(piece)

    def _begin(self) -> None:
        """Write the session and start the response, or another one in its place; once."""
        if self._has_begun or self._held is None:
            return
        status, headers, *exc_info = self._held
        code = int(status[:3])
        gate, visit, session = self._gate, self._visit, self._session
        gate.tell(self._route, visit, code, session.unknown_token)
        if PREFLIGHT in self._environ:
            gate.learn_preflight(self._environ[PREFLIGHT], visit.client, headers)
        end = gate.ended(visit, session, headers)
        if end is None:
            end = self._run(gate.ending(visit, session, code, headers))
        if end.instead is not None:
            self._answer(end.instead, kept(headers))
            return
        told, replaced = visit.telling(
            headers, is_inner=self._is_inner, is_of_page="HTTP_ORIGIN" in self._environ
        )
        if without := end.without | replaced:
            headers = [pair for pair in headers if pair[0].lower() not in without]
        self._begin_with(status, [*headers, *end.headers, *told], *exc_info)

    def _begin_with(self, *given: Any) -> None:
        self._write = self._start_response(*given)
        self._has_begun = True

    def _explain(self, error: Exception) -> bytes:
        """Return the body of a 503, or a 401, for an app's 500. Raises what is the app's own error."""
        keeps = self._middleware._has_sessions
        session, method = self._session, self._method
        answer = (
            None if self._has_begun else answer_to(error, session, method, keeps_sessions=keeps)
        )
        if answer is None:
            raise error
        self._answer(answer, self._middleware.cors_of(self._environ))
        self._instead = None
        return answer.body

    def _answer(self, answer: Answer, cors: list[Header]) -> None:
        self._instead = answer
        # A page of another origin reads them by `cors`.
        told, _ = self._visit.telling(answer.headers, is_inner=self._is_inner)
        self._begin_with(answer.line, [*answer.headers, *told, *cors])


class _Stream:
    """A body that begins its response by its first piece, and logs changes that were lost on the way."""

    def __init__(self, response: _Response, body: Iterable[bytes]) -> None:
        self._response = response
        self._body = body

    def __iter__(self) -> Iterator[bytes]:
        return self._response.pieces(self._body)

    def close(self) -> None:
        try:
            _close(self._body)
        finally:
            self._response.over()


def _answered(answer: Answer, start_response: StartResponse) -> list[bytes]:
    start_response(answer.line, answer.headers)
    return [answer.body]


def _fetched(environ: Environ) -> list[str]:
    """Return Sec-Fetch-Site, Origin and Host."""
    return [str(environ.get(f"HTTP_{name}", "")) for name in ("SEC_FETCH_SITE", "ORIGIN", "HOST")]


def _path(environ: Environ) -> str:
    """Return the whole path with the prefix that the app is mounted under."""
    return path_text(environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", ""))


def path_text(raw: str) -> str:
    """Decode a path, which PEP 3333 hands over as Latin-1 whatever it is written in."""
    return raw.encode("latin-1", "replace").decode(errors="replace")


def _header(environ: Environ, name: str) -> str | None:
    """Return a header of the request by its lower-case name."""
    key = name.upper().replace("-", "_")
    found: str | None = environ.get(key if key == "CONTENT_LENGTH" else f"HTTP_{key}")
    return found


def _headers(environ: Environ) -> list[Header]:
    return [
        (name.removeprefix("HTTP_").replace("_", "-"), value)
        for name, value in environ.items()
        if name.startswith("HTTP_")
    ]


def _close(body: Iterable[bytes]) -> None:
    if hasattr(body, "close"):
        body.close()
