"""Django's views, cached with tags: what django.views.decorators.cache.cache_page does, and invalidated by name.

    @cache_page(60, swr=600, tags=["products", "product:{id}"])
    def product(request, id): …

A page is rendered from the real request, without the query parameters that are ignored. It is not kept if something
shows that it was made for one visitor: a session that was changed, a CSRF token, a nonce, Set-Cookie,
Cache-Control: private, a Vary that `vary` does not name. Pages are told apart by address, the named query
parameters and headers, language and time zone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar
from urllib.parse import urlencode

from asgiref.sync import async_to_sync, sync_to_async
from django.conf import settings
from django.core.exceptions import RequestDataTooBig
from django.http import HttpRequest, HttpResponse, HttpResponseBase, QueryDict
from django.http.request import RawPostDataException, UnreadablePostError
from django.utils import timezone, translation
from django.utils.functional import SimpleLazyObject, empty

from stillroom.cache.declared import place_of
from stillroom.durations import Duration, seconds_of
from stillroom.errors import InvalidArgument, LoadFailed
from stillroom.misuse import explained
from stillroom.web.django import room
from stillroom.web.django.requests import is_async_view, refuse_known
from stillroom.web.django.values import FOR_MIDDLEWARE
from stillroom.web.pages.answer import answer_from, bypassed, checked_cdn, fits_origin
from stillroom.web.pages.pages import PageTags, Rendering, all_tags, tag_page
from stillroom.web.pages.passes import Passes
from stillroom.web.pages.policy import (
    ANALYTICS,
    CAMPAIGNS,
    Identity,
    Policy,
    Visit,
    identify,
    listed,
)
from stillroom.web.pages.stored import (
    NONCE,
    NotKept,
    OfOneRequest,
    RenderFailed,
    StoredPage,
    kept,
)
from stillroom.web.problem import Answer

__all__ = ["cache_page", "tag_page"]

V = TypeVar("V", bound=Callable[..., Any])
# Headers that identify no visitor.
OF_EVERYBODY = {"accept", "accept-language", "accept-encoding", "origin", "user-agent", "save-data"}
OF_EVERYBODY |= {"hx-request", "hx-target", "x-requested-with"}
BY_HEADERS = (206, 304, 406, 412, 416)  # answers to Range, If-…, Accept: others ask without these


@explained
def cache_page(
    timeout: Duration,
    *,
    swr: Duration = 0,
    tags: Sequence[str] = (),
    query: Sequence[str] = (),
    ignore: Sequence[str] = CAMPAIGNS,
    vary: Sequence[str] = (),
    sessions: bool = False,
    max_age: Duration = 0,
    s_maxage: Duration | None = None,
    stale_while_revalidate: Duration | None = None,
    stale_if_error: Duration | None = None,
    cdn: str | Sequence[str] = (),
    harmless_cookies: Sequence[str] = ANALYTICS,
    key_prefix: str = "",
) -> Callable[[V], V]:
    """Cache the responses of this view, sync or async. Goes around the view itself, below csrf_exempt and the like.

    `timeout` and `swr`: seconds fresh, and stale while the one reader who holds the lease renders it again. The
    other options are those of `Pages.page` and `Pages`. Redis away: the view is called. Raises InvalidKey,
    ValueError.
    """
    policy = Policy(
        query=query,
        ignore=ignore,
        vary=vary,
        sessions=sessions,
        max_age=max_age,
        s_maxage=s_maxage,
        stale_while_revalidate=stale_while_revalidate,
        stale_if_error=stale_if_error,
    )
    kinds, harmless = checked_cdn(cdn), listed("harmless_cookies", harmless_cookies)
    times = seconds_of("timeout", timeout), seconds_of("swr", swr, least=0)
    passes = Passes()  # Django's method_decorator decorates a method anew at each call

    def decorate(view: V) -> V:
        refuse_known(view, "cache_page")
        name = key_prefix + place_of(view)
        tagged = PageTags(tags, view, policy.query)
        cached = CachedView(name, policy, tagged, times, kinds, harmless, passes)
        if is_async_view(view):

            async def awaited(*args: Any, **kwargs: Any) -> Any:
                return _checked(await view(*args, **kwargs), name)

            @functools.wraps(view)
            async def answer_async(request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
                blocking = async_to_sync(awaited)
                asked = sync_to_async(cached.answer)
                return await asked(request, kwargs, lambda: blocking(request, *args, **kwargs))

            return answer_async  # type: ignore[return-value]

        @functools.wraps(view)
        def answer(request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
            call = functools.partial(view, request, *args, **kwargs)
            return cached.answer(request, kwargs, lambda: _checked(call(), name))

        return answer  # type: ignore[return-value]

    return decorate


class CachedView:
    """One view, and how its responses are kept."""

    def __init__(
        self,
        name: str,
        policy: Policy,
        tags: PageTags,
        times: tuple[float, float],
        cdn: Sequence[str],
        harmless: Sequence[str],
        passes: Passes,
    ) -> None:
        self._name = name
        self._policy = policy
        self._tags = tags
        self._times = times
        self._cdn = cdn
        self._harmless = harmless
        self._passes = passes
        self._told: object = None  # the room that knows the templates of the tags

    def answer(
        self, request: HttpRequest, parameters: dict[str, Any], view: Callable[[], HttpResponseBase]
    ) -> HttpResponseBase:
        """Return the page from the cache, or what the view says."""
        self._tell_templates()
        visit = _visit(request)
        identity = identify(visit, self._policy, self._harmless)
        is_a_users = _is_a_users(request, self._policy)
        if not isinstance(identity, Identity) or is_a_users or _has_body(request):
            return self._marked(view(), is_private=is_a_users or identity == "session")
        if visit.method == "HEAD":  # a view's answer to it may be less than a page
            known = room().cache.get(self._key(identity), StoredPage)
            if known is None or not fits_origin(known, self._policy, visit.headers):
                return self._marked(view(), is_private=False)
            return self._page(known, visit)
        key = self._key(identity)
        if key in self._passes:
            return self._marked(view(), is_private=False)
        rendered: list[HttpResponseBase] = []
        calls_view = is_new = False  # the view is called for this request, and its page may be kept

        def load() -> StoredPage:
            nonlocal calls_view, is_new
            calls_view = True
            with Rendering() as added, _asked_as_all_ask(request, identity):
                response = _rendered(request, view())
                rendered.append(response)
                _refuse_what_is_private(request, self._policy)
                own = self._tags.of({**request.GET.dict(), **parameters})
                tags = all_tags(own, added, room().cache.loaders)
                page = _kept(self._policy, request, response, tags)
            is_new = True
            return page

        ttl, swr = self._times
        options: Any = {"ttl": ttl, "swr": swr, "tags": [_tags_of], "type": StoredPage}
        try:
            found: StoredPage = room().cache.get_or_set(key, load, **options)
        except RenderFailed as failed:
            return rendered[-1] if rendered else _response(failed.response)
        except (NotKept, LoadFailed) as reason:
            if calls_view and isinstance(reason, LoadFailed):  # of a loader that the view calls
                raise
            self._passes.add(key, self._name, reason, room().stats)
            return self._marked(rendered[-1] if rendered else view(), is_private=False)
        if not fits_origin(found, self._policy, visit.headers):
            return self._marked(view(), is_private=False)
        return self._page(found, visit, "fwd=miss; stored" if is_new else "hit")

    def _tell_templates(self) -> None:
        """Tell the room, which is made by the first request, of the templates of this view's tags."""
        own = room()
        if self._told is not own:
            own.cache.loaders.know_tags_of_pages(self._tags.unfilled_texts())
            self._told = own

    def _page(self, page: StoredPage, visit: Visit, status: str = "hit") -> HttpResponse:
        asked = visit.headers
        return _response(answer_from(page, self._policy, visit.method, asked, self._cdn, status))

    def _key(self, identity: Identity) -> str:
        where = [translation.get_language() or "" if settings.USE_I18N else ""]
        where.append(timezone.get_current_timezone_name() if settings.USE_TZ else "")
        return (
            f"page:{self._name}:{urlencode([*zip('lt', where, strict=True)])}:{':'.join(identity)}"
        )

    def _marked(self, response: HttpResponseBase, *, is_private: bool) -> HttpResponseBase:
        """Tell caches on the way that this is not the shared page of its address."""
        more = bypassed(list(response.items()), self._policy, is_private=is_private)
        for name, value in more:
            response[name] = value
        return response


def _visit(request: HttpRequest) -> Visit:
    headers = {name.lower(): value for name, value in request.headers.items()}
    path, root = request.path, request.META.get("SCRIPT_NAME", "")
    site = f"{request.scheme}://{request.get_host()}{root}"
    query = request.META.get("QUERY_STRING", "")
    return Visit(request.method or "GET", site, path.removeprefix(root), query, headers)


def _has_body(request: Any) -> bool:
    """Return whether a body came with this GET. A view may read it, and what is made of it is not for others."""
    request = getattr(request, "_request", request)  # REST framework's is around it
    try:
        return bool(request.body)
    except (RawPostDataException, RequestDataTooBig, UnreadablePostError):  # then there is one
        return True


@contextmanager
def _asked_as_all_ask(request: Any, identity: Identity) -> Iterator[None]:
    """Let the view see only the query that the page's key has, as in other frameworks.

    A link to `request.get_full_path()` would keep what a visitor, or an attacker, wrote into an ignored parameter.
    """
    request = getattr(request, "_request", request)  # REST framework's is around it
    own, had = request.META.get("QUERY_STRING", ""), vars(request).get("GET")
    shared = identity.target.partition("?")[2]
    if shared == own:
        yield
        return
    request.META["QUERY_STRING"] = shared
    request.GET = QueryDict(shared, encoding=request.encoding)
    try:
        yield
    finally:
        request.META["QUERY_STRING"] = own
        if had is None:
            vars(request).pop("GET", None)  # Django makes it of the query again
        else:
            request.GET = had


def _checked(response: Any, view: str) -> HttpResponseBase:
    """Return a view's response. What is no response may be a dict, which would take our headers for its data."""
    if isinstance(response, HttpResponseBase):
        return response
    raise InvalidArgument(
        f"cache_page is for views that return an HttpResponse, and {view} returned a {type(response).__name__}. "
        "Where a framework makes the response, cache_page goes around that: in Django Ninja by "
        "@decorate_view(cache_page(…)) below @api.get"
    )


def _rendered(request: Any, response: Any) -> HttpResponseBase:
    """Render a TemplateResponse now, so that its rendered content is kept.

    In a method of a class of REST framework a response has no renderer yet: that class chooses it now, and says by
    which headers the response varies.
    """
    if (view := _rest_view(request)) is not None:
        response = view.finalize_response(request, response, *view.args, **view.kwargs)
    if hasattr(response, "render") and callable(response.render):
        response = response.render()
    found: HttpResponseBase = response
    return found


def _rest_view(request: Any) -> Any:
    """Return the object of REST framework's that answers this request of its own kind, or None."""
    view = (getattr(request, "parser_context", None) or {}).get("view")
    return view if hasattr(view, "finalize_response") else None


def _refuse_what_is_private(request: HttpRequest, policy: Policy) -> None:
    session = getattr(request, "session", None)
    if session is not None and session.modified:
        raise NotKept("its view changed the session")
    if session is not None and policy.sessions and session.accessed:
        raise NotKept("its view looked at the session, and sessions=True says it does not")
    # Of django.contrib.messages, which keeps them in a cookie of its own: they were looked at, and there are some.
    if getattr(getattr(request, "_messages", None), "_loaded_data", None):
        raise NotKept("it shows messages, which belong to one visitor")
    if _is_a_users(request, policy):
        raise OfOneRequest(
            "its visitor is logged in by other means than a cookie or Authorization: name the header in vary=[…], "
            "or say sessions=True if the page is the same for everybody"
        )
    if request.META.get("CSRF_COOKIE_NEEDS_UPDATE"):
        raise NotKept("it has a CSRF token, which belongs to one visitor")
    # Of Django 6 and of django-csp. It is only true when it was used.
    if getattr(request, "_csp_nonce", None):
        raise NotKept(NONCE)


def _is_a_users(request: Any, policy: Policy) -> bool:
    """Return whether the page is for a user who is logged in, as far as anybody has looked, and nothing says who.

    A lazy user of Django's is left as it is.
    """
    if policy.sessions or not OF_EVERYBODY.issuperset(map(str.lower, policy.vary)):
        return False
    user = vars(getattr(request, "_request", request)).get("user")
    if isinstance(user, SimpleLazyObject) and vars(user).get("_wrapped") is empty:
        return False
    return bool(getattr(user, "is_authenticated", False))


def _kept(policy: Policy, request: HttpRequest, response: Any, tags: Sequence[str]) -> StoredPage:
    if response.status_code in BY_HEADERS:
        raise OfOneRequest(f"its status is {response.status_code}")
    if response.streaming:
        raise NotKept("it is streamed")
    if response.cookies:
        raise NotKept("it sets a cookie")
    if "Content-Encoding" in response:
        raise NotKept("it is compressed for whoever asked: compress further out")
    if marks := [name for name in FOR_MIDDLEWARE if hasattr(response, name)]:
        raise NotKept(
            f"a decorator below cache_page marks it ({marks[0]}): put that above cache_page"
        )
    if "origin" in response.get("Vary", "").lower() and "Origin" in request.headers:
        raise OfOneRequest("it was made for the Origin that asked")
    return kept(policy, response.status_code, list(response.items()), response.content, tags)


def _response(answer: Answer) -> HttpResponse:
    response = HttpResponse(answer.body, status=answer.status)
    del response["Content-Type"]
    for name, value in answer.headers:
        response[name.title()] = value
    return response


def _tags_of(page: StoredPage) -> list[str]:
    return page.tags
