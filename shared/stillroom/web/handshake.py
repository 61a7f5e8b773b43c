"""How a websocket is refused before it is accepted."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from stillroom.limits import Decision
from stillroom.web.problem import Answer

POLICY_VIOLATION = 1008  # RFC 6455, section 7.4.1
DENIAL = "websocket.http.response"  # the extension of ASGI by which a handshake gets a whole answer

Message = MutableMapping[str, Any]


async def refuse_handshake(
    scope: MutableMapping[str, Any],
    send: Callable[[Message], Awaitable[None]],
    answer: Answer,
    decision: Decision,
) -> None:
    """Refuse a handshake: with this answer where the server can send one, else by closing, which is a plain 403.

    A banned client is told no more than that.
    """
    if decision.banned or DENIAL not in scope.get("extensions", {}):
        await send({"type": "websocket.close", "code": POLICY_VIOLATION, "reason": said(decision)})
        return
    headers = [(name.lower().encode(), value.encode("latin-1")) for name, value in answer.headers]
    await send({"type": f"{DENIAL}.start", "status": answer.status, "headers": headers})
    await send({"type": f"{DENIAL}.body", "body": answer.body})


def said(decision: Decision) -> str:
    """Why, in the few words that a close has room for."""
    return str(decision.problem().get("title", ""))
