"""The events of abuse against a model with three rules.

The first: what `report` says is so. An event that was written is there once; one that was not is not there. The
second: a ban has enough events in one window, and enough events make a pattern, which is said once in a window,
whoever dies. The third: who was lifted is left in peace. No call raises what it does not promise, and every key has
an end.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from stillroom import Limit, RedisUnavailable, Settings
from tests.explorer.explorer import Broken, Model
from tests.explorer.watch import endless
from tests.explorer.world import Actor, World

SUBJECTS = ("203.0.113.7", "203.0.113.7", "198.51.100.9")
WORKERS = (2, 3)  # the processes that work in the background
FREE = Limit("free", 1_000_000, 60)
PEACE_S, REMEMBERED_S = 600.0, 5.0
KEPT_S = 58.0  # what has to be read by another worker, a minute later, still counts then
STREAMS = (b":abuse", b":abuse:log", b":abuse:aside")  # these have a length


@dataclass(frozen=True)
class Rule:
    """Holds a rule of the file, as far as the model knows it."""

    name: str
    kind: str
    threshold: int
    window: float


RULES = (Rule("guess", "auth_fail", 3, 60.0), Rule("pages", "not_found", 3, 20.0))


@dataclass
class Event:
    """Holds an event that was reported of a subject, or may have been."""

    kind: str
    ip: str
    route: str
    call: Actor
    began_s: float
    ended_s: float
    is_written: bool | None


@dataclass
class Lift:
    """Holds an operator's lift of a ban, and when the call had returned."""

    ip: str
    call: Actor
    ended_s: float


class AbuseModel(Model):
    """Models two processes that report events, and two workers that judge them."""

    SETTINGS: ClassVar[dict[str, Any]] = {
        "session_peppers": ["a-pepper-of-thirty-two-bytes-...."],
        "abuse_rules": Path(__file__).with_name("rules.toml"),
        "breaker_failures": 1_000_000,
        "breaker_calls": 1_000_000,
    }
    WEIGHTS: ClassVar[dict[str, float]] = {
        "report": 8,
        "scan": 3,
        "check": 2,
        "lift": 0.7,
        "time": 0.7,
        "die": 0.7,
        "lose": 0.3,
    }

    def __init__(self, world: World, settings: Settings, weights: Mapping[str, float]) -> None:
        super().__init__(world, settings, weights)
        self.rooms = [self._room() for _ in range(4)]
        self.events: list[Event] = []
        self.lifts: list[Lift] = []
        self._has_lifted = False
        self._numbers = iter(range(1_000_000))
        self._ended_s = 0.0

    # Events

    def act(self) -> None:
        self._look()
        acts: dict[str, Callable[[], None]] = {
            "report": self._report,
            "scan": self._scan,
            "check": self._check,
            "lift": self._lift,
            "time": self._pass_time,
            "die": self._let_a_worker_die,
            "lose": self.world.lose_scripts,
        }
        acts[self._next()]()

    def _report(self) -> None:
        chance = self.world.random
        for _ in range(chance.choice([1, 1, 2, 4])):
            kind, ip = chance.choice(["auth_fail", "not_found"]), chance.choice(SUBJECTS)
            self._report_one(chance.randint(0, 1), kind, ip, f"/page-{next(self._numbers)}")

    def _report_one(self, process: int, kind: str, ip: str, route: str) -> None:
        began_s = self.world.monotonic

        def check(call: Actor) -> None:
            self._expect(call)
            times = began_s, self.world.monotonic
            self.events.append(Event(kind, ip, route, call, *times, call.value))

        report = partial(self.rooms[process].abuse.report, kind, ip=ip, route=route)
        self.world.call(f"report {kind} of {ip} at {route}", process, report, check)

    def _scan(self) -> None:
        worker = self.world.random.choice(WORKERS)
        expect = partial(self._expect, errors=(RedisUnavailable,))
        self.world.call("scan", worker, partial(self.rooms[worker].abuse.scan, 3, 1.0), expect)

    def _check(self) -> None:
        chance = self.world.random
        process, ip = chance.randint(0, 1), chance.choice(SUBJECTS)
        began_s = self.world.monotonic

        def check(call: Actor) -> None:
            self._expect(call)
            if call.value.banned:
                self._check_peace(ip, call, began_s)
                self._check_reason(ip, call)

        asks = partial(self.rooms[process].limits.check, ip, [FREE])
        self.world.call(f"check {ip}", process, asks, check)

    def _lift(self) -> None:
        chance = self.world.random
        process, ip = chance.randint(0, 1), chance.choice(SUBJECTS)

        def check(call: Actor) -> None:
            self._expect(call, (RedisUnavailable,))
            if call.error is None:
                self.lifts.append(Lift(ip, call, self.world.monotonic))

        self._has_lifted = True
        lift = partial(self.rooms[process].abuse.lift, ip)
        self.world.call(f"lift {ip}", process, lift, check)

    def _pass_time(self) -> None:
        self.world.pass_time(self.world.random.choice([5.0, 30.0, 61.0]))

    def _let_a_worker_die(self) -> None:
        """Without a word; another one begins."""
        worker = self.world.random.choice(WORKERS)
        self.world.kill(worker)
        self.rooms[worker] = self._room()

    # Invariants

    def end(self) -> None:
        self._look()
        self._ended_s = self.world.monotonic
        while self.world.copies:
            self.world.deliver_a_copy()
        for _ in range(3):  # what a dead worker left is read again when it is a minute old
            scan = partial(self.rooms[WORKERS[0]].abuse.scan, 100, 10.0)
            self._expect(self.world.run("last scan", WORKERS[0], scan))
            self.world.pass_time(61.0)
        self._check_events()
        self._check_patterns()
        if endings := [key for key in endless(self.world, "*:abuse*") if not key.endswith(STREAMS)]:
            raise Broken(f"these have no end: {endings}")

    def _check_events(self) -> None:
        """Check that each event is written as often as its call said."""
        if self.watch.lost:
            return
        written = Counter(fields[b"route"] for _, fields in self._stream(self.rooms[0].keys.abuse))
        for event in self.events:
            found = written[event.route.encode()]
            if found > 1 or event.is_written not in (None, bool(found)):
                raise Broken(
                    f"{event.route} is there {found} times, and was told {event.is_written}"
                )

    def _check_patterns(self) -> None:
        """Check that each pattern is logged once in its window, and only if there were enough events."""
        said = [fields for _, fields in self._stream(self.rooms[0].keys.abuse_log)]
        for rule in RULES:
            for ip in set(SUBJECTS):
                count = sum(
                    (one[b"rule"], one[b"subject"]) == (rule.name.encode(), ip.encode())
                    for one in said
                )
                self._check_pattern(rule, ip, count)

    def _check_pattern(self, rule: Rule, ip: str, said: int) -> None:
        of = f"{rule.name} of {ip}"
        if said and not self._may_be_complete(rule, ip):
            raise Broken(f"{of} is said, and there were too few events for it")
        is_certain = self._is_complete(rule, ip) and not self._may_be_excused()
        if is_certain and not said:
            raise Broken(f"{of} is complete, and nobody said so")
        if not self._may_be_excused() and said > 1 + self.watch.passed / rule.window:
            raise Broken(f"{of} is said {said} times in {self.watch.passed} s")

    def _check_peace(self, ip: str, call: Actor, began_s: float) -> None:
        for lift in self.lifts:
            is_after = lift.ip == ip and (lift.call.returned or 0) < call.began
            since = began_s - lift.ended_s
            is_sure = (
                not any(self.watch.stepped(lift.call.began)) and self.watch.lost < lift.call.began
            )
            if is_after and is_sure and REMEMBERED_S < since < PEACE_S:
                raise Broken(f"{call.name}: banned, {since} s after it was lifted")

    def _check_reason(self, ip: str, call: Actor) -> None:
        if not any(self._may_be_complete(rule, ip) for rule in RULES):
            raise Broken(f"{call.name}: banned for nothing")

    def _may_be_complete(self, rule: Rule, ip: str) -> bool:
        """Return whether one window may have had enough events, as far as the server's clock can tell."""
        back = -sum(step.seconds for step in self.watch.steps if step.seconds < 0)
        window = rule.window + 2 * back
        if any(one.name.startswith("report") and not one.is_done for one in self.world.actors):
            return True
        times = [
            (one.began_s, math.inf if one.is_written is None else one.ended_s)
            for one in self._of(rule, ip)
            if one.is_written is not False
        ]
        return any(
            sum(began < end + window and end <= ended for began, ended in times) >= rule.threshold
            for end in {moment for pair in times for moment in pair}
        )

    def _is_complete(self, rule: Rule, ip: str) -> bool:
        """Return whether one window surely had enough events."""
        times = [
            (one.began_s, one.ended_s)
            for one in self._of(rule, ip)
            if one.is_written and self._ended_s - one.began_s < KEPT_S
        ]
        return any(
            sum(first[0] <= began and ended < first[0] + rule.window for began, ended in times)
            >= rule.threshold
            for first in times
        )

    def _may_be_excused(self) -> bool:
        """Return whether a pattern may be missing: events were lost, a ban was lifted, or a clock stepped."""
        return bool(self.watch.lost or self.watch.steps or self._has_lifted)

    def _of(self, rule: Rule, ip: str) -> Iterable[Event]:
        return [one for one in self.events if (one.kind, one.ip) == (rule.kind, ip)]

    # Helpers

    def _stream(self, key: bytes) -> list[tuple[bytes, dict[bytes, bytes]]]:
        entries = self.world.ask("XRANGE", key, "-", "+")
        return [(name, dict(zip(f[::2], f[1::2], strict=True))) for name, f in entries]
