"""Makes the answers that replace the app's: application/problem+json. Pure. Source: RFC 9457."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import NamedTuple

from stillroom.errors import LoadShed, SessionEnded, SessionNotFresh, StillroomError

RETRY_AFTER_S = 2  # the breaker's probes come once a second
_PHRASES = {one.value: one.phrase for one in HTTPStatus}


class Answer(NamedTuple):
    """A whole response."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes

    @property
    def line(self) -> str:
        """Return the status as WSGI writes it. An app may answer with one that no standard names."""
        return f"{self.status} {_PHRASES.get(self.status, 'Unknown')}"


def answer(
    status: int, problem: Mapping[str, object], headers: Mapping[str, str], method: str = "GET"
) -> Answer:
    """Return a problem as a response; one to HEAD has no body."""
    body = json.dumps(problem).encode()
    written = {
        "Content-Type": "application/problem+json",
        "Content-Length": str(len(body)),
        "Cache-Control": "no-store",
        **headers,
    }
    return Answer(status, list(written.items()), b"" if method == "HEAD" else body)


def failed(failure: StillroomError, method: str = "GET") -> Answer:
    """Return the answer to a request whose session failed.

    503: it could not be read or written. 409: it had ended meanwhile. 401: its user has to prove again who he is.

    The cookie is left as it is: the session may well live.
    """
    if isinstance(failure, SessionNotFresh):
        detail = "Confirm who you are, and try again."
        return answer(401, _sentence(401, detail) | {"max_age": failure.within}, {}, method)
    if isinstance(failure, SessionEnded):
        return answer(
            409, _sentence(409, "The session ended while this request was under way."), {}, method
        )
    retry = {"Retry-After": str(RETRY_AFTER_S)}
    return answer(503, _sentence(503, "Sessions can't be reached at the moment."), retry, method)


def shed(error: LoadShed, method: str = "GET") -> Answer:
    """Return the answer to a request whose load found no place: 503, and when to come again."""
    retry = {"Retry-After": str(math.ceil(error.retry_after))}
    return answer(503, _sentence(503, "Too many ask for this at the moment."), retry, method)


def foreign(method: str = "GET") -> Answer:
    """Return the answer to a request that another site's page made: 403."""
    return answer(403, _sentence(403, "This request comes from another site's page."), {}, method)


def _sentence(status: int, detail: str) -> dict[str, object]:
    return {"title": HTTPStatus(status).phrase, "status": status, "detail": detail}
