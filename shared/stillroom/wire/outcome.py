"""How a batch ended: replies, an error of the server, or no answer; and what the breaker hears of it."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Sequence
from typing import Any

import hiredis

import redis
from stillroom.errors import RedisRefused, RedisUnavailable
from stillroom.wire.breaker import Breaker
from stillroom.wire.server import ReplyError, Server

_RUN_ID = re.compile(rb"^run_id:(\w+)", re.MULTILINE)

# Error replies that mean the server can't serve anybody right now; they count toward the breaker.
AWAY = {"loading", "masterdown", "busy", "clusterdown", "tryagain"}


def checked(replies: list[Any], breaker: Breaker) -> list[Any]:
    """The replies, unless one is an error."""
    breaker.calls += 1
    for reply in replies:
        if isinstance(reply, ReplyError):
            refused = refusal(replies)
            if refused.reason in AWAY:
                breaker.failed(refused)
            raise refused
    if breaker.streak:
        breaker.streak = 0
    return replies


def judged(error: BaseException, breaker: Breaker) -> BaseException:
    """The error to raise. Waiting in vain for a connection of ours says nothing about the server."""
    failure = unavailable(error)
    if failure is None:
        return error
    if failure.reason not in ("pool", "budget"):
        breaker.failed(failure)
    return failure


def refusal(replies: Sequence[Any]) -> RedisRefused:
    """The first error among the replies, as ours."""
    text = str(next(reply for reply in replies if isinstance(reply, ReplyError)))
    code, _, detail = text.partition(" ")
    return RedisRefused(code, detail, replies)


def greeted(replies: Sequence[Any], server: Server, asked_ns: int) -> None:
    """Take in the replies to a handshake: the server's clock, and which run of it this is.

    Raises RedisUnavailable if a part of it was refused; the reason is that part (`auth`, `select`, `time`), or the
    server's own word where it can't serve anybody. A user who may not ask for the run id is let in all the same.
    """
    said = {part: reply for (part, _), reply in zip(server.handshake, replies, strict=True)}
    info = said.pop("info")
    for part, reply in said.items():
        if isinstance(reply, ReplyError):
            raise _not_let_in(part, str(reply))
    server.learn_clock(said["time"], asked_ns)
    found = None if isinstance(info, ReplyError) else _RUN_ID.search(info)
    server.run = found[1] if found else b""


def _not_let_in(part: str, text: str) -> RedisUnavailable:
    """What a refused part of the handshake means. Its replies stay here: no service may read them as its own."""
    code, _, detail = text.partition(" ")
    if code.lower() in AWAY:
        return RedisUnavailable(code.lower(), detail)
    if code in ("WRONGPASS", "NOAUTH") or (part == "auth" and "AUTH" in text):
        return RedisUnavailable("auth", detail)
    if part == "auth" and code == "ERR" and "password" not in text:
        return RedisUnavailable("refused", detail)  # too many clients …
    return RedisUnavailable(part, detail)


def unavailable(error: BaseException) -> RedisUnavailable | None:
    """What an error of the socket or of redis-py means, or None if it is not Redis' fault."""
    if isinstance(error, RedisUnavailable):
        return error
    if isinstance(error, redis.AuthenticationError | redis.exceptions.AuthorizationError):
        return RedisUnavailable("auth", str(error))
    if isinstance(error, redis.TimeoutError | TimeoutError):
        return RedisUnavailable("timeout")
    if isinstance(error, redis.exceptions.BusyLoadingError):
        return RedisUnavailable("loading")
    if isinstance(error, ConnectionRefusedError | socket.gaierror | redis.ConnectionError):
        return RedisUnavailable("refused", _without_address(error))
    if isinstance(error, redis.RedisError | hiredis.HiredisError):
        return RedisUnavailable("protocol", str(error))
    if isinstance(error, OSError | EOFError):
        return RedisUnavailable("closed", _without_address(error))
    return None


def _without_address(error: BaseException) -> str:
    """What the system said, without where to: errors end up in logs, which more people read than settings."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        return str(error)  # redis-py's own, of a connection that it has
    if isinstance(cause, socket.gaierror):
        return str(cause.strerror)
    return os.strerror(cause.errno) if cause.errno else "none of its addresses answers"
