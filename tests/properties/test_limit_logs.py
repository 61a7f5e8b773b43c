"""The scripts of limits do to the logs what a model in plain Python says."""

from __future__ import annotations

import math
import random
from typing import Any, NamedTuple

import pytest

from stillroom.scripts import Script, limit_charge, limit_check, limit_settle
from tests.support.limits import packed, read_log

Log = list[tuple[int, int]]  # (last µs, hits), oldest first

STREAM, RESERVATION = b"stillroom:abuse", b"stillroom:{rl:!held}:it"
KINDS = ["ip", "user", "ip&user"]
SLICES = 24
LEASE_MS = 90_000
BORN_FOR_MS = (LEASE_MS // 2, LEASE_MS + 10_000)  # the logs of the first two limits


class Counted(NamedTuple):
    """One limit of a check, and its log before."""

    number: int
    key: bytes
    kind: str
    quota: int
    window: int  # µs
    keep: int  # µs: the longest window of its name
    letter: str  # s: in shadow
    before: Log

    @property
    def life_ms(self) -> int:
        return self.keep // 1_000 + 1_000

    def standing(self, log: Log, now: int, cost: int) -> list[int]:
        """Return what the script says of this limit: used, µs until some come back, to wait, until all have."""
        log = [(at, hits) for at, hits in log if at > now - self.window]
        used = sum(hits for _, hits in log)
        left, wait = used + cost - self.quota, 0
        if left > 0:
            wait = -1
            for at, hits in log:
                left -= hits
                if left <= 0:
                    wait = at + self.window - now
                    break
        some, all_of_them = (
            (at + self.window - now for at, _ in (log[0], log[-1])) if log else (0, 0)
        )
        return [used, some, wait, all_of_them]

    def taken(self, log: Log, now: int, cost: int) -> Log:
        """Return the log after a hit, as lua/lib/hits.lua documents it."""
        old = [one for one in log if now - self.keep < one[0] <= now - self.window]
        log = [one for one in log if one[0] > now - self.window]
        slice_us = self.window / SLICES
        if self.quota > SLICES and log and is_same_slice(log[-1][0], now, slice_us):
            cost += log.pop()[1]
        return [*self.shared(old), *log, (now, cost)]

    def shared(self, old: Log) -> Log:
        """Return the hits that only a longer window counts: many of them share its slices."""
        if len(old) <= SLICES:
            return old
        entries: Log = []
        for at, hits in old:
            is_shared = entries and is_same_slice(entries[-1][0], at, self.keep / SLICES)
            entries.append((at, hits + (entries.pop()[1] if is_shared else 0)))
        return entries


def is_same_slice(one: int, other: int, slice_us: float) -> bool:
    return math.floor(one / slice_us) == math.floor(other / slice_us)


class Outcome(NamedTuple):
    """What a check answers and leaves behind."""

    allowed: bool
    said: list[int]
    logs: list[Log]
    events: list[tuple[str, int, int]]  # kind, which limit, n
    held: list[Counted]  # what the reservation took


class Check(NamedTuple):
    """One run of the script."""

    limits: list[Counted]
    mode: str
    cost: int
    bans: int
    unseen: dict[int, int]  # denials that the process answered from memory, of each limit
    telling: int
    is_held: bool  # it is a reservation
    has_come: bool  # which came before

    def run(self, client: Any) -> list[int]:
        bans = [f"ban-{n}" for n in range(self.bans)]
        keys = (STREAM, "widths", *bans, *[one.key for one in self.limits])
        keys = (*keys, RESERVATION) if self.is_held else keys
        unseen = " ".join(f"{n + 1}:{count}" for n, count in self.unseen.items())
        life, letters = LEASE_MS if self.is_held else "", "".join(one.letter for one in self.limits)
        numbers = [n for one in self.limits for n in (one.quota, one.window, one.life_ms)]
        about = (self.mode, self.cost, self.bans, len(self.limits), unseen, life, self.telling)
        words = (*about, "", letters, *numbers, 1_000, "ip", "203.0.113.7", "user", "ann")
        reply: list[int] = client.eval(limit_check.plain.source, len(keys), *keys, *words)
        return reply

    def outcome(self, now: int) -> Outcome:
        """Return the outcome at this time of the server, as the script documents it."""
        logs = [[(min(at, now), hits) for at, hits in one.before] for one in self.limits]
        stands = [
            one.standing(log, now, self.cost) for one, log in zip(self.limits, logs, strict=True)
        ]
        fitting = [one for one in self.limits if stands[one.number][2] == 0]
        denying = [one for one in self.limits if one not in fitting and one.letter != "s"]
        is_done = self.mode == "look" or self.has_come
        near = []
        for one in fitting if self.cost and not denying and not is_done else ():
            logs[one.number] = one.taken(logs[one.number], now, self.cost)
            stands[one.number] = one.standing(logs[one.number], now, 0)
            used = stands[one.number][0]
            if one.quota >= 10 and used >= 0.8 * one.quota and one.number < self.telling:
                near.append(("near", one.number, used))
        denials = dict(self.unseen)
        if denying and self.mode == "take":
            denials[denying[0].number] = denials.get(denying[0].number, 0) + 1
        events = [("denied", *one) for one in sorted(denials.items())]
        events += near if self.mode == "take" else []
        return Outcome(
            allowed=not denying,
            said=[part for stand in stands for part in stand],
            logs=logs,
            events=[] if is_done else events,
            held=fitting if self.is_held and not denying and not is_done else [],
        )


def some_limit(chance: random.Random, number: int, now: int) -> Counted:
    kind = chance.choice(KINDS)
    window = chance.choice([30, 60, 300, 3_600]) * 1_000_000
    youngest = chance.choice([1, 1, -window // 8])  # below 0: the clock stepped back
    count = chance.choice([0, 1, 2, 9, 23, 99])
    ages = sorted({chance.randrange(youngest, 12 * window) for _ in range(count)}, reverse=True)
    before = [(now - age, chance.randint(1, 3)) for age in ages]
    used = sum(hits for at, hits in before if at > now - window)
    return Counted(
        number=number,
        key=b"stillroom:{rl:%b:%d}:limit-%d" % (kind.encode(), number, number),
        kind=kind,
        quota=chance.choice([3, 10, 24, 25, 1_000, used, used + 2, used + 5]),
        window=window,
        keep=window * chance.choice([1, 1, 2, 10]),
        letter=chance.choice("--s"),
        before=before,
    )


def some_check(chance: random.Random, now: int) -> Check:
    numbers = range(chance.choice([0, 1, 2, 3, 3]))
    is_held = chance.random() < 0.5
    return Check(
        limits=[some_limit(chance, number, now) for number in numbers],
        mode=chance.choice(["take", "take", "quiet", "look"]),
        cost=chance.choice([0, 1, 1, 5]),
        bans=chance.randint(0, 2),
        unseen={number: chance.randint(1, 9) for number in numbers if chance.random() < 0.2},
        telling=chance.randint(0, 3),
        is_held=is_held,
        has_come=is_held and chance.random() < 0.2,
    )


@pytest.mark.parametrize("seed", range(60))
def test_a_check_of_several_limits_is_what_the_model_says(client: Any, seed: int) -> None:
    """The reply, logs, events and reservation of a check are the model's, with no limit to three in any order,
    expired hits, two windows, shared slices, limits in shadow and a clock that stepped back.
    """
    chance = random.Random(seed)
    for _ in range(15):
        client.flushall()
        check = some_check(chance, since := server_us(client))
        for one in check.limits:
            if one.before:
                client.set(one.key, packed(one.before), px=100_000_000)
        if check.has_come:
            client.hset(RESERVATION, "over", "1")
        for one, life in zip(check.limits, BORN_FOR_MS, strict=False):
            client.set(one.key + b"!born", "12345", px=life)  # with an earlier reservation
        allowed, now, *said = check.run(client)
        outcome = check.outcome(now)
        assert (allowed, said) == (outcome.allowed, outcome.said)
        assert [read_log(client, one.key) for one in check.limits] == outcome.logs
        assert told(client) == [
            (kind.encode(), b"limit-%d" % n, count, "ip" in check.limits[n].kind)
            for kind, n, count in outcome.events
        ]
        held = {b"over"} if check.has_come else {one.key for one in outcome.held}
        assert {*client.hkeys(RESERVATION)} == held
        assert_lives(client, since, lives_of(check, outcome))


def run_at(client: Any, us: int, script: Script, keys: tuple[Any, ...], *words: Any) -> Any:
    """Run a script as if it were this time of the server, for what depends on a microsecond."""
    source = script.plain.source
    assert source.count("redis.call('TIME')") == 1
    time = f"{{{us // 1_000_000}, {us % 1_000_000}}}"
    return client.eval(source.replace("redis.call('TIME')", time), len(keys), *keys, *words)


@pytest.mark.parametrize("cost", [0, 1])
def test_a_hit_counts_for_exactly_its_window(client: Any, cost: int) -> None:
    """A hit counts until the microsecond when its window ends, and its log keeps it until the longest one ends."""
    now, window, keep = server_us(client), 60_000_000, 600_000_000
    key = b"stillroom:{rl:ip:1}:x"
    before = [(now - age, 1) for age in (keep, keep - 1, window, window - 1)]
    client.set(key, packed(before), px=1_000_000)
    about = ("take", cost, 0, 1, "", "", 0, "", "", 10, window, keep // 1_000 + 1_000, 1_000)
    reply = run_at(client, now, limit_check, (STREAM, "widths", key), *about)
    every = window if cost else 1
    assert reply == [1, now, 1 + cost, 1, 0, every]
    kept = [*before[1:], (now, 1)] if cost else before
    assert read_log(client, key) == kept
    reply = run_at(client, now, limit_charge, (key, "process"), 0, 0, 10, window, 0, keep)
    assert reply == [1 + cost, 1, 0, every, now]
    client.set(key + b"!born", "12345", ex=60)
    client.hset(RESERVATION, key, f"{now - window} 12345")
    words = (0, 1, 0, 0, 10, window, keep)
    assert run_at(client, now, limit_settle, (RESERVATION, key), *words) == 1
    assert read_log(client, key) == [
        one for one in kept[-4:] if one[0] not in (now - window, now - keep)
    ]


def server_us(client: Any) -> int:
    seconds, micros = client.time()
    return int(seconds) * 1_000_000 + int(micros)


def told(client: Any) -> list[tuple[bytes, bytes, int, bool]]:
    """Return the events: kind, limit, n, and whether they name an address."""
    return [
        (fields[b"kind"], fields[b"limit"], int(fields[b"n"]), b"ip" in fields)
        for _, fields in client.xrange(STREAM)
    ]


def lives_of(check: Check, outcome: Outcome) -> dict[bytes, int]:
    """Return how long the keys live that were written, in ms."""
    logs = zip(check.limits, outcome.logs, strict=True)
    lives = {one.key: one.life_ms for one, log in logs if log != one.before}
    near = [check.limits[n] for kind, n, _ in outcome.events if kind == "near"]
    lives |= {one.key + b"!near": one.window // 1_000 for one in near}
    for one in outcome.held:
        lives[one.key + b"!born"] = max(LEASE_MS, (*BORN_FOR_MS, 0)[one.number])
    return lives | ({RESERVATION: LEASE_MS} if outcome.held else {})


def assert_lives(client: Any, since: int, lives: dict[bytes, int]) -> None:
    left = {key: client.pttl(key) for key in lives}
    passed_ms = (server_us(client) - since) // 1_000 + 2
    for key, life in lives.items():
        assert life - passed_ms <= left[key] <= life, key


# Charged


class Owed(NamedTuple):
    """Hits that a process admitted without Redis."""

    hits: int
    age: int  # µs
    known: str  # of a reservation: "yes", "no", or "settled" at another cost before it came

    @property
    def counted(self) -> int:
        return {"yes": 0, "no": self.hits, "settled": self.hits + 2}[self.known]


def put(log: Log, at: int, hits: int, limit: Counted) -> Log:
    """Return the log after hits that are told late."""
    before, after = [one for one in log if one[0] <= at], [one for one in log if one[0] > at]
    slice_us = limit.window / SLICES
    shares = limit.quota > SLICES or len(log) > 2 * SLICES
    if shares and before and is_same_slice(before[-1][0], at, slice_us):
        before[-1] = (at, before[-1][1] + hits)
    elif shares and after and is_same_slice(after[0][0], at, slice_us):
        after[0] = (after[0][0], after[0][1] + hits)
    else:
        before.append((at, hits))
    return before + after


def some_owed(chance: random.Random, limit: Counted) -> Owed:
    age = chance.choice([0, limit.window // 48, limit.window, chance.randrange(2 * limit.keep)])
    return Owed(chance.choice([0, 1, 5]), age, chance.choice(["yes", "no", "no", "settled"]))


@pytest.mark.parametrize("seed", range(30))
def test_a_charge_is_what_the_model_says(client: Any, seed: int) -> None:
    """A charge counts the hits that Redis has not heard of at the time they were admitted, and its reply is of the
    limit's own window.
    """
    chance = random.Random(seed)
    for _ in range(15):
        client.flushall()
        limit = some_limit(chance, 7, server_us(client))
        if limit.before:
            client.set(limit.key, packed(limit.before), px=100_000_000)
        hits, total, heard = chance.choice([0, 1, 5]), chance.randint(5, 9), chance.randint(0, 9)
        client.set("process", heard)
        plain, held = some_owed(chance, limit)._replace(hits=hits), [some_owed(chance, limit)]
        held += [some_owed(chance, limit)] * chance.randint(0, 1)
        names = [b"held-%d" % n for n in range(len(held))]
        for name, one in zip(names, held, strict=True):
            if one.known != "no":
                noted = limit.key if one.known == "yes" else b"!" + limit.key
                client.hset(name, noted, one.counted)
        ages = [part for one in held for part in (one.hits, one.age)]
        words = (plain.hits, plain.age, limit.quota, limit.window, total, limit.keep, *ages)
        keys = (limit.key, "process", *names)
        *said, now = client.eval(limit_charge.plain.source, len(keys), *keys, *words)

        clipped = [(min(at, now), count) for at, count in limit.before]
        log = [one for one in clipped if one[0] > now - limit.keep]
        new = min(hits, max(0, total - heard))
        charges = [(new, plain.age), *[(one.counted, one.age) for one in held]]
        charges = [(count, age) for count, age in charges if count and age < limit.keep]
        for count, age in charges:
            log = put(log, now - age, count, limit)
        used, some, _, every = limit.standing(log, now, 0)
        assert said == [used, some, 0, every]
        assert read_log(client, limit.key) == (log if charges else clipped)
        assert int(client.get("process")) == max(heard, total)
        noting = [(name, one) for name, one in zip(names, held, strict=True) if one.known != "yes"]
        for name, one in noting:
            assert client.hget(name, limit.key) == b"%d %d" % (now - one.age, now)
        lives = dict.fromkeys([b"process", *[name for name, _ in noting]], limit.keep // 1_000)
        assert_lives(client, now, lives | ({limit.key: limit.life_ms} if charges else {}))


# Settled


def without(log: Log, at: int, count: int) -> Log:
    """Return the log without so many of the hits of one time, or of what they are merged with."""
    log, every = list(log), range(len(log))
    later = next((n for n in every if log[n][0] > at), len(log) - 1)
    exact = [n for n in every if log[n][0] == at]
    for n in exact or [*every[later:], *reversed(every[:later])]:
        taken = min(count, log[n][1])
        log[n], count = (log[n][0], log[n][1] - taken), count - taken
    return [one for one in log if one[1]]


def settled(limit: Counted, log: Log, now: int, at: int, more: int) -> Log:
    """Return the log after a reservation of this time has cost so much more, or less than nothing more."""
    old = [one for one in log if now - limit.keep < one[0] <= now - limit.window]
    kept = [one for one in log if one[0] > now - limit.window]
    if more > 0:
        return limit.shared(old) + put(kept, now, more, limit)
    if at > now - limit.window and kept and more:
        return limit.shared(old) + without(kept, at, -more)
    if at <= now - limit.window and old and more:
        return limit.shared(without(old, at, -more)) + kept
    return log


class Settlement(NamedTuple):
    """One run of limit_settle, and what was noted of the reservation."""

    limits: list[Counted]
    noted: list[
        int
    ]  # when each limit counted it; 0: it did not; below 0: it did, and was reset since
    is_over: bool
    at: int  # as the process says, 0: it does not
    held: int
    cost: int
    may_come: int  # ms

    def arrange(self, client: Any) -> None:
        for one, at in zip(self.limits, self.noted, strict=True):
            if one.before:
                client.set(one.key, packed(one.before), px=100_000_000)
            if at:
                client.hset(RESERVATION, one.key, f"{abs(at)} 12345")
                client.set(one.key + b"!born", "12345" if at > 0 else "12346")
        if self.is_over:
            client.hset(RESERVATION, "over", "1")

    def run(self, client: Any, now: int) -> int:
        keys = (RESERVATION, *[one.key for one in self.limits])
        numbers = [n for one in self.limits for n in (one.quota, one.window, one.keep)]
        words = (self.at, self.held, self.cost, self.may_come, *numbers)
        return int(run_at(client, now, limit_settle, keys, *words))

    def logs(self, now: int) -> list[Log]:
        """Return the logs after it."""
        if self.is_over or not any(self.noted):
            return [one.before for one in self.limits]
        logs = [[(min(at, now), hits) for at, hits in one.before] for one in self.limits]
        return [
            settled(one, log, now, self.at or at, self.cost - self.held) if at > 0 else log
            for one, log, at in zip(self.limits, logs, self.noted, strict=True)
        ]

    def notes(self) -> dict[bytes, bytes]:
        """Return what is to be read of it by the reservation, if that is still on its way."""
        if self.is_over or not self.may_come:
            return {}
        limits = zip(self.limits, self.noted, strict=True)
        later = {b"!" + one.key: b"%d" % self.cost for one, at in limits if not at}
        return {b"over": b"1", **later}


def some_settlement(chance: random.Random, now: int) -> Settlement:
    limits = [some_limit(chance, number, now) for number in range(chance.randint(1, 3))]
    times = [
        chance.choice([now - 1, *[at - chance.choice([0, 0, 1]) for at, _ in one.before]])
        for one in limits
    ]
    return Settlement(
        limits=limits,
        noted=[at * chance.choice([1, 1, 1, 0, -1]) for at in times],
        is_over=chance.random() < 0.2,
        at=chance.choice([0, times[0]]),
        held=chance.randint(0, 6),
        cost=chance.randint(0, 6),
        may_come=chance.choice([0, LEASE_MS]),
    )


@pytest.mark.parametrize("seed", range(30))
def test_a_settlement_is_what_the_model_says(client: Any, seed: int) -> None:
    """A settlement takes hits out of the entries that hold them, or counts more from now on. It does so once,
    in each limit that counted the reservation.
    """
    chance = random.Random(seed)
    for _ in range(20):
        client.flushall()
        now = server_us(client)
        settlement = some_settlement(chance, now)
        settlement.arrange(client)
        is_known = any(settlement.noted) or settlement.may_come > 0
        assert settlement.run(client, now) == int(is_known and not settlement.is_over)
        logs = [read_log(client, one.key) for one in settlement.limits]
        assert logs == settlement.logs(now)
        pairs = zip(settlement.limits, logs, strict=True)
        lives = {one.key: one.life_ms for one, log in pairs if log not in ([], one.before)}
        lives |= {RESERVATION: LEASE_MS} if settlement.notes() else {}
        assert_lives(client, now, lives)
        left = client.hgetall(RESERVATION)
        assert {key: left.get(key) for key in settlement.notes()} == settlement.notes()
        assert bool(left) == (settlement.is_over or settlement.may_come > 0)
