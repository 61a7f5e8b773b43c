"""The session of a websocket: read as any other, written with the message that accepts or refuses the handshake."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from stillroom.operation import Operation
from stillroom.room import AsyncStillroom
from stillroom.web.asgi_types import Message, Send
from stillroom.web.ending import Ending, answer_to
from stillroom.web.headers import Header, decoded, encoded
from stillroom.web.problem import Answer
from stillroom.web.request_session import AsyncWebSession
from stillroom.wire import Budget

log = logging.getLogger("stillroom.web")

POLICY_VIOLATION, TRY_AGAIN_LATER = 1008, 1013  # RFC 6455, and IANA's registry
SWITCHING, FORBIDDEN = 101, 403  # the answers to a handshake, as HTTP statuses
BEGINS = {"websocket.accept": SWITCHING, "websocket.http.response.start": 0}


class Handshake:
    """A websocket on its way up. Until it is accepted its session may change; what comes later is SessionTooLate.

    A session that can't be read or written refuses the handshake: 503 or 409 where the server knows how to answer
    one, else the connection is closed (1013, 1008).
    """

    is_accepted = False

    def __init__(
        self,
        session: AsyncWebSession,
        room: AsyncStillroom,
        budget: Budget,
        scope: Any,
        send: Send,
        ending: Callable[[int, list[Header]], Operation[Ending]],
        keeps_sessions: bool,
    ) -> None:
        """`ending` writes the session for an answer with this status and headers, and ends the request.

        `keeps_sessions`: whether the middleware does, and not another adapter further in.
        """
        self._session = session
        self._room = room
        self._budget = budget
        self._answers = can_answer(scope)
        self._sends_headers = sends_headers(scope)
        self._really_send = send
        self._ending = ending
        self._keeps_sessions = keeps_sessions
        self._has_begun = False
        self._is_refused = False

    async def of(self, app: Any, scope: Any, receive: Any) -> None:
        """Run the app."""
        try:
            await app(scope, receive, self._send)
        except Exception as error:
            if self._has_begun:
                raise
            keeps = self._keeps_sessions
            answer = answer_to(error, self._session, "GET", keeps_sessions=keeps)
            if answer is None:
                raise
            await self._refuse(answer)

    async def _send(self, message: Message) -> None:
        if self._is_refused:
            return
        if not self._has_begun and message["type"] not in BEGINS:
            self._has_begun = True
            self._session.drop()  # closed before it was accepted: no response will carry a cookie
        if self._has_begun:
            await self._really_send(message)
            return
        status = BEGINS[message["type"]] or message["status"]
        headers = decoded(message.get("headers", ()))
        end = await self._room.state.run(self._ending(status, headers))
        if end.instead is not None:
            await self._refuse(end.instead)
            return
        self._has_begun, self.is_accepted = True, status == SWITCHING
        brings_cookie = any(name == "Set-Cookie" for name, _ in end.headers)
        if brings_cookie and self.is_accepted and not self._sends_headers:
            _tell_of_loss(self._session.cookie.name)
        self._budget.left = math.inf
        kept = [header for header in headers if header[0].lower() not in end.without]
        await self._really_send({**message, "headers": encoded([*kept, *end.headers])})

    async def _refuse(self, answer: Answer) -> None:
        self._has_begun = self._is_refused = True
        code = TRY_AGAIN_LATER if answer.status == 503 else POLICY_VIOLATION
        await refuse(self._really_send, answer, self._answers, code)


def can_answer(scope: Any) -> bool:
    """Return whether the server can answer a handshake as it answers a request; else it can only close it."""
    return "websocket.http.response" in (scope.get("extensions") or {})


def sends_headers(scope: Any) -> bool:
    """Return whether the server sends headers with a websocket's acceptance: since 2.1 of ASGI's specification.

    A server that does not say which version it follows means 2.0. Test clients say nothing at all.
    """
    given = scope.get("asgi")
    return given is None or str(given.get("spec_version", "2.0")) != "2.0"


@lru_cache
def _tell_of_loss(name: str) -> None:
    """Log once that the cookie of a websocket's session does not come to the browser."""
    log.warning(
        "the cookie %s of a websocket is lost: this server sends no headers with its acceptance, so a session that "
        "begins there, and a login or logout, does not come to the browser. Do that in a request",
        name,
    )


async def refuse(send: Send, answer: Answer, can_answer: bool, code: int) -> None:
    """Refuse a handshake with this answer where the server can send one, else by closing it."""
    if can_answer:
        start = {"status": answer.status, "headers": encoded(answer.headers)}
        await send({"type": "websocket.http.response.start", **start})
        await send({"type": "websocket.http.response.body", "body": answer.body})
    else:
        await send({"type": "websocket.close", "code": code, "reason": ""})
