"""Limits on views and URLs of Django.

MIDDLEWARE = […, "stillroom.web.django.limits.LimitsMiddleware"]

@limited(AUTH, count=lambda answer: answer.status != 302)
def login(request): …

urlpatterns = [path("api/", limited(API, by="user")(include("shop.api")))]
"""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from typing import Any, TypeVar

from asgiref.sync import sync_to_async
from django.conf import settings
from django.contrib.auth import SESSION_KEY
from django.http import HttpRequest, HttpResponseBase, StreamingHttpResponse
from django.urls import URLPattern, URLResolver
from django.views import View

from stillroom.errors import InvalidLimit, LoadShed, SettingsError
from stillroom.limits import Limit
from stillroom.limits.limit import check_limits
from stillroom.limits.routes import Counted
from stillroom.misuse import explained
from stillroom.web.carriers import carried_in_django
from stillroom.web.cors import is_preflight
from stillroom.web.django import room
from stillroom.web.django.requests import (
    InRequest,
    is_async_view,
    refuse_known,
    response_of,
    session_cookie,
)
from stillroom.web.django.sessions import SessionStore
from stillroom.web.endpoints import Charger, until_sent
from stillroom.web.fetched import is_meant_in_environ
from stillroom.web.gate import Asked, Gate
from stillroom.web.headers import length_of
from stillroom.web.limited import (
    MARK,
    By,
    Here,
    Limitation,
    Limited,
    When,
    carried,
    declared_in_threads,
    exempted,
    is_exempt,
)
from stillroom.web.placing import checked_function
from stillroom.web.problem import shed
from stillroom.web.refusal import Refusal
from stillroom.web.request_session import RequestSession, WebSession
from stillroom.web.visit import RENDERING, VISIT, Visit

V = TypeVar("V")
HERE = "_stillroom_limits"  # on the request: the middleware and the visit


class LimitsMiddleware(InRequest):
    """Keeps the limits that views carry, and those of the URLs that lead to them, for sync and async views.

    A request is charged when Django has found its view, before the view and its decorators are called. Put this
    behind what answers preflights (CORS) and behind the sessions, so that a limit may count by user.

    A subclass says what differs: `default`, the limits of views that carry none; `exempt_when(request)`; and
    `render(refusal)`, which answers a refusal in the app's own words (see stillroom.web.Refusal). A path that leads
    to no view is charged nothing here: that is for the middleware around the whole app (stillroom.web.wsgi).
    """

    default: Sequence[Limit] = ()

    def __init__(self, get_response: Callable[..., Any]) -> None:
        super().__init__(get_response)
        self._room = own = room()
        checked_function("exempt_when", self.exempt_when, "whether no view charges it")
        gate = Gate(own, render=self.render)
        gate.reads_headers = bool(own.settings.trusted_proxies)
        self._charger = Charger(gate, own.state)
        limits = check_limits(self.default)
        self._default = (Limited(limits),) if limits else ()

    def __call__(self, request: HttpRequest) -> Any:
        try:
            return super().__call__(request)
        except BaseException:  # Django propagates it, so there is no response
            self._let_go(request)
            raise

    async def __acall__(self, request: HttpRequest) -> Any:
        try:
            return await super().__acall__(request)
        except BaseException:  # also the cancellation that tells of a client that has gone
            await sync_to_async(self._let_go)(request)
            raise

    def exempt_when(self, request: HttpRequest) -> bool:
        """Return whether no view charges this request."""
        return False

    def render(self, refusal: Refusal) -> tuple[str, str | bytes] | None:
        """Return the body of a refusal, and its content type. None: problem+json."""
        return None

    def process_request(self, request: HttpRequest) -> None:
        setattr(request, HERE, (self, self._visit(request)))

    def process_view(
        self, request: HttpRequest, view: Any, _: Sequence[Any], __: dict[str, Any]
    ) -> HttpResponseBase | None:
        visit: Visit = getattr(request, HERE)[1]
        declarations, is_free = carried_in_django(view, request.method or "GET"), is_exempt(view)
        visit.exempt = (
            RENDERING in _around(request)
            or _is_answered_by_django(request, view)
            or (is_free and not declarations)
            or bool(self.exempt_when(request))
        )
        if visit.refused is not None:
            return None
        self._let_session_ride(request, visit)
        return self.charge(request, declarations or (() if is_free else self._default))

    def process_exception(
        self, request: HttpRequest, exception: Exception
    ) -> HttpResponseBase | None:
        return response_of(shed(exception)) if isinstance(exception, LoadShed) else None

    def process_response(
        self, request: HttpRequest, response: HttpResponseBase
    ) -> HttpResponseBase:
        _, visit = getattr(request, HERE, (None, None))
        if visit is None:
            return response
        store: Any = getattr(request, "session", None)
        along: RequestSession | None = getattr(store, "along", None)
        if along is not None and along is visit.session:
            along.taken_by = along.cookie if store.accessed else None
        if _around(request).get(VISIT) is visit:  # the middleware around the app ends and tells it
            self._charger.gate.learn(visit)
            return response
        unknown = store.unknown_token if isinstance(store, SessionStore) else None
        headers = list(response.items())
        self._charger.end(visit, response.status_code, headers, unknown)
        if not response.streaming:  # its client may send the next request when it has this body
            self._charger.let_go(visit)
        elif visit.is_holding:
            _when_over(request, response, functools.partial(self._charger.let_go, visit))
        of_page = bool(request.META.get("HTTP_ORIGIN"))
        told, _ = visit.telling(headers, is_of_page=of_page)
        # Past its setter, which encodes and decodes each name and value. It replaces the app's.
        response.headers._store.update([(header[0].lower(), header) for header in told])
        return response

    def charge(
        self, request: HttpRequest, declarations: Sequence[Limited]
    ) -> HttpResponseBase | None:
        """Charge the request for this. Returns the answer if it is refused."""
        visit: Visit = getattr(request, HERE)[1]
        match = request.resolver_match
        name = f"/{match.route}" if match else request.path
        key = match._func_path if match else name
        if self._charger.admits(visit, declarations, _Here(request, visit), name, key):
            return None
        return response_of(self._charger.gate.refusal(visit, list(request.headers.items())))

    def _let_go(self, request: HttpRequest) -> None:
        """Give back what a request without a response holds. The middleware around the app does so itself."""
        _, visit = getattr(request, HERE, (None, None))
        if visit is not None and _around(request).get(VISIT) is not visit:
            self._charger.let_go(visit)

    def _let_session_ride(self, request: HttpRequest, visit: Visit) -> None:
        """Have the session read with the limits, where the view's last request looked at its own."""
        store = getattr(request, "session", None)
        cookie = session_cookie(settings.SESSION_COOKIE_NAME)
        if not isinstance(store, SessionStore) or store.along is not None or cookie is None:
            return
        token = cookie.read(request.META.get("HTTP_COOKIE", ""))
        body, driver = self._room.operations.sessions, self._room.state
        store.along = visit.session = WebSession(body, driver, cookie, token, request.META)

    def _visit(self, request: HttpRequest) -> Visit:
        """Return the visit of this request, begun here or by the middleware around the app."""
        known = self._charger.gate.own(_around(request).get(VISIT))
        if known is not None:
            return known
        headers = list(request.headers.items()) if self._charger.gate.reads_headers else []
        peer = request.META.get("REMOTE_ADDR")
        asked = Asked(request.method, request.path, peer, headers)
        return self._charger.gate.visit(
            asked, None, functools.partial(is_meant_in_environ, request.META)
        )


@explained
def limited(
    *limits: Limitation,
    by: By = None,
    cost: int | Callable[[Any], int] = 1,
    count: Counted = "all",
    exempt_when: When = None,
) -> Callable[[V], V]:
    """Put limits on a view, sync or async, or on URLs: `path("api/", limited(API)(include("shop.api")))`.

    On a class of views by `method_decorator(limited(AUTH), name="dispatch")`, or on one of its methods; on what
    `path()` and `re_path()` return, too.

    - `limits`: Limits, or one function of the request that returns them (tiers). A limit's name is its bucket: all
      views that carry the same limit share it.
    - `by`: "ip"; "user", the session's, which is read first, in a round trip of its own; "ip&user";
      `Header("X-API-Key")`; or a function of the request that returns a name, or a mapping of kinds to names. A
      request without a name counts by address. Default: as each limit says.
    - `cost`: a number or a function of the request.
    - `count`: "all"; "failures", requests that are answered with 400 or more; or a function of the answer (see
      Answered) that says whether the request counts. What does not count is given back. Django's own
      LoginView answers a wrong password with 200 and a right one with 302.
    - `exempt_when`: a function of the request.

    Needs LimitsMiddleware. Raises InvalidLimit. Redis away: each limit does what its `away`
    says.
    """
    declaration = declared_in_threads(limits, by, cost, count, exempt_when)

    def put_on(target: V) -> V:
        if isinstance(target, URLPattern | URLResolver):
            made: Any = _limited_url(target, declaration)
        elif isinstance(target, tuple) and len(target) == 3:  # the result of include()
            made = (_limited_urls(target[0], declaration), *target[1:])
        elif isinstance(target, type) or not callable(target):
            is_bare = isinstance(target, HttpRequest)
            wanted = "limited(AUTH)" if is_bare else 'method_decorator(limited(…), name="dispatch")'
            meant = f"did you mean @{wanted}?"
            raise InvalidLimit(
                target, f"limits are put on a view, on URLs or on an include(); {meant}"
            )
        else:
            refuse_known(target, "limited")
            made = _limited(target, declaration)
        found: V = made
        return found

    return put_on


def exempt(view: V) -> V:
    """Free a view, or a class of views, from the limits of the URLs that lead to it, and from the default.

    What `@limited` puts on the view itself counts all the same.
    """
    return exempted(view)


class _Here(Here):
    """The request as Django shows it."""

    def user(self) -> str | None:
        session = getattr(self.request, "session", None)
        if session is None:
            raise SettingsError(
                "a limit counts by user, and this request has no session: SessionMiddleware comes in "
                "front of LimitsMiddleware"
            )
        user = session.get(SESSION_KEY)
        self._visit.session = None  # it has been read
        return None if user is None else str(user)


class _LimitedPattern(URLPattern):
    """A URL pattern whose view is limited. Reversing it finds the view itself."""

    declarations: tuple[Limited, ...] = ()

    def resolve(self, path: str) -> Any:
        return _guarded(super().resolve(path), self.declarations)


class _LimitedResolver(URLResolver):
    """A resolver all of whose views are limited."""

    declarations: tuple[Limited, ...] = ()

    def resolve(self, path: str) -> Any:
        return _guarded(super().resolve(path), self.declarations)


class _LimitedUrls:
    """A module of URLs, all of whose views are limited."""

    def __init__(self, module: Any, declaration: Limited) -> None:
        self._module = module
        self._declaration = declaration

    @functools.cached_property
    def urlpatterns(self) -> list[Any]:
        return [_limited_url(one, self._declaration) for one in self._module.urlpatterns]


def _limited_url(url: Any, declaration: Limited) -> Any:
    if isinstance(url, URLPattern):
        made: Any = _LimitedPattern(url.pattern, url.callback, url.default_args, url.name)
    else:
        given = (url.pattern, url.urlconf_name, url.default_kwargs, url.app_name, url.namespace)
        made = _LimitedResolver(*given)
    made.declarations = (declaration, *getattr(url, "declarations", ()))
    return made


def _limited_urls(urls: Any, declaration: Limited) -> Any:
    if isinstance(urls, list | tuple):
        return [_limited_url(one, declaration) for one in urls]
    return _LimitedUrls(urls, declaration)


def _guarded(match: Any, declarations: Sequence[Limited]) -> Any:
    """Return the resolved match with its view behind these limits, unless that is free from them."""
    if match is not None and not is_exempt(match.func):
        # One that can't be hashed, such as an object of a dataclass, is wrapped for each request.
        guard = _known if isinstance(match.func, Hashable) else _limited
        for declaration in reversed(declarations):
            match.func = guard(match.func, declaration)
    return match


def _limited(view: Any, declaration: Limited) -> Any:
    """Return the view with its limits. It is charged here unless it was already, wherever it is called from."""
    if is_async_view(view):

        @functools.wraps(view)
        async def charged_async(*args: Any, **kwargs: Any) -> Any:
            answer = await sync_to_async(_charge)(args, declaration)
            return await view(*args, **kwargs) if answer is None else answer

        made: Any = charged_async
    else:

        @functools.wraps(view)
        def charged(*args: Any, **kwargs: Any) -> Any:
            answer = _charge(args, declaration)
            return view(*args, **kwargs) if answer is None else answer

        made = charged
    setattr(made, MARK, (declaration, *carried(view)))
    return made


_known = functools.lru_cache(4_096)(_limited)


def _charge(args: Sequence[Any], declaration: Limited) -> HttpResponseBase | None:
    """Charge the request that a view is called with; on a method, it comes after `self`."""
    request = _request_in(args[:2])
    here: tuple[LimitsMiddleware, Visit] | None = getattr(request, HERE, None)
    if request is None or here is None:
        raise SettingsError(
            "a view is limited, and its request did not come through LimitsMiddleware: add "
            "stillroom.web.django.limits.LimitsMiddleware to MIDDLEWARE"
        )
    middleware, visit = here
    if visit.has_charged(declaration):
        return None
    return middleware.charge(request, [declaration])


def _request_in(args: Sequence[Any]) -> HttpRequest | None:
    for one in args:
        request = getattr(one, "_request", one)  # other people's requests hold Django's
        if isinstance(request, HttpRequest):
            return request
    return None


def _is_answered_by_django(request: HttpRequest, view: Any) -> bool:
    """Return whether this is a preflight that Django answers before any code of the app."""
    kind = getattr(view, "view_class", None)
    if request.method != "OPTIONS" or getattr(kind, "options", None) is not View.options:
        return False
    return is_preflight(request.method, request.headers.get)


def _around(request: HttpRequest) -> Any:
    """Return the server's environ or scope."""
    return getattr(request, "environ", None) or getattr(request, "scope", {})


def _when_over(
    request: HttpRequest, response: HttpResponseBase, let_go: Callable[[], None]
) -> None:
    """Have this called when the stream ends, or when Django closes the request.

    The request is closed with the response that is sent, also if that is another one. Under ASGI it is not closed
    where the stream raises. A file is streamed too: the server would close it after its client has it.
    """
    close = request.close

    def closing() -> None:
        try:
            close()
        finally:
            let_go()

    request.close = closing
    if isinstance(response, StreamingHttpResponse):
        until = _until_sent_async if response.is_async else until_sent
        length = length_of(response.items())
        response.streaming_content = until(response.streaming_content, length, let_go)


async def _until_sent_async(
    pieces: Any, length: float, let_go: Callable[[], None]
) -> AsyncIterator[Any]:
    """See until_sent."""
    try:
        async for piece in pieces:
            length -= len(piece)
            if length <= 0:
                await sync_to_async(let_go)()
            yield piece
    finally:
        await sync_to_async(let_go)()
