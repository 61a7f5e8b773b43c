"""What a request's trace says of its reads is what they were."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from stillroom import Stillroom
from stillroom.cache.traced import Trace, traced, tracing

KEYS = [f"product:{n}" for n in range(4)]
TAGS = ["red", "blue"]


class Shop:
    """A room whose reads are noted, and random things that happen to it."""

    def __init__(self, room: Stillroom, seed: int) -> None:
        self.room, self.chance = room, random.Random(seed)
        cached = room.cache.cached

        def product(n: int) -> int:
            return n

        options: dict[str, Any] = {"ttl": 600, "swr": 600, "tags": [TAGS[0]]}
        self.loaders = [
            cached("product:{n}", **options)(product),
            cached("near:{n}", near=30, name="near", **options)(product),
            cached("memo:{n}", memo=True, name="memo", **options)(product),
        ]

    def read(self) -> None:
        cache, some = self.room.cache, self.chance.sample(KEYS, 2)
        number = self.chance.randrange(4)
        self.chance.choice(
            [
                *[lambda one=one: one(number) for one in self.loaders],
                *[lambda one=one: one.many([number, 1]) for one in self.loaders],
                lambda: cache.get(some[0]),
                lambda: cache.get(some[0], list),
                lambda: cache.get_or_set(some[0], lambda: 1, tags=[TAGS[1]]),
                lambda: cache.get_many(some),
                lambda: cache.get_or_set_many(some, lambda keys: dict.fromkeys(keys, 1), tags=TAGS),
            ]
        )()

    def change(self) -> None:
        cache, key = self.room.cache, self.chance.choice(KEYS)
        self.chance.choice(
            [
                lambda: cache.set(key, 5, tags=[self.chance.choice(TAGS)]),
                lambda: cache.set(key, "text"),
                lambda: cache.invalidate(key),
                lambda: cache.invalidate_by_tag(self.chance.choice(TAGS)),
                lambda: cache.invalidate_by_tag(self.chance.choice(TAGS), soft=True),
                lambda: cache.invalidate_by_pattern("product:[12]"),
                lambda: self.chance.random() < 0.2 and cache.clear(),
            ]
        )()


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("seed", range(6))
def test_the_trace_says_what_was_counted(
    make_room: Callable[..., Stillroom], seed: int, shards: int
) -> None:
    """Whatever happens to a cache, the trace of each read says hit, stale or miss as the counts do, and why."""
    room = make_room(explain_header=True, shards=shards, jitter=0)
    shop = Shop(room, seed)
    causes: Counter[str] = Counter()
    for _ in range(120):
        counts = room.stats.counts
        before = {name: counts[name] for name in ("hits", "stale", "misses")}
        room.stats.due = float("inf")  # the counts stay here
        with room.request(), traced() as trace:
            shop.read()
        counted = {name: counts[name] - before[name] for name in before}
        told = Counter(read.outcome for read in trace.reads)
        assert told["hit"] + told["near"] == counted["hits"], trace.reads
        assert told["stale"] == counted["stale"], trace.reads
        assert told["miss"] == counted["misses"], trace.reads
        for read in trace.reads:
            assert read.cause != "unknown"
            assert (read.by is not None) == (read.cause in ("tag", "soft", "pattern"))
        causes.update(read.cause for read in trace.reads)
        shop.change()
    assert {"fresh", "tag", "never"} <= set(causes), causes


def test_nothing_is_noted_outside(make_room: Callable[..., Stillroom]) -> None:
    """A read outside of a trace is noted nowhere, and a trace inside another one is its own."""
    room = make_room(explain_header=True)
    room.cache.get("a")
    assert tracing() is None
    with traced() as outer:
        with traced() as inner:
            room.cache.get("a")
        assert isinstance(tracing(), Trace)
    assert ([read.key for read in inner.reads], outer.reads) == (["a"], [])


def test_asking_counts_nothing(make_room: Callable[..., Stillroom]) -> None:
    """The questions that a trace asks Redis are not counted as reads."""
    room = make_room(explain_header=True)
    with traced():
        room.cache.get("a")
    assert room.stats.counts["misses"] == 1
