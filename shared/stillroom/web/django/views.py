"""For Django's views: `@fresh(600)` asks again who somebody is before a password is changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, TypeVar

from asgiref.sync import sync_to_async
from django.http import HttpResponse

from stillroom.durations import Duration, seconds_of
from stillroom.errors import SessionNotFresh, SessionNotLoaded
from stillroom.misuse import explained
from stillroom.web.django.requests import is_async_view, refuse_known, response_of
from stillroom.web.placing import checked_view
from stillroom.web.problem import failed

View = TypeVar("View", bound=Callable[..., Any])


@explained
def fresh(seconds: Duration) -> Callable[[View], View]:
    """Return a decorator: 401 unless the session's user has proved within so many seconds who they are.

    For views and methods, sync or async. After the user has proved it again, call `request.session.confirm()`.
    """
    within = seconds_of("seconds", seconds, least=0)

    def decorated(view: View) -> View:
        checked_view(view, '@method_decorator(fresh(…), name="dispatch")')
        refuse_known(view, "fresh")

        @wraps(view)
        def checked(*args: Any, **kwargs: Any) -> Any:
            return _refusal(args, kwargs, within) or view(*args, **kwargs)

        @wraps(view)
        async def awaited(*args: Any, **kwargs: Any) -> Any:
            refusal = await sync_to_async(_refusal)(args, kwargs, within)
            return refusal or await view(*args, **kwargs)

        return awaited if is_async_view(view) else checked  # type: ignore[return-value]

    return decorated


def _refusal(args: Sequence[Any], kwargs: Mapping[str, Any], seconds: float) -> HttpResponse | None:
    """Return the answer to a request that is refused. In a method the request comes after `self`."""
    sessions = [getattr(one, "session", None) for one in (*args[:2], kwargs.get("request"))]
    session: Any = next((one for one in sessions if hasattr(one, "is_fresh")), None)
    if session is None:
        raise SessionNotLoaded(
            "this request has no session of Stillroom, so none is fresh: set SESSION_ENGINE to "
            "stillroom.web.django.sessions, and add the SessionMiddleware of stillroom.web.django.middleware"
        )
    if session.is_fresh(seconds):
        return None
    return response_of(failed(SessionNotFresh(seconds, None)))
