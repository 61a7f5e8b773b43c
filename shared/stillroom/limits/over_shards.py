"""Decide about a request whose limits are in several shards of a cluster: all of them are consumed, or none.

Each shard decides for its own logs, in one script (lua/limit_check.lua). The shards are asked one after the other:
first the one of the address, which knows the bans, then the others in the order of their names. What one consumes
it consumes under a reservation; where a later one denies, that is given back at once. So never more than a quota is
admitted. While a later shard is asked, a request that it denies is counted by the earlier ones, for as long as a
round trip takes, and may have another request denied there. Asked at the same time, two shards of the same quota
would each admit other requests of a crowd, and fewer than the quota would get through.

Where a shard does not answer, this process decides for it (without_redis.py), as it does where there is one server.
Nothing here compares the times of two shards, which are the clocks of two nodes.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from stillroom.errors import RedisUnavailable, is_misconfigured
from stillroom.limits.asking import BANNED, OTHER_WIDTHS
from stillroom.limits.decision import OK, PARTS, TOO_MANY, UNAVAILABLE, UNTOLD, Decision
from stillroom.limits.limit import Limit
from stillroom.limits.request import WINDOWS, Request
from stillroom.limits.reservation import Reservation
from stillroom.limits.without_redis import TRY_AGAIN_US, WithoutRedis
from stillroom.operation import Operation
from stillroom.scripts import limit_check
from stillroom.wire import Command

LOOK = b"look"
HELD_MS = 2_000  # a check that is denied elsewhere is given back within this time


class Verdict(NamedTuple):
    """Hold what was decided about the part of one shard."""

    part: Request
    status: int
    said: Sequence[int]
    now_us: int = 0  # by the clock of the shard's node; 0 where it did not answer
    ban: int = 0  # the number of the ban that denies it, from 1
    banned_ms: int = 0
    error: RedisUnavailable | None = None  # why this process decided
    took: bool = False  # it has consumed its part, or may have


class Outcome(NamedTuple):
    """Hold what was decided about a request."""

    request: Request  # as it was asked in the end
    decision: Decision
    verdicts: Sequence[Verdict]
    errors: Sequence[RedisUnavailable]


class OverShards(WithoutRedis):
    """Decide over several shards. LimitsBody has the rest."""

    def _over(
        self,
        request: Request,
        mode: bytes,
        id: str = "",
        *,
        is_held: bool = False,
        kept_as: str = "",
    ) -> Operation[Outcome]:
        """Decide about a request with parts. `is_held`: it may be given back later under its id, as a reservation.

        Does not raise for what Redis does.
        """
        if WINDOWS in self._settling.waits and mode != LOOK:
            request = yield from self._settling.with_windows(request)
        if mode == LOOK:
            verdicts = yield from self._looked(request)
        else:
            request, verdicts = yield from self._taken(request, mode, id, is_held, kept_as)
        errors = [one.error for one in verdicts if one.error is not None]
        for one in verdicts:
            if one.error is not None:
                self._settling.was_away(one.part.home, one.error.reason)
        return Outcome(request, self._decision_of(request, verdicts), verdicts, errors)

    def _looked(self, request: Request) -> Operation[list[Verdict]]:
        """Ask all shards at the same time, without taking anything."""
        commands = [limit_check.run(part.words(LOOK)) for part in request.parts]
        replies = yield from self._ask_all(commands)
        while others := _other_widths(request, replies):
            for home, widths in others:
                self._requests.learn_widths(widths, home)
            request = self._requests.again(request)
            commands = [limit_check.run(part.words(LOOK)) for part in request.parts]
            replies = yield from self._ask_all(commands)
        found = [_verdict_of(*pair) for pair in zip(request.parts, replies, strict=True)]
        return [self._own_verdict(one, "", take=False) if one.error else one for one in found]

    def _taken(
        self, request: Request, mode: bytes, id: str, is_held: bool, kept_as: str
    ) -> Operation[tuple[Request, list[Verdict]]]:
        """Take from one shard after the other, until one denies; then give back what the others gave."""
        verdicts: list[Verdict] = []
        count = len(request.parts)
        for number in range(count):
            is_last = number == count - 1
            held_ms = request.plan.longest_ms if is_held else 0 if is_last else HELD_MS
            request, reply = yield from self._asked(request, number, mode, id, held_ms, kept_as)
            verdict = _verdict_of(request.parts[number], reply)
            if verdict.error is not None:
                verdict = self._own_verdict(verdict, id, take=True)
            verdicts.append(verdict)
            if verdict.status != OK:
                yield from self._give_back(request, verdicts, id)
                return request, [_without(one, request.cost) for one in verdicts]
        return request, verdicts

    def _asked(
        self, request: Request, number: int, mode: bytes, id: str, held_ms: int, kept_as: str
    ) -> Operation[tuple[Request, Any]]:
        """Return the request as it was asked in the end, and the reply of the shard of this part, or its error."""
        part = request.parts[number]
        try:
            yield from self._settling.know_shard(part.home)
            yield from self._settling.charge_first(part)
        except RedisUnavailable as error:
            return request, error
        unseen = self._denials.take_unseen(part.keys) if self._denials.found else b""
        while True:
            command = self._taking_part(request.parts[number], mode, unseen, id, held_ms)
            (reply,) = yield from self._ask_all([command], kept_as)
            if not _says(reply, OTHER_WIDTHS):
                return request, reply
            self._requests.learn_widths(reply[2], part.home)
            request = self._requests.again(request)

    def _taking_part(
        self, part: Request, mode: bytes, unseen: bytes, id: str, held_ms: int
    ) -> Command:
        if not held_ms:
            return limit_check.run(part.words(mode, unseen))
        part = part._replace(plan=part.plan._replace(longest_ms=held_ms))
        return limit_check.run(part.words(mode, unseen, self._keys.reservation(id, part.home)))

    # Where a shard does not answer

    def _own_verdict(self, one: Verdict, id: str, *, take: bool) -> Verdict:
        """Return this process's own verdict on a part that no shard has decided about."""
        part, error = one.part, one.error
        assert error is not None
        if left_ms := self._banned_ms(part, self._server.now_ms()):
            return one._replace(status=TOO_MANY, banned_ms=left_ms)
        mistaken = is_misconfigured(error)
        status, said = self._decide_here(part, take=take, id=id, mistaken=mistaken)
        return one._replace(status=status, said=said, took=one.took or (take and status == OK))

    # Giving back

    def _give_back(self, request: Request, verdicts: Sequence[Verdict], id: str) -> Operation[None]:
        """Give back what was consumed for a request that is denied. What can't be is given back later.

        A part that may be on its way is told that it is over, so that it takes nothing when it comes.
        """
        took = [one for one in verdicts if one.took]
        pairs = [pair for one in took for pair in zip(one.part.keys, one.part.limits, strict=True)]
        if not pairs:
            return
        keys, counted = tuple([key for key, _ in pairs]), tuple([limit for _, limit in pairs])
        about = Decision(request.limits, OK, request.cost, 0)
        is_unsure = any(one.error is not None for one in took)
        held = Reservation(about, keys, id, local=is_unsure, counted=counted)
        if is_unsure:
            self._local.refund(id, 0, keys)
        yield from self._settling.settle(held, 0)

    # The whole

    def _decision_of(self, request: Request, verdicts: Sequence[Verdict]) -> Decision:
        now_us = next((one.now_us for one in verdicts if one.now_us), 0) or self._server.now_us()
        degraded = next((one.error.reason for one in verdicts if one.error is not None), "")
        limits, cost = request.limits, request.cost
        if banned_ms := max(one.banned_ms for one in verdicts):
            wait_us = banned_ms * 1_000
            return Decision(limits, TOO_MANY, cost, now_us, wait_us=wait_us, degraded=degraded)
        statuses = {one.status for one in verdicts}
        if UNAVAILABLE in statuses and TOO_MANY not in statuses:
            return Decision(
                limits, UNAVAILABLE, cost, now_us, wait_us=TRY_AGAIN_US, degraded=degraded
            )
        said = request.folded(_in_order(request, verdicts))
        status = TOO_MANY if TOO_MANY in statuses else OK
        return Decision(limits, status, cost, now_us, said, degraded=degraded)


def new_id() -> str:
    """Make the name of a reservation."""
    return secrets.token_urlsafe(12)


def limits_without_redis(verdicts: Sequence[Verdict]) -> Sequence[Limit]:
    """Return the limits that this process decided about by itself."""
    return [limit for one in verdicts if one.error is not None for limit in one.part.limits]


def _verdict_of(part: Request, reply: Any) -> Verdict:
    """Return what a shard's reply says of its part."""
    if isinstance(reply, RedisUnavailable):
        return Verdict(part, UNAVAILABLE, (), error=reply, took=reply.may_be_done)
    if reply[0] == BANNED:
        return Verdict(part, TOO_MANY, (), reply[1], reply[3], max(0, reply[2]))
    is_admitted = bool(reply[0])
    return Verdict(part, OK if is_admitted else TOO_MANY, reply[2:], reply[1], took=is_admitted)


def _other_widths(request: Request, replies: Sequence[Any]) -> list[tuple[bytes, bytes]]:
    """Return the shards that know of other widths of bans than this process, and which."""
    pairs = zip(request.parts, replies, strict=True)
    return [(part.home, reply[2]) for part, reply in pairs if _says(reply, OTHER_WIDTHS)]


def _says(reply: Any, what: int) -> bool:
    return isinstance(reply, list) and reply[0] == what


def _in_order(request: Request, verdicts: Sequence[Verdict]) -> list[int]:
    """Return what is said of each log of the request, in its order."""
    rows: Mapping[int, Sequence[int]] = {
        place: one.said[PARTS * n : PARTS * (n + 1)]
        for one in verdicts
        for n, place in enumerate(one.part.places)
    }
    return [number for place in range(len(request.logs)) for number in rows.get(place) or UNTOLD]


def _without(one: Verdict, cost: int) -> Verdict:
    """Return what is said of a part that has been given back: the hits of this request are no longer in it."""
    if not (one.took and one.now_us):
        return one
    said = list(one.said)
    for n in range(0, len(said), PARTS):
        if said[n + 2] == 0:  # else it is a limit in shadow, which did not count it
            said[n] = max(0, said[n] - cost)
    return one._replace(said=said)
