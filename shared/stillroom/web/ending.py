"""How a request ends: its session is written, or another response goes out in place of the app's."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import NamedTuple

from stillroom.errors import SessionEnded, SessionStoreUnavailable
from stillroom.operation import Operation
from stillroom.web.problem import Answer, failed
from stillroom.web.request_session import RequestSession

log = logging.getLogger("stillroom.web")

Header = tuple[str, str]


class Ending(NamedTuple):
    """What is added to the app's headers, or what is answered instead."""

    headers: list[Header]
    instead: Answer | None = None


def ending(
    session: RequestSession, status: int, headers: Iterable[Header], method: str
) -> Operation[Ending]:
    """Write the session, for a response with this status and headers.

    A response of 5xx keeps nothing of what the request did to its session: it failed, as a transaction does. What
    the app has saved itself stays, and its cookie goes out. One of 500 after the session could not be read becomes
    a 503.
    """
    if status >= 500 and session.drop():
        log.warning("a response of %d: its request's changes to the session are dropped", status)
    if status == 500 and isinstance(session.failure, SessionStoreUnavailable):
        return Ending([], failed(session.failure, method))
    try:
        cookie = yield from session.writing()
    except (SessionStoreUnavailable, SessionEnded) as error:
        log.warning("the session of a request was not written: %s", error)
        return Ending([], failed(error, method))
    return Ending([*_vary(session), *_set_cookie(cookie, headers)])


def report_loss(session: RequestSession) -> None:
    """To be called when the response is over."""
    if session.is_lost:
        log.error(
            "a list or dict in a session was changed after the response had begun: it is lost"
        )


def _vary(session: RequestSession) -> list[Header]:
    return [("Vary", "Cookie")] if session.is_looked_at else []


def _set_cookie(cookie: str | None, headers: Iterable[Header]) -> list[Header]:
    """A shared cache must not give one visitor's cookie to the next."""
    if cookie is None:
        return []
    return [("Set-Cookie", cookie), *lacking(headers, [("Cache-Control", "private")])]


def lacking(headers: Iterable[Header], more: Iterable[Header]) -> list[Header]:
    """Those of `more` that are not among the headers: what the app says itself, it knows better."""
    names = {name.lower() for name, _ in headers}
    return [header for header in more if header[0].lower() not in names]
