"""Django's session middleware, with what shared caches and late responses must not do to its cookie, and a 503
where it would have been a 500: Redis away is no error of the app."""

from __future__ import annotations

from typing import Any

from django.conf import settings
from django.contrib.sessions.middleware import SessionMiddleware as DjangoSessions
from django.http import HttpRequest, HttpResponse, HttpResponseBase

from stillroom.errors import LoadShed, SessionStoreUnavailable
from stillroom.sessions import steady_us
from stillroom.web.django.requests import (
    InRequest,
    change_headers,
    response_of,
    session_cookie,
)
from stillroom.web.django.sessions import SessionStore
from stillroom.web.headers import private
from stillroom.web.problem import failed, shed
from stillroom.web.wsgi import ALONG


class SessionMiddleware(InRequest, DjangoSessions):
    """Replaces django.contrib.sessions.middleware.SessionMiddleware.

    A request whose session can't be read or written is answered with 503 and Retry-After, and its cookie is left as
    it is. Cookie settings are Django's: set SESSION_COOKIE_SECURE, and "__Host-sessionid" as SESSION_COOKIE_NAME.
    A cookie goes out only where the browser has to keep another one, for as long as the session may live; then the
    response is private, whatever the view says.
    """

    def __call__(self, request: HttpRequest) -> Any:
        try:
            return super().__call__(request)
        except SessionStoreUnavailable as error:  # of an error page that looks at the session
            return _unavailable(error)

    async def __acall__(self, request: HttpRequest) -> Any:
        try:
            return await super().__acall__(request)
        except SessionStoreUnavailable as error:
            return _unavailable(error)

    def process_request(self, request: HttpRequest) -> None:
        super().process_request(request)
        session = request.session
        if isinstance(session, SessionStore):
            session.is_in_request = True
            session.asked_us = steady_us()
            session.agent = request.META.get("HTTP_USER_AGENT", "")
            session.along = request.META.get(ALONG)

    def process_exception(
        self, request: HttpRequest, exception: Exception
    ) -> HttpResponseBase | None:
        if isinstance(exception, SessionStoreUnavailable):
            return _unavailable(exception)
        return response_of(shed(exception)) if isinstance(exception, LoadShed) else None

    def process_response(
        self, request: HttpRequest, response: HttpResponseBase
    ) -> HttpResponseBase:
        session = getattr(request, "session", None)
        failure = getattr(session, "failure", None)
        if failure is not None and response.status_code == 500:  # of a middleware that looked
            return _unavailable(failure)
        try:
            response = super().process_response(request, response)
            if isinstance(session, SessionStore):
                _set_right(request, session, response)
        except SessionStoreUnavailable as error:
            return _unavailable(error)
        return response


def _set_right(request: HttpRequest, session: SessionStore, response: HttpResponseBase) -> None:
    """Leave the cookie in the response only where it changed, and keep shared caches from storing that response."""
    name = settings.SESSION_COOKIE_NAME
    if session.along is not None and session.accessed:
        session.along.taken_by = session_cookie(name)
    cookie = response.cookies.get(name)
    if cookie is None:
        return
    came = request.COOKIES.get(name)
    # Django has the browser forget it by an empty value, or by an age that is over. Of a session that was not begun
    # it writes None.
    lives = cookie.value == session.session_key and not session.has_ended
    if cookie.value == came if lives else not session.may_be_forgotten(came or ""):
        del response.cookies[name]
        return
    if lives and cookie["max-age"] and session.found is not None:
        cookie["max-age"] = int(session.found.ends_by - session.found.read_at)
        cookie["expires"] = ""
    change_headers(response, *private(list(response.items())))


def _unavailable(error: SessionStoreUnavailable) -> HttpResponse:
    return response_of(failed(error))
