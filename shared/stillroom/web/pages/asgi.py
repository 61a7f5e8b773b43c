"""The cache of pages in FastAPI and Starlette."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple, TypeAlias
from urllib.parse import parse_qsl, unquote, urlsplit

from starlette.routing import BaseRoute, Match, Mount, Route

from stillroom.errors import LoadFailed, SettingsError
from stillroom.limits.routes import below
from stillroom.room import AsyncStillroom
from stillroom.web.asgi import StillroomMiddleware
from stillroom.web.asgi_types import App, Message, Receive, Scope, Send
from stillroom.web.carriers import layers
from stillroom.web.headers import Header, decoded, encoded
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

Responding: TypeAlias = "asyncio.Task[None]"

_state: ContextVar[Any] = ContextVar("stillroom_page_state", default=None)  # of the app's lifespan
# What the app still does behind a whole response, for the request that had it rendered. None: a worker had.
_behind: ContextVar[list[Responding] | None] = ContextVar("stillroom_page_behind", default=None)


def install_asgi(pages: Pages[Any], app: Any) -> None:
    if not isinstance(pages.room, AsyncStillroom):
        raise SettingsError("FastAPI and Starlette need Pages(AsyncStillroom())")
    renderer = Renderer(pages, app)
    pages.render = renderer.render
    app.add_middleware(PageMiddleware, renderer=renderer)
    # Behind what tells the scheme: a page is rendered from a request without a proxy's headers.
    kinds = [getattr(one.cls, "__name__", "") for one in app.user_middleware]
    if "ProxyHeadersMiddleware" in kinds:
        app.user_middleware.insert(
            kinds.index("ProxyHeadersMiddleware"), app.user_middleware.pop(0)
        )


class Endpoint(NamedTuple):
    """A route of the app: what its path looks like, and who answers."""

    route: Any
    endpoint: Any

    @property
    def methods(self) -> Any:
        """Return the methods that its route answers. None: any."""
        return getattr(self.route, "methods", None)

    def parameters(self, method: str, path: str, scope: Scope) -> dict[str, Any] | None:
        """Return its parameters if it answers this request."""
        if not hasattr(self.route, "path_regex"):  # a route of another kind than paths: a host
            return {} if self.route.matches(scope)[0] is Match.FULL else None
        match = self.route.path_regex.match(path)
        if match is None or method not in (self.route.methods or {method}):
            return None
        convertors = self.route.param_convertors
        return {name: convertors[name].convert(value) for name, value in match.groupdict().items()}


class Renderer:
    """Finds the endpoint of a request as the app's router will, and renders a page through the app."""

    def __init__(self, pages: Pages[Any], app: Any) -> None:
        self.pages = pages
        self.inner: App | None = None  # the app below the middleware; made with the first request
        self.is_around_cors = False  # whether a CORS layer is below it, too
        self._app = app
        self._table: list[Endpoint] = []
        self._counted = -1
        self._unended: set[Responding] = set()  # a loop forgets a task that nobody holds

    def find(self, scope: Scope) -> tuple[Any, dict[str, Any]] | None:
        """Return the endpoint and its parameters. None: no route of ours, or one of an app of a path or host."""
        asked = "GET" if scope["method"] == "HEAD" else scope["method"]
        path = _route_path(scope)
        for endpoint in self._endpoints():
            parameters = endpoint.parameters(asked, path, scope)
            if parameters is not None:
                return None if endpoint.endpoint is None else (endpoint.endpoint, parameters)
        return None

    def _endpoints(self) -> list[Endpoint]:
        routes = self._app.routes
        if len(routes) != self._counted:  # routes may be added until the app is served
            is_first, self._counted = self._counted < 0, len(routes)
            self._table = [_endpoint(route) for route in _flat(routes)]
            if is_first:
                self.pages.tell_of_unreached(
                    one.endpoint for one in self._table if "GET" in (one.methods or ("GET",))
                )
        return self._table

    async def render(self, marked: Marked, identity: Identity) -> StoredPage:
        """Render a page from a clean request. Raises NotKept, and what the app raises."""
        scope = self._clean(identity)
        found = self.find(scope)
        if found is None:
            raise NotKept("its address leads nowhere any more")
        marked = own_mark(found[0], marked)
        response = Collected(self.pages.room.settings.decoded_limit)
        with Rendering() as added:
            try:
                await self._respond(marked, scope, response)
            except Exception as error:  # older Starlettes raise what a stream raises in a group
                if response.refused is not None:
                    raise response.refused from None
                if not response.whole.done() or response.status >= 500:
                    raise
                tell_of_late(marked, error)
        own = marked.tags.of({**found[1], **_query(identity)})
        tags = all_tags(own, added, self.pages.room.cache.loaders)
        headers = [*response.headers, *self._varying(response.headers)]
        return kept(marked.policy, response.status, headers, bytes(response.body), tags)

    async def _respond(self, marked: Marked, scope: Scope, response: Collected) -> None:
        """Let the app respond. What it does behind the whole response, such as background tasks, holds up no page.

        The request that has the page rendered ends behind it, as it does without a cache.
        """
        app, behind = self._below()(scope, _no_body(), response.send), _behind.get()
        if behind is None:
            await app
            return
        responding = asyncio.ensure_future(app)
        try:
            await asyncio.wait({responding, response.whole}, return_when=asyncio.FIRST_COMPLETED)
            # A 500 is sent, and then its error is raised.
            if responding.done() or response.status >= 500:
                await responding
                return
        except asyncio.CancelledError:
            responding.cancel()
            await asyncio.wait({responding})
            raise
        behind.append(responding)
        self._unended.add(responding)
        responding.add_done_callback(partial(self._end, marked))

    def _end(self, marked: Marked, responding: Responding) -> None:
        self._unended.discard(responding)
        error = None if responding.cancelled() else responding.exception()
        if isinstance(error, Exception):
            tell_of_late(marked, error)

    def _varying(self, headers: Iterable[Header]) -> list[Header]:
        """Return Vary: Origin where older releases of Starlette's CORS layer do not say it.

        They say nothing to a request without Origin, such as the clean one. So nobody else would know that a page
        of another origin is not to be given that answer.
        """
        says_cors = any(name.lower() == "access-control-allow-origin" for name, _ in headers)
        return [("vary", "Origin")] if self.is_around_cors and not says_cors else []

    def _below(self) -> App:
        if self.inner is None:  # in a worker nobody has asked the app for anything
            self._app.middleware_stack = self._app.build_middleware_stack()
        assert self.inner is not None
        return self.inner

    def _clean(self, identity: Identity) -> Scope:
        site, target = urlsplit(identity.site), identity.target
        path, _, query = target.partition("?")
        port = site.port or (443 if site.scheme == "https" else 80)
        named = [pair.partition("=") for pair in identity.vary.split("&") if pair]
        headers = [("host", site.netloc)]
        headers += [(name, unquote(value.replace("+", " "))) for name, _, value in named]
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "GET",
            "scheme": site.scheme,
            "path": site.path + unquote(path),
            "raw_path": (site.path + path).encode(),
            "query_string": query.encode(),
            "root_path": site.path,
            "headers": encoded(headers),
            "client": None,
            "server": (site.hostname or "", port),
            "app": self._app,
            "state": dict(_state.get() or {}),
            RENDERING: True,
            LIMITED: True,  # no client has asked, so this spends no client's limits
        }


class PageMiddleware:
    """Answers requests from the cache of pages."""

    def __init__(self, app: App, renderer: Renderer) -> None:
        self.app = app
        self._renderer = renderer
        self._pages = renderer.pages
        # With sessions, because the app's middleware may be further out. A clean request has nobody's.
        renderer.inner = StillroomMiddleware(app, self._pages.room)
        renderer.is_around_cors = any(type(one).__name__ == "CORSMiddleware" for one in layers(app))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        found = self._find(scope)
        if found is None:
            await self.app(scope, receive, send)
            return
        asked, visit = found
        if not isinstance(asked.identity, Identity):
            await self.app(scope, receive, _bypassing(send, asked))
            return
        behind: list[Responding] = []
        state, awaited = _state.set(scope.get("state")), _behind.set(behind)
        try:
            with Asking() as rendered:
                page = await asked.marked.load(*asked.identity)
        except RenderFailed as failed:
            await _send(send, self._pages.failure(failed, visit))
            return
        except (NotKept, LoadFailed) as reason:
            if rendered and isinstance(reason, LoadFailed):  # of a loader that the view calls
                raise
            self._pages.remember_pass(asked, reason)
            await self.app(scope, receive, _bypassing(send, asked))
            return
        finally:
            _state.reset(state)
            _behind.reset(awaited)
        if not fits_origin(page, asked.marked.policy, visit.headers):
            await self.app(scope, receive, _bypassing(send, asked))
            return
        await _send(send, self._pages.answer(asked, visit, page, is_new=bool(rendered)))
        if behind:
            await asyncio.wait(behind)

    def _find(self, scope: Scope) -> tuple[Found, Visit] | None:
        if scope["type"] != "http" or RENDERING in scope:
            return None
        endpoint = self._renderer.find(scope)
        if endpoint is None:
            return None
        visit = _visit(scope)
        found = self._pages.find(endpoint[0], visit)
        if found is not None and scope.get("path_params"):
            # Of a Mount or Host around this app: a clean request has none, and its view may look at them.
            found = found._replace(identity="mounted")
        return None if found is None else (found, visit)


class Collected:
    """A response that is kept instead of being sent."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.status = 0
        self.headers: list[tuple[str, str]] = []
        self.body = bytearray()
        self.whole = asyncio.get_running_loop().create_future()
        self.refused: NotKept | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = decoded(message.get("headers", ()))
        elif message["type"] == "http.response.body":
            self.body += message.get("body", b"")
            if len(self.body) > self._limit:
                self.refused = NotKept(f"it has more than {self._limit:,} bytes")
                raise self.refused
            if not message.get("more_body", False) and not self.whole.done():
                self.whole.set_result(None)


def _no_body() -> Receive:
    """Act as a client that sends no body and waits as long as the answer takes."""
    messages = iter([{"type": "http.request", "body": b"", "more_body": False}])

    async def receive() -> Message:
        for message in messages:
            return message
        await asyncio.get_running_loop().create_future()
        raise AssertionError("not reached")

    return receive


def _bypassing(send: Send, found: Found) -> Send:
    """Wrap `send`, and mark for caches on the way a response that is not the shared one."""
    is_private = found.identity == "session"

    async def told(message: Message) -> None:
        if message["type"] == "http.response.start":
            raw = decoded(message.get("headers", ()))
            headers = bypassed(raw, found.marked.policy, is_private=is_private)
            message = {**message, "headers": encoded(headers)}
        await send(message)

    return told


async def _send(send: Send, answer: Answer) -> None:
    start = {"status": answer.status, "headers": encoded(answer.headers)}
    await send({"type": "http.response.start", **start})
    await send({"type": "http.response.body", "body": answer.body})


def _visit(scope: Scope) -> Visit:
    headers: dict[str, str] = {}
    for name, value in decoded(scope["headers"]):
        key, joint = name.lower(), "; " if name.lower() == "cookie" else ", "
        headers[key] = f"{headers[key]}{joint}{value}" if key in headers else value
    root = scope.get("root_path", "")
    host = headers.get("host", "localhost")
    site = f"{scope['scheme']}://{host}{root}"
    query = scope.get("query_string", b"").decode("latin-1")
    return Visit(scope["method"], site, _route_path(scope), query, headers)


def _route_path(scope: Scope) -> str:
    """Return the path below the part that the app is mounted under."""
    path, root = str(scope["path"]), scope.get("root_path", "")
    return "" if path == root else below(root, path)


def _query(identity: Identity) -> Mapping[str, str]:
    return dict(parse_qsl(identity.target.partition("?")[2], keep_blank_values=True))


def _flat(routes: Iterable[BaseRoute]) -> Iterable[Any]:
    """Yield all routes in order, with those that FastAPI keeps in the route of an included router."""
    fastapi = sys.modules.get("fastapi.routing")
    iter_contexts = getattr(fastapi, "iter_route_contexts", None)
    return routes if iter_contexts is None else iter_contexts(list(routes))


def _endpoint(route: Any) -> Endpoint:
    actual = getattr(route, "_effective_route", route)
    is_endpoint = isinstance(actual, Route) or hasattr(actual, "endpoint")
    if not hasattr(actual, "path_regex"):
        return Endpoint(actual, None)
    if isinstance(actual, Mount) or not is_endpoint or not hasattr(actual, "methods"):
        return Endpoint(_Any(actual), None)
    return Endpoint(actual, actual.endpoint)


class _Any:
    """A route that answers any method."""

    def __init__(self, route: Any) -> None:
        self.path_regex = route.path_regex
        self.param_convertors = route.param_convertors
        self.methods = None
