"""Broken variants of the sessions, the limits and abuse, one promise each: the explorer has to find them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

from stillroom.abuse import body as abuse_body
from stillroom.abuse import scan
from stillroom.limits import asking as limits_asking
from stillroom.limits import body as limits_body
from stillroom.limits import settling
from stillroom.limits.local import LocalLimits
from stillroom.limits.settling import Settling
from stillroom.locks.body import LocksBody
from stillroom.operation import Once
from stillroom.sessions import body as sessions_body
from stillroom.sessions.beginning import Beginning
from stillroom.sessions.ends import End
from tests.explorer.mutants import replaced, with_lua

Mutants = dict[str, Callable[[], Any]]


def _nothing(*_: Any) -> None:
    """Instead of what should be done."""


def _no_operation(*_: Any) -> Any:
    yield from ()


def _forgets_after(self: LocalLimits, charges: Iterable[Any], now: int, *, told: bool) -> None:
    _real_settle(self, charges, now, told=told)
    if told:
        self._settled.clear()


_real_settle = LocalLimits.settle

SESSIONS: Mutants = {
    "an end has no age": lambda: replaced(End, "age", lambda *_: 0),
    "a doubt is not cleared": lambda: replaced(End, "after", _nothing),
    "a lost login stays": lambda: replaced(Beginning, "_give_up", _nothing),
    "what was undone happens later": lambda: with_lua("if known[2] then", "if false then"),
    "a lost rotation stays": lambda: with_lua("former and former.to == session.h", "false"),
    "a revocation is sent twice": lambda: replaced(Once, "apart", list),
    "a login replaces only what is near": lambda: replaced(Beginning, "_end", _no_operation),
    "a refused login ends what it would have replaced": lambda: replaced(
        Beginning, "_free", _no_operation
    ),
    "an old name has no end": lambda: with_lua(
        "redis.call('PEXPIRE', old, ", "redis.call('PTTL', old, ", "session_rotate"
    ),
    "a mutation overwrites another": lambda: with_lua(
        "ARGV[2] ~= '' and ARGV[2] ~= held[1]", "false", "session_update"
    ),
    "a mutation whose result is not read is told as none": lambda: replaced(
        sessions_body, "partly_done", nullcontext
    ),
    "a name ends its session for ever": lambda: with_lua(
        "asked >= old.grace_until", "false", "session_destroy"
    ),
}

LIMITS: Mutants = {
    "a charge is added each time": lambda: with_lua(
        "math.min(tonumber(ARGV[1]), total - told)", "tonumber(ARGV[1])"
    ),
    "what was charged is forgotten here": lambda: replaced(LocalLimits, "settle", _forgets_after),
    "a check does not wait for what is owed": lambda: replaced(
        LocalLimits, "is_owing", lambda *_: False
    ),
    "a lost charge is taken for told": lambda: replaced(
        settling, "_is_unsettled", lambda *_: False
    ),
    "nothing is remembered of what Redis said": lambda: replaced(LocalLimits, "remember", _nothing),
    "a check is sent twice": lambda: replaced(limits_body, "Once", list),
    "a refund knows no reset": lambda: with_lua(
        "birth == redis.call('GET', log .. '!born')", "birth"
    ),
    "a refund of what was decided here stays here": lambda: replaced(
        Settling, "settle", _refunds_nothing
    ),
    "a refund takes from one entry only": lambda: with_lua(
        "for i = later - 2, 1, -2 do", "for i = 0, 1, -2 do"
    ),
    "what is given back of hits that count here is taken off twice": lambda: replaced(
        LocalLimits, "own", _no_logs
    ),
    "what waits to be given back is given up": lambda: replaced(Settling, "settle_later", _nothing),
}


def _no_logs(*_: Any) -> Any:
    return ()


def _refunds_nothing(*_: Any) -> Any:
    yield from ()
    return False


ABUSE: Mutants = {
    "an event is sent twice": lambda: replaced(abuse_body, "Once", list),
    "a refusal is all that is known": lambda: replaced(abuse_body.AbuseBody, "_write", _says_false),
    "a count is kept for its window only": lambda: replaced(scan, "LATE_MS", 0),
    "a pattern is said each time": lambda: with_lua(
        "if seen and at < seen.at + window then", "if false then", "abuse_judge"
    ),
    "what a dead worker left is acknowledged": lambda: replaced(
        scan.Scan, "_take_over", _no_operation
    ),
}


LOCKS: Mutants = {
    "a lock has one more slot": lambda: with_lua(
        "+ ahead >= slots", "+ ahead > slots", "slot_take"
    ),
    "a fence is the time": lambda: with_lua(
        "math.max(now, (last", "math.min(now, (last", "slot_take"
    ),
    "a lease is shorter than its holder believes": lambda: replaced(
        LocksBody, "_try", _asks_for_less
    ),
}


FLIGHTS: Mutants = {
    "a place is not given back": lambda: replaced(limits_body.LimitsBody, "let_go", _no_operation),
    "a place that waits to be given back is given up": lambda: replaced(
        Settling, "settle_later", _nothing
    ),
    "a place is asked for twice": lambda: replaced(limits_asking, "Once", list),
}


def _asks_for_less(
    self: LocksBody, name: str, token: bytes, slots: int, lease: float, **how: Any
) -> Any:
    return (yield from _real_try(self, name, token, slots, lease * 0.9, **how))


_real_try = LocksBody._try


def _says_false(self: Any, events: Any) -> Any:
    written = yield from _real_write(self, events)
    return bool(written)


_real_write = abuse_body.AbuseBody._write
