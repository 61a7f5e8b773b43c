"""The cache by number of keys, tags of an entry, and bytes of a value."""

from __future__ import annotations

import json
import random
from typing import Any

from bench.growth.curve import Curve, ratio, server_us, used_memory
from bench.report import Promise, Section
from bench.stage import Effort, stage

VALUE = {"id": 7, "name": "Copper preserving pan", "price_cents": 12_950, "text": "x" * 150}
TAGS = ["products", "brand:acme"]
LARGE, LARGE_TIMES = 100_000, 1.5  # bytes; of GET and json.loads, at most


def keys(effort: Effort, section: Section) -> None:
    """Measure a hit by the number of keys: entries of 250 bytes with two tags, read at random."""
    sizes = effort.pick(
        smoke=[10, 50],
        quick=[1_000, 10_000, 50_000],
        usual=[1_000, 10_000, 100_000],
        full=[1_000, 10_000, 100_000, 1_000_000],
    )
    curve = Curve(
        "keys", "A hit by number of keys", "keys", {"hit × GET": "{:.2f}", "bytes each": "{:,.0f}"}
    )
    with stage() as here:
        room, client, made = here.room, here.client, 0
        body = json.dumps(VALUE)
        client.mset({f"plain:{n}": body for n in range(100)})
        room.cache.set("first", VALUE, tags=TAGS)  # the scripts are loaded
        for size in sizes:
            before, fewer = used_memory(client), made
            for start in range(made, size, 500):
                some = range(start, min(start + 500, size))
                room.cache.set_many({f"k:{n}": VALUE for n in some}, tags=TAGS, ttl=3_600)
            made = size
            each = (used_memory(client) - before) / (size - fewer)

            def hit(size: int = size) -> object:
                return room.cache.get(f"k:{random.randrange(size)}")

            def plain() -> object:
                return json.loads(client.get(f"plain:{random.randrange(100)}"))

            times = ratio(hit, plain, effort.rounds, effort.hits)
            curve.add(size, times=times, bytes_each=each)
    curve.give(section, ["hit × GET"])


def tags(effort: Effort, section: Section) -> None:
    """Measure what each tag costs a write, a read and the memory."""
    curve = Curve(
        "tags",
        "An entry by its tags: µs of the server to write it",
        "tags of an entry",
        {"write, server µs": "{:.0f}", "hit × GET": "{:.2f}", "bytes each": "{:,.0f}"},
    )
    count = effort.pick(smoke=5, quick=300, usual=1_000, full=3_000)
    with stage() as here:
        room, client = here.room, here.client
        for size in (0, 1, 5, 10, 50):
            names = [f"t:{n}" for n in range(size)]
            client.flushall()
            client.set("plain", json.dumps(VALUE))
            room.cache.set("first", VALUE, tags=names)
            written = iter(range(1 << 30))

            def write(names: list[str] = names, written: Any = written) -> object:
                return room.cache.set(f"k:{next(written)}", VALUE, tags=names, ttl=3_600)

            us = server_us(client, write, ["evalsha"], count)
            indexes = sum(client.memory_usage(room.keys.index(n.encode())) for n in names)
            each = client.memory_usage(room.keys.entry(b"k:0")) + indexes / count
            times = ratio(
                lambda: room.cache.get("first"),
                lambda: json.loads(client.get("plain")),
                effort.rounds,
                effort.hits,
            )
            curve.add(size, write_us=us, times=times, bytes_each=each)
    curve.give(section, ["write, server µs"])


def value_size(effort: Effort, section: Section) -> None:
    """Measure a hit and a set by size: a list of products, and one long text.

    Beside them redis-py's GET and json.loads, and its SET and json.dumps.
    """
    sizes = effort.pick(
        smoke=[100, 1_000],
        quick=[100, 1_000, 10_000, LARGE],
        usual=[100, 1_000, 10_000, LARGE, 900_000],
        full=[100, 1_000, 10_000, LARGE, 900_000, 3_000_000],
    )
    curve = Curve(
        "values",
        "A hit by size of the value, × GET and json.loads",
        "bytes of JSON",
        {
            "products, hit": "{:.2f}",
            "text, hit": "{:.2f}",
            "products, set": "{:.2f}",
            "text, set": "{:.2f}",
        },
    )
    worst = 0.0
    with stage() as here:
        for size in sizes:
            rounds, hits = (effort.rounds, max(1, effort.hits * 1_000 // max(size, 1_000)))
            found = [
                _of_value(here, value, rounds, hits) for value in (_products(size), _text(size))
            ]
            (products, products_set), (text, text_set) = found
            curve.add(size, products=products, text=text, p_set=products_set, t_set=text_set)
            worst = max(worst, products, text) if size <= LARGE else worst
    curve.give(section, ["products, hit", "text, hit"])
    claim = "a hit of up to 100 kB takes, × GET by redis-py and json.loads"
    section.promises.append(Promise(claim, worst, LARGE_TIMES, by="CPU"))


def _of_value(here: Any, value: object, rounds: int, hits: int) -> tuple[float, float]:
    """Return (CPU of a hit ÷ GET and json.loads, CPU of a set ÷ json.dumps and SET)."""
    room, client = here.room, here.client
    client.set("plain", json.dumps(value))
    assert room.cache.set("k", value, tags=TAGS)
    assert room.cache.get("k") == value
    hit = ratio(lambda: room.cache.get("k"), lambda: json.loads(client.get("plain")), rounds, hits)
    written = ratio(
        lambda: room.cache.set("k", value, tags=TAGS),
        lambda: client.set("plain", json.dumps(value)),
        rounds,
        hits,
    )
    return hit, written


def _text(size: int) -> dict[str, str]:
    chance = random.Random(7)
    words = ["".join(chance.choices("etaoinshrdlu", k=chance.randint(2, 9))) for _ in range(500)]
    return {"text": " ".join(chance.choices(words, k=size // 6 + 1))[:size]}


def _products(size: int) -> list[dict[str, object]]:
    return [VALUE | {"id": n, "text": "x" * 30} for n in range(max(1, size // 110))]
