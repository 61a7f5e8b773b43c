"""The cache of pages in Flask."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import parse_qsl, unquote, unquote_to_bytes, urlsplit

from flask import Flask
from werkzeug.exceptions import HTTPException
from werkzeug.routing import MapAdapter, RequestRedirect

from stillroom.errors import LoadFailed, SettingsError
from stillroom.room import Stillroom
from stillroom.web.carriers import layers
from stillroom.web.pages.answer import bypassed, fits_origin
from stillroom.web.pages.pages import (
    Asking,
    Found,
    Marked,
    Pages,
    Rendering,
    all_tags,
    own_mark,
    tell_of_late,
)
from stillroom.web.pages.policy import Identity, Visit
from stillroom.web.pages.stored import NotKept, RenderFailed, StoredPage, kept
from stillroom.web.problem import Answer
from stillroom.web.visit import LIMITED, RENDERING
from stillroom.web.wsgi import Environ, StartResponse, path_text

FlasksApp = Callable[[Environ, StartResponse], Iterable[bytes]]


def install_flask(pages: Pages[Any], app: Flask) -> None:
    if not isinstance(pages.room, Stillroom):
        raise SettingsError("Flask needs Pages(Stillroom())")
    # Behind what tells scheme and host: a page is rendered from a request without a proxy's headers.
    fixes = [layer for layer in layers(app.wsgi_app) if type(layer).__name__ == "ProxyFix"]
    around: Any = fixes[-1] if fixes else None
    middleware = PageMiddleware(around.app if fixes else app.wsgi_app, pages, app)
    pages.render = middleware.render
    if fixes:
        around.app = middleware
    else:
        app.wsgi_app = middleware  # type: ignore[method-assign]


class PageMiddleware:
    """Answers requests from the cache of pages."""

    def __init__(self, app: FlasksApp, pages: Pages[Any], flask: Flask) -> None:
        self.app = app
        self._pages = pages
        self._flask = flask
        self._has_told = False

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        found = self._find(environ)
        if found is None:
            return self.app(environ, start_response)
        asked, visit = found
        if not isinstance(asked.identity, Identity):
            return self.app(environ, _bypassing(start_response, asked))
        try:
            with Asking() as rendered:
                page = asked.marked.load(*asked.identity)
        except RenderFailed as failed:
            return _started(start_response, self._pages.failure(failed, visit))
        except (NotKept, LoadFailed) as reason:
            if rendered and isinstance(reason, LoadFailed):  # of a loader that the view calls
                raise
            self._pages.remember_pass(asked, reason)
            return self.app(environ, _bypassing(start_response, asked))
        if not fits_origin(page, asked.marked.policy, visit.headers):
            return self.app(environ, _bypassing(start_response, asked))
        answer = self._pages.answer(asked, visit, page, is_new=bool(rendered))
        return _started(start_response, answer)

    def render(self, marked: Marked, identity: Identity) -> StoredPage:
        """Render a page from a clean request. Raises NotKept, and what the app raises."""
        environ = _clean(identity)
        found = self._endpoint(environ)
        if found is None:
            raise NotKept("its address leads nowhere any more")
        marked = own_mark(found[0], marked)
        with Rendering() as added:
            limit = self._pages.room.settings.decoded_limit
            status, headers, body = _collected(self.app, environ, limit, marked)
        query = dict(parse_qsl(environ["QUERY_STRING"], keep_blank_values=True))
        own = marked.tags.of({**found[1], **query})
        tags = all_tags(own, added, self._pages.room.cache.loaders)
        return kept(marked.policy, status, headers, body, tags)

    def _find(self, environ: Environ) -> tuple[Found, Visit] | None:
        if RENDERING in environ or environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            return None
        endpoint = self._endpoint(environ)
        if endpoint is None:
            return None
        visit = _visit(environ)
        found = self._pages.find(endpoint[0], visit)
        return None if found is None else (found, visit)

    def _endpoint(self, environ: Environ) -> tuple[Any, dict[str, Any]] | None:
        """Return the view and its parameters, as Flask's own router finds them."""
        views = self._flask.view_functions
        if not self._has_told:
            self._has_told = True
            rules = self._flask.url_map.iter_rules()
            self._pages.tell_of_unreached(
                views.get(rule.endpoint) for rule in rules if "GET" in (rule.methods or ("GET",))
            )
        try:
            name, parameters = self._adapter(environ).match(method="GET")
        except (HTTPException, RequestRedirect):
            return None
        return views.get(name), dict(parameters)

    def _adapter(self, environ: Environ) -> MapAdapter:
        """Return what Flask.create_url_adapter does, which would need a whole request for it."""
        flask, urls = self._flask, self._flask.url_map
        if urls.host_matching:
            return urls.bind_to_environ(environ)
        if flask.subdomain_matching:
            return urls.bind_to_environ(environ, flask.config["SERVER_NAME"])
        return urls.bind_to_environ(environ, subdomain=urls.default_subdomain or "")


def _collected(
    app: FlasksApp, environ: Environ, limit: int, marked: Marked
) -> tuple[int, list[tuple[str, str]], bytes]:
    begun: list[Any] = []
    body = bytearray()

    def start(status: str, headers: Any, *_: Any) -> Callable[[bytes], object]:
        begun[:] = [int(status.split(maxsplit=1)[0]), list(headers)]
        return body.extend

    pieces = app(environ, start)
    try:
        for piece in pieces:
            body += piece
            if len(body) > limit:
                raise NotKept(f"it has more than {limit:,} bytes")
    finally:
        try:
            if hasattr(pieces, "close"):
                pieces.close()
        except Exception as error:
            tell_of_late(marked, error)
    return begun[0], begun[1], bytes(body)


def _started(start_response: StartResponse, answer: Answer) -> list[bytes]:
    start_response(answer.line, [(name.title(), value) for name, value in answer.headers])
    return [answer.body]


def _bypassing(start_response: StartResponse, found: Found) -> StartResponse:
    """Wrap the app, and mark for caches on the way a response that is not the shared one."""
    is_private = found.identity == "session"

    def told(status: str, headers: Any, *exc_info: Any) -> Callable[[bytes], object]:
        more = bypassed(headers, found.marked.policy, is_private=is_private)
        return start_response(status, more, *exc_info)

    return told


def _visit(environ: Environ) -> Visit:
    headers = {
        name.removeprefix("HTTP_").replace("_", "-").lower(): value
        for name, value in environ.items()
        if name.startswith("HTTP_")
    }
    host = headers.get("host") or f"{environ['SERVER_NAME']}:{environ['SERVER_PORT']}"
    root = path_text(environ.get("SCRIPT_NAME", ""))
    site = f"{environ['wsgi.url_scheme']}://{host}{root}"
    path = path_text(environ.get("PATH_INFO", ""))
    return Visit(environ["REQUEST_METHOD"], site, path, environ.get("QUERY_STRING", ""), headers)


def _clean(identity: Identity) -> Environ:
    site = urlsplit(identity.site)
    path, _, query = identity.target.partition("?")
    named = [pair.partition("=") for pair in identity.vary.split("&") if pair]
    headers = {
        f"HTTP_{name.upper().replace('-', '_')}": unquote(value.replace("+", " "))
        for name, _, value in named
    }
    return {
        "REQUEST_METHOD": "GET",
        "SCRIPT_NAME": site.path.encode().decode("latin-1"),
        "PATH_INFO": unquote_to_bytes(path).decode("latin-1"),
        "QUERY_STRING": query,
        "SERVER_NAME": site.hostname or "localhost",
        "SERVER_PORT": str(site.port or (443 if site.scheme == "https" else 80)),
        "SERVER_PROTOCOL": "HTTP/1.1",
        "HTTP_HOST": site.netloc,
        **headers,
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": site.scheme,
        "wsgi.input": io.BytesIO(),
        "wsgi.errors": sys.stderr,
        "wsgi.multithread": True,
        "wsgi.multiprocess": True,
        "wsgi.run_once": False,
        RENDERING: True,
        LIMITED: True,  # no client has asked, so this spends no client's limits
    }
