"""Judge how a batch ended: replies, an error of the server, or no answer; and tell the breaker.

An error has an owner. The command's: it alone was refused, and the connection is good. The peer's: this server is
not, or not now, the one to talk to, whatever it was asked (a replica, a server that loads its data, a proxy that
lost its own connection). The configuration's: see explain.py.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import Any, Protocol

from stillroom.errors import RedisRefused, RedisUnavailable
from stillroom.shown import shown
from stillroom.wire.breaker import Breaker
from stillroom.wire.failure import unavailable
from stillroom.wire.server import LOOK_EVERY_S, Command, ReplyError, Server, name_of

LONGEST = 1_000  # characters of an error; that of protected mode has 900
# Errors of a server that is the wrong one to ask. It has executed nothing that it refused with one of these.
UNAPPLIED = {"readonly", "masterdown", "loading", "noreplicas", "noauth"}
# The same, and whether the command was carried out is not known.
UNKNOWN = {"unblocked", "proxy"}
PEER = UNAPPLIED | UNKNOWN
# After these errors the other replies of the batch are good: the server is the right one, but not ready for all.
ANSWERS_KEPT = {"masterdown", "loading", "noreplicas", "noauth"}
# Error replies that mean the server can't serve anybody right now; they count toward the breaker.
AWAY = {"busy", "clusterdown", "tryagain"} | PEER - {"noauth", "noreplicas"}

# Errors that proxies answer with in a server's place: twemproxy in the system's words, Envoy with its upstream's.
_PROXY = re.compile(
    r"upstream|closed|backend conn|host is down|no route to host|server connection"
    r"|connection (reset|refused|timed out|failed)",
    re.IGNORECASE,
)
# A server without this command, or a proxy that does not pass it on.
_UNSUPPORTED = re.compile(
    r"unknown (redis )?command|(unsupported|disabled) command|command (is )?not (supported|allowed)",
    re.IGNORECASE,
)
# Where a script lacks a right: servers have a code for that only outside of scripts.
_NO_RIGHT = re.compile(r"The user executing the script can't|ACL failure in script")
# Where in a script that was: it says nothing to whoever gives rights, memory or replicas.
_PLACE = re.compile(r" script:( \S+,)? on @user_script:\d+\.?$")
_CODE = re.compile(r"[A-Z]{2,}$")
# What stands in front of the error that a script met, as Redis 6 tells it.
_IN_SCRIPT = re.compile(r"^ERR Error running script .*@user_script: ?\d+: -?(?=[A-Z]{2,} )")
# May be sent to another server though this one has answered: reads; and counts, which a failover may double.
_HARMLESS = {
    *(b"MGET", b"GET", b"HGETALL", b"HMGET", b"ZRANGE", b"ZSCORE", b"ZMSCORE", b"ZCARD", b"EXISTS"),
    *(b"XREVRANGE", b"XLEN", b"LLEN", b"LINDEX", b"INFO", b"TIME", b"SLOWLOG", b"PING", b"SCRIPT"),
    *(b"HINCRBY", b"EXPIRE", b"WAIT"),
}


class PeerFailed(RedisUnavailable):
    """The server that answered is not the one to talk to: the wire drops it, and finds out who is.

    `replies`: what it said to the batch.
    """

    def __init__(self, reason: str, detail: str, replies: Sequence[Any]) -> None:
        super().__init__(reason, detail)
        self.replies = replies
        self.is_in_doubt = False  # something of it may have been applied, where it may be lost

    def told(self) -> RedisUnavailable:
        """Return the error for the caller.

        It has the replies only if this is the right server. Nobody knows how old the answers of a replica are.
        """
        if self.reason in ANSWERS_KEPT:
            return RedisRefused(self.reason.upper(), self.detail, self.replies)
        return RedisUnavailable(self.reason, self.detail, may_be_done=self.is_in_doubt)


class _Heard(Protocol):
    @property
    def heard(self) -> Sequence[Any]: ...

    @property
    def is_interrupted(self) -> bool: ...


def ended(
    commands: Sequence[Command], link: _Heard | None, error: BaseException, breaker: Breaker
) -> list[Any]:
    """Return the replies, with 0 for WAIT, if that alone was not answered in time. Raises the error else.

    Nothing is wrong with a server that is late with WAIT. Where nobody else talks to it, it looks only ten times a
    second (`hz`) whether the time of a WAIT is over. Nor is anything where a signal's handler raised TimeoutError
    meanwhile, as an app's own time limit does: that is for the app. What was refused is judged already.
    """
    if isinstance(error, RedisRefused) or (link is not None and link.is_interrupted):
        raise error
    is_waiting = isinstance(error, TimeoutError) and name_of(commands[-1]) == b"WAIT"
    if is_waiting and link is not None and len(link.heard) == len(commands) - 1:
        try:
            return checked([*link.heard, 0], breaker)
        except PeerFailed as failed:
            error = failed
    raise judged(error, breaker) from None


def checked(replies: list[Any], breaker: Breaker) -> list[Any]:
    """Return the replies, unless one is an error. Raises RedisRefused, or PeerFailed."""
    breaker.calls += 1
    if ReplyError in map(type, replies):
        raise _refused(replies, breaker)
    if breaker.streak:
        breaker.streak = 0
    return replies


def _refused(replies: list[Any], breaker: Breaker) -> RedisUnavailable:
    for reply in replies:
        if isinstance(reply, ReplyError) and _is_the_peers(reason := owner_of(str(reply)), breaker):
            return PeerFailed(reason, _parts(told_by(reply))[1], replies)
    refused = refusal(replies)
    if refused.reason in AWAY and refused.reason != "tryagain":  # which is about one slot
        breaker.failed(refused)
    return refused


def _is_the_peers(reason: str, breaker: Breaker) -> bool:
    """Return whether another server is to be asked.

    A server with too few replicas may have been cut off from them, and another one been appointed. Or it is the
    right one, and refuses each write for hours, but no read: so another one is looked for now and then only.
    """
    if reason != "noreplicas":
        return reason in PEER
    now = time.monotonic()
    if now < breaker.elsewhere_at:
        return False
    breaker.elsewhere_at = now + LOOK_EVERY_S
    return True


def owner_of(text: str) -> str:
    """Return the reason in an error reply: its code in lower case, `proxy` for what no server says."""
    code, detail = _parts(text)
    if code != "ERR" and _CODE.match(code):
        return code.lower()
    if _NO_RIGHT.search(detail):
        return "noperm"
    return "proxy" if _PROXY.search(text) else "err"


def _parts(text: str) -> tuple[str, str]:
    """Return the code of an error reply and its sentence, also where a script met it."""
    code, _, detail = _IN_SCRIPT.sub("", text).partition(" ")
    return code, detail


def told_by(reply: ReplyError) -> str:
    """Return an error reply as logs may show it: on one line, and not longer than what a server itself says."""
    return shown(reply, LONGEST)


def is_there(text: str) -> bool:
    """Return whether a server that answers with this error answers other commands."""
    return owner_of(text) not in AWAY | {"noauth"}


def is_dead(error: BaseException) -> bool:
    """Return whether an idle connection turned out dead: it has ended, and was not merely silent."""
    return isinstance(error, OSError | EOFError) and not isinstance(error, TimeoutError)


def may_repeat(commands: Sequence[Command], replies: Sequence[Any], *, idempotent: bool) -> bool:
    """Return whether a batch may be sent to another server after this one said that it is not the right one.

    Yes where nothing was sent, nothing can have been applied, or twice does no harm.
    """
    if idempotent or not replies:
        return True
    parts = getattr(commands, "parts", ()) or [(len(commands), True)]
    place = 0
    for length, is_once in parts:
        part = range(place, place + length)
        if is_once and not all(_is_harmless(commands[n], replies[n]) for n in part):
            return False
        place += length
    return True


def _is_harmless(command: Command, reply: Any) -> bool:
    if isinstance(reply, ReplyError):
        return owner_of(str(reply)) not in UNKNOWN
    return name_of(command) in _HARMLESS


def judged(error: BaseException, breaker: Breaker) -> BaseException:
    """Return the error to raise. An exhausted pool or budget is ours, and does not count against the server."""
    failure = error.told() if isinstance(error, PeerFailed) else unavailable(error)
    if failure is None:
        return error
    if failure.reason not in ("pool", "budget") and not _is_the_commands(failure):
        breaker.failed(failure)
    return failure


def _is_the_commands(failure: RedisUnavailable) -> bool:
    return isinstance(failure, RedisRefused) and failure.reason not in AWAY


class NodeAway(ReplyError):
    """Stands in a batch's replies for those of one node that did not answer, where other nodes did."""

    def __init__(self, failure: RedisUnavailable) -> None:
        super().__init__(f"{failure.reason.upper()} {failure.detail}")
        self.failure = failure

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.failure,)


def refusal(replies: Sequence[Any]) -> RedisRefused:
    """Return the first error among the replies, as ours."""
    first = next(reply for reply in replies if isinstance(reply, ReplyError))
    if isinstance(first, NodeAway):
        failure = first.failure
        told = RedisRefused(failure.reason, failure.detail, replies)
        some_is_done = any(not isinstance(reply, Exception) for reply in replies)
        told._may_be_done = failure.may_be_done or some_is_done
        return told
    text = told_by(first)
    code, detail = _parts(text)
    if code == "ERR" and _UNSUPPORTED.search(detail):
        code = "UNSUPPORTED"
    elif owner_of(text) == "noperm":
        code = "NOPERM"
    if code != "ERR":  # else it may be the script's own fault
        detail = _PLACE.sub("", detail)
    return RedisRefused(code, detail, replies)


class Generational(Protocol):
    """A connection: see Server.generation."""

    generation: int


def greeted(replies: Sequence[Any], server: Server, asked_ns: int, link: Generational) -> None:
    """Take in the replies to a handshake: the server's clock, which run of it this is, and its role.

    Raises RedisUnavailable if a part of it was refused; the reason is that part (`auth`, `select`, `time`), or the
    server's own word where it can't serve anybody. A user who may not ask for the run id is let in all the same.
    """
    said = {part: reply for (part, _), reply in zip(server.handshake, replies, strict=True)}
    for part in ("auth", "select", "time"):
        if isinstance(reply := said.get(part), ReplyError):
            raise _not_let_in(part, told_by(reply))
    try:
        server.learn_clock(said["time"], asked_ns)
        is_another = server.learn_peer(said["info"], said["role"])
    except (TypeError, ValueError, LookupError) as error:  # it speaks the protocol, and is no Redis
        raise RedisUnavailable("protocol", f"no Redis answers like this: {error!r}") from None
    if is_another:
        link.generation = server.generation


def _not_let_in(part: str, text: str) -> RedisUnavailable:
    """Return the error for a refused part of the handshake.

    No service may read the handshake's replies as its own.
    """
    code, _, detail = text.partition(" ")
    reason = owner_of(text)
    if reason in AWAY:
        return RedisUnavailable(reason, detail)
    if code in ("WRONGPASS", "NOAUTH") or (part == "auth" and "AUTH" in text):
        return RedisUnavailable("auth", detail)
    if part == "auth" and code == "ERR" and "password" not in text:
        return RedisUnavailable("refused", detail)  # too many clients …
    return RedisUnavailable(part, detail)
