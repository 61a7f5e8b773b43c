"""The parts that our Django middlewares have in common. The outermost of them begins a request of the room."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from typing import Any

from asgiref.sync import iscoroutinefunction
from django.conf import settings
from django.http import HttpRequest, HttpResponse, HttpResponseBase
from django.utils.deprecation import MiddlewareMixin

from stillroom.errors import InvalidArgument, SettingsError
from stillroom.room import Stillroom
from stillroom.web.django import room
from stillroom.web.explain import NAME, explainer_of
from stillroom.web.headers import Header
from stillroom.web.problem import Answer
from stillroom.web.session_cookie import SessionCookie
from stillroom.web.visit import RENDERING
from stillroom.web.within import within
from stillroom.wire import time_left

OF_NINJA = "_ninja_operation"  # on a function, when Django Ninja's decorators have taken it
WITHIN = "_stillroom_within"  # on a request: its budget, by which the first of our middlewares has begun it


class InRequest(MiddlewareMixin):
    """A middleware behind which all Redis calls of a request share `request_timeout`.

    What the process keeps of the cache is proved once for all that the request reads.
    """

    def __call__(self, request: HttpRequest) -> Any:
        if self.async_mode or _is_within(request):
            return super().__call__(request)
        own = room()
        if own.settings.explain_header:
            return self._explained(own, request)
        with within(own):
            _begun(request)
            return super().__call__(request)

    async def __acall__(self, request: HttpRequest) -> Any:
        if _is_within(request):
            return await super().__acall__(request)
        own = room()
        told = _told(own, request) if own.settings.explain_header else nullcontext(_as_it_is)
        with within(own), told as tell:
            _begun(request)
            return tell(await super().__acall__(request))

    def _explained(self, own: Stillroom, request: HttpRequest) -> Any:
        with within(own), _told(own, request) as tell:
            _begun(request)
            return tell(super().__call__(request))


def refuse_known(view: object, what: str) -> None:
    """Refuse a view that Django Ninja has already, and would call without `what` goes around it."""
    if hasattr(view, OF_NINJA):
        name = getattr(view, "__qualname__", repr(view))
        raise InvalidArgument(
            f"{name} is in its API already, which would call it without @{what}(…): put that below @api.get"
        )


def is_async_view(view: Any) -> bool:
    """Return whether a view is awaited: a coroutine function, or a class of them, or `dispatch` of such a class."""
    owner = getattr(getattr(view, "func", view), "__self__", None)
    is_dispatch = getattr(view, "__name__", "") == "dispatch"
    return iscoroutinefunction(view) or (is_dispatch and getattr(owner, "view_is_async", False))


def response_of(answer: Answer) -> HttpResponse:
    """Return an answer of ours as Django's response."""
    return HttpResponse(answer.body, status=answer.status, headers=dict(answer.headers))


def change_headers(
    response: HttpResponseBase, added: Iterable[Header], without: Iterable[str]
) -> None:
    """Take headers from a response by their names, and set others."""
    for name in without:
        del response.headers[name]
    for name, value in added:
        response.headers[name] = value


@lru_cache
def session_cookie(name: str) -> SessionCookie | None:
    """Return the cookie by which Django's session is read along with the limits.

    None: Django's setting names it as no cookie of ours is named.
    """
    try:
        return SessionCookie(name)
    except SettingsError:
        return None


def _is_within(request: HttpRequest) -> bool:
    """Return whether a middleware of ours further out has begun this request, and it is not over."""
    budget = getattr(request, WITHIN, None)
    return budget is not None and budget is time_left()


def _begun(request: HttpRequest) -> None:
    setattr(request, WITHIN, time_left())


@contextmanager
def _told(own: Stillroom, request: HttpRequest) -> Iterator[Any]:
    """Yield what makes of a response one that tells of the reads inside, if the request is to be told."""
    explainer = explainer_of(own)
    is_rendered = RENDERING in (getattr(request, "environ", None) or getattr(request, "scope", {}))
    given = request.headers.get(NAME)
    if explainer is None or is_rendered or not explainer.wants(given, lambda: settings.DEBUG):
        yield _as_it_is
        return
    with explainer.telling() as told:

        def tell(response: HttpResponseBase) -> HttpResponseBase:
            change_headers(response, *told(list(response.items())))
            return response

        yield tell


def _as_it_is(response: HttpResponseBase) -> HttpResponseBase:
    return response
