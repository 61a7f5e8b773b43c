"""Answers from the denials that this process remembers, and tells Redis of those it answered."""

from __future__ import annotations

import time

from stillroom.counted import LIMIT
from stillroom.keys import Keys, home_of
from stillroom.limits.asking import Asking
from stillroom.limits.decision import NEVER, PARTS, TOO_MANY, UNTOLD, Decision
from stillroom.limits.denials import Denial
from stillroom.limits.request import QUIET, Request
from stillroom.wire import Command

TOLD_AT_ONCE = 100  # denials from memory, with one flush of the counts
_US = 1_000_000
_decision = tuple.__new__


class Remembering(Asking):
    """Remember denials, and answer from them."""

    def _remembered(self, request: Request) -> Decision | None:
        """Return the denial of this check, if one that is remembered answers it. Then both are counted."""
        now = time.monotonic()
        limits, keys, cost = request.limits, request.keys, request.cost
        denial = self._denials.find(request.bans, keys, limits, cost, now)
        if denial is None:
            return None
        if request.mode != QUIET:
            denial.unseen += 1
        self._count((*request.plan.counted_as, *denial.counted_as))
        before, age_us = denial.decision, int((now - denial.at) * _US)
        said = before.said
        if said and (denial.keys != keys or before.limits != limits):
            said = _said_of(denial, request)
        about = (limits, TOO_MANY, cost, before.now_us, said, age_us, before.wait_us, "")
        return _decision(Decision, about)

    def _remember(self, request: Request, decision: Decision, longest: float, sent: float) -> None:
        """Remember a denial from when it was asked for: its reply may have been on its way for long."""
        if decision.banned:
            key, limit, wait_us = request.bans[0], None, float(decision.wait_us)
        else:
            # A request in flight may be over at any moment, and a limit in shadow denies nobody.
            waits = [
                0.0 if limit.in_flight or limit.shadow else _long(wait_us)
                for limit, wait_us in zip(decision.limits, decision.said[2::PARTS], strict=True)
            ]
            number = waits.index(max(waits))
            key, limit, wait_us = request.keys[number], decision.limits[number], waits[number]
        until = sent + min(wait_us / _US, longest)
        if until > time.monotonic():
            counted = ["limit_denials", "limit_cached"]
            if limit is not None:
                named = self.stats.counted_as
                counted += [named(LIMIT, what, limit.name) for what in ("denials", "cached")]
            self._denials.add(key, Denial(decision, request, limit, sent, until, counted))

    def _riding(self) -> list[Command]:
        """Return the events of denials from memory, of clients that did not come again. No script: see Repair."""
        if not self._denials.found:
            return []
        told = self._denials.take_over(time.monotonic(), TOLD_AT_ONCE)
        return [_telling(request, self._keys, key, count) for request, key, count in told]


def _telling(request: Request, keys: Keys, key: bytes, count: int) -> Command:
    """Return the event of that many denials by one limit, as lua/limit_check.lua writes it."""
    *_, name = key.split(b":")
    about = (b"kind", b"denied", b"n", b"%d" % count, b"limit", name)
    kinds = key.partition(b"{rl:")[2].partition(b":")[0].split(b"&")
    tells_too_much = request.fields[:1] == (b"ip",) and b"ip" not in kinds
    fields = request.fields[2:] if tells_too_much else request.fields
    kept = b"%d" % keys.events_kept
    return (b"XADD", keys.abuse_at(home_of(key)), b"MAXLEN", b"~", kept, b"*", *about, *fields)


def _said_of(denial: Denial, request: Request) -> tuple[int, ...]:
    """Return what is remembered of the limit that denied; the other limits may count another subject."""
    said: list[int] = []
    for key, limit in zip(request.keys, request.limits, strict=True):
        found = key in denial.keys and limit == denial.limit
        place = PARTS * denial.keys.index(key) if found else 0
        said += denial.decision.said[place : place + PARTS] if found else UNTOLD
    return tuple(said)


def _long(wait_us: int) -> float:
    return float("inf") if wait_us == NEVER else float(wait_us)
