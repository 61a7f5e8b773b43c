"""Ends a request: it writes the session, or sends another response in place of the app's."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from stillroom.errors import LoadShed, SessionEnded, SessionNotFresh, SessionStoreUnavailable
from stillroom.operation import Operation
from stillroom.web.headers import Header, private, vary
from stillroom.web.problem import Answer, failed, shed
from stillroom.web.request_session import RequestSession

log = logging.getLogger("stillroom.web")


class Ending(NamedTuple):
    """Hold the headers to add to the app's and those to take away, or the answer to send instead."""

    headers: list[Header]
    instead: Answer | None = None
    without: frozenset[str] = frozenset()  # names, in small letters


def ending(
    session: RequestSession, status: int, headers: Iterable[Header], method: str
) -> Operation[Ending]:
    """Write the session, for a response with this status and headers.

    A response of 5xx keeps nothing of what the request did to its session: it failed, as a transaction does. What
    the app has saved itself stays, and its cookie goes out. One of 500 after the session could not be read becomes
    a 503, and after `require_fresh` a 401.
    """
    if status >= 500 and session.drop():
        log.warning("a response of %d: its request's changes to the session are dropped", status)
    if status == 500 and isinstance(session.failure, SessionStoreUnavailable | SessionNotFresh):
        return Ending([], failed(session.failure, method))
    try:
        cookie = yield from session.writing()
    except (SessionStoreUnavailable, SessionEnded) as error:
        log.warning("the session of a request was not written: %s", error)
        return Ending([], failed(error, method))
    return with_cookie(session, cookie, headers)


def answer_to(
    error: Exception, session: RequestSession, method: str, *, keeps_sessions: bool
) -> Answer | None:
    """Return the answer to a request whose app raised this error. None: it is the app's own.

    The app may have made another error of the one that its session raised, and tasks raise theirs in groups. An
    error after one that the app has handled is not made of it. Where the middleware does not keep the sessions,
    another adapter does, such as Django's in Channels: that one's failure is known by its class.
    """
    failure = session.failure
    is_theirs = isinstance(failure, SessionStoreUnavailable | SessionNotFresh)
    if is_theirs and failure in _behind(error):
        trace = None if error is failure else error
        log.warning(
            "a request was not answered for want of its session: %s", failure, exc_info=trace
        )
        return failed(failure, method)
    raised = _leaves(error)
    away = [one for one in raised if isinstance(one, SessionStoreUnavailable)]
    if len(away) == len(raised) and not keeps_sessions:
        log.warning("a request was not answered for want of a session: %s", away[0])
        return failed(away[0], method)
    loads = [one for one in raised if isinstance(one, LoadShed)]
    if len(loads) == len(raised):
        return shed(loads[0], method)
    # A LimitExceeded brings its answer. A framework's handlers do not see one that its middleware raises.
    answer = getattr(error, "answer", None)
    return answer if isinstance(answer, Answer) else None


def _behind(error: BaseException) -> list[BaseException]:
    """Return an error, those in its group, and those that it was made of."""
    found: list[BaseException] = [error]
    for one in found:  # which grows meanwhile
        more = [one.__cause__, one.__context__, *_leaves(one)]
        found += [other for other in more if other is not None and other not in found]
    return found


def _leaves(error: BaseException) -> list[BaseException]:
    """Return the errors in a group, and in the groups in it."""
    if not isinstance(error, BaseExceptionGroup):
        return [error]
    return [leaf for one in error.exceptions for leaf in _leaves(one)]


def ended(session: RequestSession, headers: Iterable[Header]) -> Ending | None:
    """End a request that leaves its session as it was, as most do: then there is nothing to say to Redis.

    None: there is, see `ending`.
    """
    return with_cookie(session, None, headers) if session.is_left() else None


def with_cookie(session: RequestSession, cookie: str | None, headers: Iterable[Header]) -> Ending:
    """Return the changes to the response's headers that the session needs."""
    if not session.is_looked_at:
        return Ending([])
    if cookie is None:
        return Ending(vary(headers))
    given = list(headers)
    if session.cookie.secure and session.is_over_http:
        _tell_of_http(session.cookie.name)
    more, without = private(given)
    return Ending([*more, *vary(given), ("Set-Cookie", cookie)], None, without)


def report_loss(session: RequestSession) -> None:
    """Report a change that was lost. To be called when the response is over."""
    if session.is_lost:
        log.error(
            "a list or dict in a session was changed after the response had begun: the change is lost"
        )


@lru_cache
def _tell_of_http(name: str) -> None:
    """Log once that a secure cookie goes over http, where the next request would have no login."""
    log.warning(
        "the cookie %s is Secure and this request came over plain http: most clients will not send it back, so "
        "nobody stays logged in. Is there a proxy that ends TLS? Then let it send X-Forwarded-Proto. On plain http "
        'pass cookie=SessionCookie("sid", secure=False)',
        name,
    )
