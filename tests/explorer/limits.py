"""The limits against a model with two rules.

The first: no window has more hits than the quota, however often Redis goes away in it. Where two processes share a
limit each may add its share while it can't ask. The second: what Redis counts in the end are the hits that were
admitted, each once. It has those of which it was never known whether it had counted them, and it has none that was
given back. No check raises anything, and every key has an end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from stillroom import Limit, RedisUnavailable, Reservation, Settings
from tests.explorer.explorer import Broken, Model
from tests.explorer.watch import endless
from tests.explorer.world import Actor, World

IP = "203.0.113.7"
LONG, SHORT, MANY = Limit("long", 4, 60), Limit("short", 3, 20), Limit("many", 30, 60)
LIMITS = (LONG, SHORT, MANY)
ASKED_NOBODY = ("breaker", "charging", "settling")  # why Redis had no part in a decision
LATE_S = 400.0  # a command that is on its way for longer is not known any more


@dataclass
class Hits:
    """Holds what one call consumed, or may have consumed."""

    call: Actor
    limits: Sequence[Limit]
    cost: int
    began_s: float
    ended_s: float
    is_allowed: bool
    degraded: str
    reservation: Reservation | None
    refunds: int = 0  # how many were asked for
    is_back: bool = False  # they are given back
    may_be_back: bool = False  # or not known to be, and Redis will be asked again
    is_fixed: bool = False  # committed
    may_be_fixed: bool = False

    @property
    def most(self) -> int:
        """Return how many hits Redis may count for this call in the end."""
        was_asked = not self.degraded or self.degraded not in ASKED_NOBODY
        is_own = bool(self.degraded) and self.is_allowed
        may_have_been = was_asked and (bool(self.degraded) or self.is_allowed)
        is_back = self.is_back or (self.may_be_back and not self.may_be_fixed)
        return 0 if is_back else self.cost * (int(is_own) + int(may_have_been))


class LimitsModel(Model):
    """One process that has all of a quota, or two that share it."""

    SETTINGS: ClassVar[dict[str, Any]] = {
        "session_peppers": ["a-pepper-of-thirty-two-bytes-...."],
        "probe_limit": 2.0,
        "breaker_failures": 1_000_000,  # a model opens it by hand: a prober is a thread
        "breaker_calls": 1_000_000,
    }
    WEIGHTS: ClassVar[dict[str, float]] = {
        "check": 6,
        "reserve": 4,
        "refund": 3,
        "commit": 1,
        "peek": 1,
        "deliver": 1,
        "away": 1.5,
        "reset": 0.3,
        "lose": 0.5,
        "die": 0.3,
    }

    def __init__(self, world: World, settings: Settings, weights: Mapping[str, float]) -> None:
        self.processes = world.random.choice([1, 2])
        settings = settings.model_copy(update={"processes": self.processes})
        super().__init__(world, settings, weights)
        self.rooms = [self._room() for _ in range(self.processes)]
        self.hits: list[Hits] = []
        self.since = 0  # the tick of the last event that took hits away
        self._is_lost = False  # what is on its way may take away more

    # Events

    def act(self) -> None:
        self._look()
        acts: dict[str, Callable[[int], None]] = {
            "check": self._check,
            "reserve": self._reserve,
            "refund": self._refund,
            "commit": self._commit,
            "peek": self._peek,
            "deliver": self._deliver,
            "away": self._open_or_close,
            "reset": self._reset,
            "lose": self._lose_scripts,
            "die": self._begin_anew,
        }
        acts[self._next()](self.world.random.randrange(self.processes))

    def _look(self) -> None:
        super()._look()
        forward = [step.tick for step in self.watch.steps if step.seconds > 0]
        self.since = max([self.since, self.watch.lost, *forward])

    def _request(self) -> tuple[list[Limit], int]:
        chance = self.world.random
        return chance.choice([[LONG], [LONG, SHORT], [MANY, LONG], [MANY]]), chance.choice(
            [1, 1, 2]
        )

    def _check(self, process: int) -> None:
        limits, cost = self._request()
        check = partial(self.rooms[process].limits.check, IP, limits, cost)
        self._consume("check", process, check, limits, cost)

    def _reserve(self, process: int) -> None:
        limits, cost = self._request()
        reserve = partial(self.rooms[process].limits.reserve, IP, limits, cost)
        self._consume("reserve", process, reserve, limits, cost)

    def _consume(
        self, what: str, process: int, act: Callable[[], Any], limits: list[Limit], cost: int
    ) -> None:
        began_s = self.world.monotonic

        def check(call: Actor) -> None:
            self._expect(call)
            held = call.value if isinstance(call.value, Reservation) else None
            decision = call.value if held is None else held.decision
            times = began_s, self.world.monotonic
            told = decision.allowed, decision.degraded or "", held
            self.hits.append(Hits(call, limits, cost, *times, *told))
            self._check_windows(call.process)

        names = " ".join(limit.name for limit in limits)
        self.world.call(f"{what} {names} for {cost}", process, act, check)

    def _refund(self, process: int) -> None:
        hits = self._some_held(process)
        if hits is None or hits.reservation is None:
            return
        is_over = hits.is_fixed or hits.is_back
        hits.refunds += 1

        def check(call: Actor) -> None:
            self._expect(call)
            if call.value is True and is_over and hits.call.began > self.watch.lost:
                raise Broken(f"{call.name}: again, or in spite of a commit")
            hits.is_back |= call.value is True
            hits.may_be_back |= call.value is None

        refund = partial(self.rooms[process].limits.refund, hits.reservation)
        self.world.call(f"refund of {hits.reservation.id[:8]}", process, refund, check)

    def _commit(self, process: int) -> None:
        hits = self._some_held(process)
        if hits is None or hits.reservation is None:
            return

        def check(call: Actor) -> None:
            self._expect(call)
            hits.is_fixed |= call.value is True

        hits.may_be_fixed = True
        commit = partial(self.rooms[process].limits.commit, hits.reservation)
        self.world.call(f"commit of {hits.reservation.id[:8]}", process, commit, check)

    def _peek(self, process: int) -> None:
        limits, cost = self._request()
        peek = partial(self.rooms[process].limits.peek, IP, limits, cost)
        self.world.call("peek", process, peek, self._expect)

    def _deliver(self, process: int) -> None:
        self.world.call("deliver", process, self.rooms[process].limits.deliver, self._expect)

    def _open_or_close(self, process: int) -> None:
        """A process finds that Redis is away, or is back."""
        breaker = self.rooms[process].state_wire.breaker
        breaker.is_open = not breaker.is_open
        self.world.note(
            f"process {process} finds that Redis is {'away' if breaker.is_open else 'back'}"
        )
        if not breaker.is_open:
            self._deliver(process)

    def _reset(self, process: int) -> None:
        def check(call: Actor) -> None:
            self._is_lost |= call.error is not None
            self.since = self.world.tick()
            self._expect(call, (RedisUnavailable,))

        self.since = self.world.tick()
        reset = partial(self.rooms[process].limits.reset, IP, LIMITS)
        self.world.call("reset", process, reset, check)

    def _lose_scripts(self, _: int) -> None:
        self.world.lose_scripts()

    def _begin_anew(self, process: int) -> None:
        """A process ends without a word, and another one begins. What it owes is lost."""
        self.world.kill(process)
        self.rooms[process] = self._room()
        self.since = self.world.tick()
        self._is_lost = True

    # Invariants

    def end(self) -> None:
        world = self.world
        self._look()
        while world.copies:
            world.deliver_a_copy()
        for process in range(self.processes):
            self.rooms[process].state_wire.breaker.is_open = False
            left = world.run("deliver", process, self.rooms[process].limits.deliver).value
            if left:
                raise Broken(f"{left} logs were not told")
        newcomer = self._room()
        for limit in LIMITS:
            peek = partial(newcomer.limits.peek, IP, [limit])
            self._check_count(limit, world.run(f"last peek {limit.name}", 9, peek))
        if endings := endless(world, "*:{rl:*"):
            raise Broken(f"these have no end: {endings}")

    def _check_count(self, limit: Limit, call: Actor) -> None:
        """Check the count in Redis, as a new process sees it."""
        self._expect(call)
        if call.value.degraded:
            raise Broken(f"{call.name} was not told")
        used = limit.quota - call.value.remaining
        certain = [
            one.cost
            for one in self._certain(limit)
            if one.began_s > self.world.monotonic - limit.window and not self._is_lost
        ]
        if used < min(limit.quota, sum(certain)):
            raise Broken(
                f"{used} hits are counted of {limit.name}, and {sum(certain)} were admitted"
            )
        most = sum(one.most for one in self.hits if limit in one.limits)
        is_known = not (self._is_lost or self.watch.lost) and self.watch.passed < LATE_S
        if used > most and is_known:
            raise Broken(
                f"{used} hits are counted of {limit.name}, and at most {most} were asked for"
            )

    def _check_windows(self, process: int) -> None:
        for limit in LIMITS:
            hits = self._certain(limit)
            alone = [one for one in hits if one.degraded and one.call.process == process]
            share = max(1, limit.quota // self.processes)
            self._check_window(f"{limit.name} by process {process}", alone, limit.window, share)
            are_alone = any(one.degraded for one in hits)
            most = limit.quota * (2 if self.processes > 1 and are_alone else 1)
            self._check_window(limit.name, hits, limit.window, most)

    def _check_window(self, what: str, hits: Sequence[Hits], window: int, most: int) -> None:
        for first in hits:
            inside = _within(hits, first.began_s, first.began_s + window)
            if inside > most:
                raise Broken(f"{inside} hits of {what} in one window, where {most} are the most")

    def _certain(self, limit: Limit) -> list[Hits]:
        """Return the hits admitted since the last event that took hits away, without those that were refunded."""
        return [
            one
            for one in self.hits
            if one.is_allowed
            and limit in one.limits
            and one.call.began > self.since
            and not one.refunds
            and not self._is_lost
        ]

    # Helpers

    def _some_held(self, process: int) -> Hits | None:
        """Return hits with a reservation: its own process gives it back most of the time."""
        held = [one for one in self.hits if one.reservation is not None and one.reservation.id]
        own = [one for one in held if one.call.process == process or self.world.chance(0.2)]
        return self.world.random.choice(own) if own else None


def _within(hits: Iterable[Hits], begin: float, end: float) -> int:
    return sum(one.cost for one in hits if begin <= one.began_s and one.ended_s < end)
