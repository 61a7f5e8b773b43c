"""Django's session middleware, and a 503 where it would have been a 500: Redis away is no error of the app."""

from __future__ import annotations

from django.contrib.sessions.middleware import SessionMiddleware as DjangoSessions
from django.http import HttpRequest, HttpResponse, HttpResponseBase

from stillroom.errors import SessionStoreUnavailable
from stillroom.web.problem import failed


class SessionMiddleware(DjangoSessions):
    """In the place of django.contrib.sessions.middleware.SessionMiddleware.

    A request whose session can't be read or written is answered with 503 and Retry-After, and its cookie is left as
    it is. Cookie settings are Django's: set SESSION_COOKIE_SECURE, and "__Host-sessionid" as SESSION_COOKIE_NAME.
    """

    def process_exception(
        self, request: HttpRequest, exception: Exception
    ) -> HttpResponseBase | None:
        if isinstance(exception, SessionStoreUnavailable):
            return _unavailable(exception)
        return None

    def process_response(
        self, request: HttpRequest, response: HttpResponseBase
    ) -> HttpResponseBase:
        try:
            return super().process_response(request, response)
        except SessionStoreUnavailable as error:
            return _unavailable(error)


def _unavailable(error: SessionStoreUnavailable) -> HttpResponse:
    answer = failed(error)
    return HttpResponse(answer.body, status=answer.status, headers=dict(answer.headers))
